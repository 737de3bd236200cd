"""The end of a run, phase by phase: stop its steps, clean up after it, decide, write.

Each phase is retried by itself while the database is away. Knows the worker and `finalization`, which decides; not
processes.
"""

import asyncio
import logging
from collections.abc import Callable
from time import time
from typing import Final, TypeVar

from dagster import DagsterRun, DagsterRunStatus

from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.metrics import CLEANUPS, FINISHED, TO_FINAL
from dagster_taskiq.process.supervise import ChildEnd
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.storage import step_events
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.running_steps import StopOfSteps
from dagster_taskiq.storage.step_claims import StepClaim
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, add_own_tags, own_tags
from dagster_taskiq.worker.children import cancel_children
from dagster_taskiq.worker.claim_watch import TAKEN_OVER
from dagster_taskiq.worker.cleanup_task import clean_up
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.finalization import Conclusion, FinalAction, conclude, examine
from dagster_taskiq.worker.work_log import HANDED_BACK, WorkLog

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_CANCELING_WITHIN_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.02


async def finalize_run(
    context: WorkerContext,
    run: DagsterRun,
    task_id: str,
    end: ChildEnd | None,
    cancellation: Cancellation | None,
    writer: EventWriter | None = None,
    log: WorkLog | None = None,
) -> Settled:
    """Bring a run whose process tree is gone to its final state; what is to become of its message.

    `end` is None when there was no child. `writer`: of the events that are to stand before the final one.
    `log` is told how the run ended.
    """
    return await _Finalization(context, run, task_id, end, cancellation, log).run(writer)


class _Finalization:
    def __init__(
        self,
        context: WorkerContext,
        run: DagsterRun,
        task_id: str,
        end: ChildEnd | None,
        cancellation: Cancellation | None,
        log: WorkLog | None,
    ) -> None:
        self._context = context
        self._log = log
        self._run = run
        self._task_id = task_id
        self._end = end
        self._cancellation = cancellation

    async def run(self, writer: EventWriter | None) -> Settled:
        await self._await_canceling()
        # Meanwhile look how it has to end.
        conclusion, _ = await asyncio.gather(self._examine(), writer.written() if writer else asyncio.sleep(0))
        await self._keep_reason(conclusion.run)
        if conclusion.has_steps:
            shutting_down = self._cancellation is not None and self._cancellation.kind is CancelKind.SHUTDOWN
            await stop_steps(self._context, self._run, patient=not shutting_down)
            conclusion = await self._examine()
        if conclusion.is_stopped and conclusion.run is not None:
            if not await cancel_children(self._context, conclusion.run, conclusion.cancellation):
                return await self._give_up("interrupted; the runs that it launched are cancelled elsewhere")
            conclusion = await self._examine()
        if conclusion.cleanup.due and conclusion.run is not None:
            if not await self._clean_up(conclusion.run):
                return await self._give_up("interrupted; its cleanup goes on elsewhere")
            conclusion = await self._examine()
            outcome = "failed" if conclusion.cleanup.failures else "succeeded"
            self._context.metrics.count(CLEANUPS, Outcome=outcome)
        conclusion = await self._write(conclusion)
        if conclusion.action is FinalAction.RESUMABLE:
            return await self._give_up("interrupted; the run will be resumed")
        self._measure(conclusion)
        self._tell(conclusion.outcome, conclusion.reason(self._end))
        if conclusion.settlement is Settlement.LEAVE:
            await self._blocking(self._release_lost, "release a claim")
        else:
            forget = self._context.forget_claims
            await self._blocking(lambda: forget(self._run.run_id), "delete the claims on a run that is final")
        return Settled(conclusion.settlement)

    async def _await_canceling(self) -> None:
        """If a launcher has said that it marks the run as CANCELING, wait until it has, for some seconds.

        It sends the message first, and on a busy database the worker may be the quicker one: CANCELING would come
        after CANCELED, and have to be repaired. Whoever else writes into the cancel queue may mark nothing.
        """
        cancellation = self._cancellation
        if cancellation is None or not cancellation.status_follows:
            return
        instance, pause_s = self._context.instance, _FIRST_PAUSE_S
        while time() < cancellation.received_at + _CANCELING_WITHIN_S:
            run = await self._blocking(lambda: instance.get_run_by_id(self._run.run_id), "read the status of a run")
            if run is None or run.status is not DagsterRunStatus.STARTED:
                return
            await asyncio.sleep(pause_s)
            pause_s *= 2

    def _release_lost(self) -> None:
        self._context.claims.release(self._run, "the lease was lost")

    async def _blocking(self, call: Callable[[], _T], doing: str) -> _T:
        # How the child has ended is known here and nowhere else.
        return await self._context.through_outages(call, doing)

    async def _examine(self) -> Conclusion:
        return await self._blocking(self._look, "look how a run has to end")

    def _look(self) -> Conclusion:
        context, run_id = self._context, self._run.run_id
        if not context.claims.holds(run_id):
            self._cancellation = Cancellation(CancelKind.LEASE_LOST, cause=TAKEN_OVER)
        return examine(context.instance, run_id, self._end, self._cancellation, context.worker_id)

    async def _keep_reason(self, run: DagsterRun | None) -> None:
        """What somebody gave who only sent a cancel message. The launcher keeps what it is given."""
        cancellation = self._cancellation
        if run is None or cancellation is None or cancellation.channel is not CancelChannel.CANCEL_QUEUE:
            return
        if cancellation.kind is not CancelKind.REQUESTED:
            return
        if cancellation.reason and CANCEL_REASON_TAG not in own_tags(run):
            tags, instance = {CANCEL_REASON_TAG: cancellation.reason}, self._context.instance
            try:
                await self._context.lane.call(add_own_tags, instance, run, tags)
            except Exception:  # whatever it is: the run is to end, with or without it
                logger.exception("the tag with the reason could not be written", extra={"run_id": run.run_id})

    async def _clean_up(self, run: DagsterRun) -> bool:
        return await retry_async(
            lambda: clean_up(self._context, run, self._task_id), doing="clean up after a run", for_s=DATABASE_RETRY_S
        )

    async def _write(self, conclusion: Conclusion) -> Conclusion:
        """Write the final state. What was written half-way is looked at again before another try."""
        current: Conclusion | None = conclusion

        def write() -> Conclusion:
            nonlocal current
            wanted, current = current or self._look(), None
            conclude(self._context.instance, wanted, self._end)
            return wanted

        return await self._blocking(write, "write the final state of a run")

    def _tell(self, outcome: str, reason: str | None) -> None:
        if self._log is not None:
            self._log.ended(outcome, reason)

    async def _give_up(self, why: str) -> Settled:
        self._tell(HANDED_BACK, why)
        return await self._context.give_up(self._run, why, delay_s=0)

    def _measure(self, conclusion: Conclusion) -> None:
        cancellation = conclusion.cancellation
        if cancellation is not None and cancellation.kind is CancelKind.REQUESTED:
            outcome = "cleanup failed" if conclusion.cleanup.failures else conclusion.action.name.lower()
            self._context.metrics.count(FINISHED, Outcome=outcome)
            self._context.metrics.put({TO_FINAL: max(0.0, time() - cancellation.received_at)})


async def stop_steps(context: WorkerContext, run: DagsterRun, *, patient: bool = True) -> None:
    """Before a run is final, its steps have stopped, wherever they run; within the time that they may take.

    Not `patient`: they are only cancelled.
    """

    async def left() -> dict[str, StepClaim]:
        def look() -> dict[str, StepClaim]:
            steps = context.step_claims.running(run.run_id)
            workers = {task_id: claim.worker_id for task_id, claim in steps.items()}
            return {task_id: steps[task_id] for task_id in context.steps_left(workers)}

        return await context.through_outages(look, "look for steps")

    stop = StopOfSteps(context.settings.steps_patience_s(context.grace_s(run)) if patient else 0)
    while True:
        steps = await left()
        if not steps:
            return
        if late := stop.not_yet_cancelled(steps):
            logger.info("stopping %d steps of run %s", len(late), run.run_id, extra={"run_id": run.run_id})
            await context.cancel_tasks({task_id: steps[task_id].route for task_id in late})
        if stop.is_too_long:
            break
        await asyncio.sleep(min(0.5, 0.05 + stop.waited_s / 10))
    event = step_events.steps_not_stopped([claim.step_key for claim in steps.values()], stop.waited_s)
    await context.through_outages(lambda: append_event(context.instance, run, event), "write an engine event")
