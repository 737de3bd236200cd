"""The worker's side of a cleanup: processes that run the handlers of a run, one after the other until all is done.

Knows children and what they report; the handlers are run in there, by `cleanup.runner`.
"""

import logging
from collections.abc import Sequence
from typing import Any, Final

from dagster import DagsterRun

from dagster_taskiq._attempt_limit import HARD_TIMEOUT_S, no_reaction
from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.child.main import CLEANUP_TARGET
from dagster_taskiq.cleanup.runner import write_attempt
from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.metrics import CLEANUP_ATTEMPTS, FORCED_KILLS, TIMED_OUT
from dagster_taskiq.process.step_timers import LateStep
from dagster_taskiq.process.supervise import ChildEnd
from dagster_taskiq.storage import cleanup_events
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.finalization import how_it_ended
from dagster_taskiq.worker.run_child import ChildWork, NotStarted, run_child

logger = logging.getLogger(__name__)

_MOST_CRASHES: Final = 3
"""Of the process, outside of any handler: then it is no accident."""


class _Log:
    """See `supervise.Observer`. The event log of the run is about the handlers, not of their process."""

    def interrupting(self, pid: int, grace_s: float) -> None:
        logger.info("the worker stops; interrupting a cleanup", extra={"pid": pid, "grace_s": grace_s})

    def staying(self, pid: int, stays: Sequence[str], patience_s: float) -> None:
        extra = {"pid": pid, "stays": ", ".join(stays), "patience_s": patience_s}
        logger.info("cleanup handlers have ended, their process has not", extra=extra)

    def killing(self, pid: int, waited_s: float, shield: str | None, stays: Sequence[str] | None) -> None:
        logger.warning("killing a cleanup", extra={"pid": pid, "waited_s": waited_s, "shield": shield})


async def clean_up(context: WorkerContext, run: DagsterRun, task_id: str) -> bool:
    """Run the outstanding cleanup handlers of a run whose work has stopped; what came of it is in the run's log.

    False: the worker stops, and it has to go on elsewhere. Raises `ChildStartFailed`. Must run inside `shielded`, as
    `run_child`.
    """
    with context.working_on(task_id, run.run_id) as active, active.lost.also_set_by(context.shutdown):
        return await _run_handlers(context, run, task_id, active.lost)


class LateSteps:
    """What a worker does about steps of a run that time out; see `step_timers.StepObserver`."""

    def __init__(self, context: WorkerContext, run: DagsterRun, task_id: str, writer: EventWriter) -> None:
        self._context = context
        self._run = run
        self._task_id = task_id
        self._writer = writer

    def step_interrupting(self, step: LateStep, grace_s: float) -> None:
        """See `step_timers.StepObserver`."""
        self._context.metrics.count(TIMED_OUT)
        self._writer.step_interrupting(step, grace_s)

    def step_killing(self, step: LateStep, waited_s: float, shield: str | None) -> None:
        """See `step_timers.StepObserver`."""
        self._context.metrics.count(FORCED_KILLS)
        self._writer.step_killing(step, waited_s, shield)

    async def clean_up(self, step: LateStep) -> None:
        """See `step_timers.StepObserver`. When that is not possible, the log of the worker says so."""
        if step.run_id != self._run.run_id:
            return  # of a job that an op has executed in its process
        stop = CancelSignal()
        try:
            with stop.also_set_by(self._context.shutdown):
                await retry_async(
                    lambda: _run_handlers(self._context, self._run, self._task_id, stop, step),
                    doing="clean up after a step",
                    for_s=DATABASE_RETRY_S,
                )
        except Exception:  # whatever it is: the step is to end, with or without it
            extra = {"run_id": self._run.run_id, "step_key": step.step_key}
            logger.exception("the cleanup handlers of a step that timed out could not be run", extra=extra)


async def _run_handlers(
    context: WorkerContext, run: DagsterRun, task_id: str, stop: CancelSignal, step: LateStep | None = None
) -> bool:
    """Of the whole run, or of one step that has timed out."""
    grace_s = min(context.settings.shutdown_grace_s, context.settings.dead_after_s)
    argument: dict[str, Any] = {"run_id": run.run_id, "worker_id": context.worker_id}
    if step is not None:
        argument |= {"step_key": step.step_key, "reason": step.reason}
    # A run that is to be CANCELED does not wait for threads of its handlers for longer.
    work = ChildWork(CLEANUP_TARGET, argument, task_id, grace_s=lambda _: grace_s, exit_patience_s=grace_s)
    crashes = 0
    while True:
        end = await run_child(context, work, stop, _Log())
        if isinstance(end, NotStarted) and not stop.is_set:
            raise ChildStartFailed(end.why)
        if end is None or isinstance(end, NotStarted):
            return False
        reports = [message["cleaning"] for message in end.messages if "cleaning" in message]
        for outcome in (report["ended"] for report in reports if "ended" in report):
            context.metrics.count(CLEANUP_ATTEMPTS, Outcome=outcome)
        result = next((message for message in end.messages if "cleaned" in message), None)
        if result is not None or end.interrupted_at is not None or end.abandoned:
            return result is not None and bool(result["cleaned"])
        if reports and "ended" not in reports[-1]:
            context.metrics.count(CLEANUP_ATTEMPTS, Outcome="lost")
            await context.lane.call(_write_lost, context, run, reports[-1], end)
            continue
        crashes += 1
        if crashes == _MOST_CRASHES:
            why = how_it_ended(end, "the process of the cleanup handlers")
            if step is not None:
                raise ChildStartFailed(why)
            await context.lane.call(append_event, context.instance, run, cleanup_events.cleanup_ended([why]))
            return True


def _write_lost(context: WorkerContext, run: DagsterRun, report: dict[str, Any], end: ChildEnd) -> None:
    """The attempt that did not get to report how it ended."""
    seconds = end.gone_at - float(report["at"])
    why = how_it_ended(end, "its process")
    if seconds >= float(report["timeout_s"]) + HARD_TIMEOUT_S:
        why = no_reaction(report["timeout_s"])
    event = cleanup_events.cleanup(
        str(report["handler"]), str(report["identity"]), int(report["attempt"]), seconds, why
    )
    write_attempt(context.instance, run, report["of"], event, whole=bool(report["whole"]))
