"""The worker's side of a cleanup: processes that run the handlers of a run, one after the other until all is done.

Knows children and what they say; the handlers are run in there, by `cleanup`.
"""

import asyncio
import logging
from typing import Any, Final

from dagster import DagsterRun

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.child.main import CLEANUP_TARGET
from dagster_taskiq.cleanup.runner import HARD_TIMEOUT_S, write_attempt
from dagster_taskiq.dagster_compat.api import serialize_value
from dagster_taskiq.metrics import CLEANUP_ATTEMPTS
from dagster_taskiq.process.child_handle import ChildSpec
from dagster_taskiq.process.supervise import Cancelled, ChildEnd, supervise
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.worker.context import ActiveTask, WorkerContext
from dagster_taskiq.worker.finalization import how_it_ended

logger = logging.getLogger(__name__)

_MOST_CRASHES: Final = 3
"""Of the process, outside of any handler: then it is no accident."""


class _Log:
    """See `supervisor.Observer`. The event log of the run tells of the handlers, not of their process."""

    def interrupting(self, pid: int, grace_s: float) -> None:
        logger.info("the worker stops; interrupting a cleanup", extra={"pid": pid, "grace_s": grace_s})

    def killing(self, pid: int, waited_s: float, shield: str | None) -> None:
        logger.warning("killing a cleanup", extra={"pid": pid, "waited_s": waited_s, "shield": shield})


async def clean_up(context: WorkerContext, run: DagsterRun, task_id: str) -> bool:
    """Run the outstanding cleanup handlers of a run whose work has stopped; what came of it is in the run's log.

    False: the worker stops, and it has to go on elsewhere. Raises `ChildStartFailed`. Must run inside `shielded`,
    as `supervise`.
    """
    context.active[task_id] = ActiveTask(run.run_id)
    crashes = 0
    try:
        while True:
            end = await _one_process(context, run, task_id)
            if end is None:
                return False
            told = [message["cleaning"] for message in end.messages if "cleaning" in message]
            for outcome in (what["ended"] for what in told if "ended" in what):
                context.metrics.count(CLEANUP_ATTEMPTS, Outcome=outcome)
            said = next((message for message in end.messages if "cleaned" in message), None)
            if said is not None or end.interrupted_at is not None or end.abandoned:
                return said is not None and bool(said["cleaned"])
            if told and "ended" not in told[-1]:
                context.metrics.count(CLEANUP_ATTEMPTS, Outcome="lost")
                await asyncio.to_thread(_write_lost, context, run, told[-1], end)
                continue
            crashes += 1
            if crashes == _MOST_CRASHES:
                note = engine_events.cleanup_ended([how_it_ended(end, "the process of the cleanup handlers")])
                await asyncio.to_thread(append_event, context.instance, run, note)
                return True
    finally:
        context.active.pop(task_id, None)


async def _one_process(context: WorkerContext, run: DagsterRun, task_id: str) -> ChildEnd | None:
    """None: the worker stops, and none was started."""
    stop = Cancellation(CancelKind.SHUTDOWN, "the worker is shutting down")
    stopping = Cancelled(lambda: stop if context.hurry.is_set() else None)
    if stopping:
        return None
    spec = ChildSpec(
        target=CLEANUP_TARGET,
        argument={
            "run_id": run.run_id,
            "worker_id": context.worker_id,
            "instance_ref": serialize_value(context.instance.get_ref()),
        },
        mark=task_id,
        grace_s=min(context.settings.shutdown_grace_s, context.settings.dead_after_s),
        hung_after_s=context.settings.hung_after_s,
    )

    async def note_the_shutdown() -> None:
        await context.hurry.wait()
        stopping.note()

    noting = asyncio.create_task(note_the_shutdown(), name=f"stop cleanup of {run.run_id}")
    try:
        return await supervise(context.processes, spec, stopping, _Log(), lambda: spec.grace_s)
    finally:
        noting.cancel()


def _write_lost(context: WorkerContext, run: DagsterRun, doing: dict[str, Any], end: ChildEnd) -> None:
    """The attempt that did not get to say how it ended."""
    seconds = end.gone_at - float(doing["at"])
    why = how_it_ended(end, "its process")
    if seconds >= float(doing["timeout_s"]) + HARD_TIMEOUT_S:
        why = f"it did not react to its timeout of {doing['timeout_s']:g} s, and its process was ended"
    note = engine_events.cleanup(str(doing["handler"]), int(doing["attempt"]), seconds, why)
    write_attempt(context.instance, run, doing["of"], note, whole=bool(doing["whole"]))
