"""The taskiq tasks of this package: what a work message asks for, from admit_run to the run's final state.

Each task supervises one child. Knows Dagster's runs through `admit_run` and `finalise`, children through
`supervisor`, and the message through `current_work`; not SQS.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from time import time
from typing import Any

from dagster import DagsterRun
from taskiq import AsyncBroker

from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq._shield import shielded
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.child.main import RUN_TARGET
from dagster_taskiq.dagster_compat.api import RESUME_RUN_LOG_MESSAGE, serialize_value
from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.messages import EXECUTE_RUN, RESUME_RUN, is_run_id
from dagster_taskiq.metrics import CLEANUPS, FINISHED, TO_FINAL, WAITED
from dagster_taskiq.process.child_handle import ChildSpec
from dagster_taskiq.process.supervise import Cancelled, ChildEnd, supervise
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.running_steps import RunningSteps, running_steps
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG
from dagster_taskiq.tasks.running_task import RunningTask, current_work
from dagster_taskiq.worker.admission import Action, Candidate, Decision, WorkKind, admit_run
from dagster_taskiq.worker.cleanup_task import clean_up
from dagster_taskiq.worker.context import ActiveTask, WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.finalization import Conclusion, FinalAction, conclude, examine, fail

logger = logging.getLogger(__name__)


class RunWork:
    """Sees work on runs through."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def register(self, broker: AsyncBroker) -> None:
        """Make the tasks known to a worker's broker."""

        # Any argument is let in, to be refused in `work`: taskiq would drop a message whose arguments do not fit.
        async def execute_run(run_id: Any = None, *_: Any, **__: Any) -> None:
            await self.work("execute_run", run_id)

        async def resume_run(run_id: Any = None, *_: Any, **__: Any) -> None:
            await self.work("resume_run", run_id)

        broker.register_task(execute_run, EXECUTE_RUN)
        broker.register_task(resume_run, RESUME_RUN)

    async def work(self, kind: WorkKind, run_id: object) -> None:
        """See one message through. The cancellation of the calling task becomes an event (`shielded`)."""
        work = current_work()
        if not is_run_id(run_id):
            if work.receive_count == 1:
                logger.warning("work message names no run; it is left to expire", extra={"task_id": work.task_id})
            work.settle_as(Settlement.LEAVE)
            return
        cancelled = Cancelled(lambda: work.cancellation)
        await shielded(self._work(kind, run_id, work, cancelled), name=f"{kind} {run_id}", on_cancel=cancelled.note)

    async def _work(self, kind: WorkKind, run_id: str, work: RunningTask, cancelled: Cancelled) -> None:
        if cancelled.by_shutdown():
            work.settle_as(Settlement.HAND_BACK)
            return
        candidate = Candidate(kind, run_id, work.task_id, self._context.worker_id, self._context.where)
        try:
            decision = await self._decide(candidate, cancelled)
            await self._carry_out(decision, candidate, work, cancelled)
        except Exception:  # the database, above all: the message stays, and is tried again when it is visible again
            extra = {"run_id": run_id, "task_id": work.task_id}
            logger.exception("work could not be carried out; its message is handed back", extra=extra)
            work.settle_as(Settlement.HAND_BACK, self._context.settings.visibility_timeout_seconds)
            with suppress(Exception):  # or else our claim keeps the others from it for as long as we live
                await asyncio.to_thread(self._release, candidate)

    async def _decide(self, candidate: Candidate, cancelled: Cancelled) -> Decision:
        """See `admit_run`; patient with the database, and with a worker of which it is not known if it is dead."""
        while True:
            decision = await retry_async(
                lambda: asyncio.to_thread(admit_run, self._context.instance, self._context.claims, candidate),
                doing="look up a run",
                for_s=DATABASE_RETRY_S,
                until=cancelled.by_shutdown,
            )
            if decision.action is not Action.LOOK_AGAIN:
                return decision
            if cancelled.by_shutdown():
                return Decision(Action.HAND_BACK, "the worker shuts down")
            await asyncio.sleep(self._context.claims.heartbeats.confirm_s)

    def _release(self, candidate: Candidate) -> None:
        context = self._context
        run = context.instance.get_run_by_id(candidate.run_id)
        if run is not None:
            context.claims.release(run, context.worker_id, candidate.task_id, "it could not be carried out here")

    async def _carry_out(
        self, decision: Decision, candidate: Candidate, work: RunningTask, cancelled: Cancelled
    ) -> None:
        extra = {"run_id": candidate.run_id, "task_id": candidate.task_id, "why": decision.why}
        logger.info("run %s: %s", candidate.run_id, decision.action.value, extra=extra)
        context, run = self._context, decision.run
        if decision.action is Action.HAND_BACK:
            work.settle_as(Settlement.HAND_BACK, context.settings.visibility_timeout_seconds)
        elif decision.action is Action.DROP or run is None:
            work.settle_as(Settlement.DELETE)
        elif decision.action is Action.FAIL:
            await self._stop_steps(run, await asyncio.to_thread(running_steps, context.instance, run.run_id))
            if await asyncio.to_thread(fail, context.instance, run.run_id, decision.why):
                work.settle_as(Settlement.DELETE)
            else:
                await self._finalise(run, work, None, Cancellation(CancelKind.REQUESTED, "terminated meanwhile"))
        elif decision.action is Action.FINISH_CANCELLATION:
            requested = Cancellation(CancelKind.REQUESTED, decision.why)
            await self._finalise(run, work, None, requested)
        else:
            kind: WorkKind = "resume_run" if decision.action is Action.RESUME else "execute_run"
            await self._run(run, kind, candidate, work, cancelled, decision)

    async def _run(
        self,
        run: DagsterRun,
        kind: WorkKind,
        candidate: Candidate,
        work: RunningTask,
        cancelled: Cancelled,
        decision: Decision,
    ) -> None:
        if kind == "resume_run" and candidate.kind == "execute_run":
            # As the run monitoring daemon would announce it: by this event Dagster counts the attempts.
            await asyncio.to_thread(self._context.instance.report_engine_event, RESUME_RUN_LOG_MESSAGE, run)
        writer = EventWriter(self._context.instance, run, self._context.worker_id, cancelled)
        self._context.active[work.task_id] = ActiveTask(run.run_id)
        end: ChildEnd | None = None
        if work.sent_at and work.receive_count == 1:
            self._context.metrics.put({WAITED: max(0.0, time() - work.sent_at)}, Kind="run")
        stale = decision.is_stale(self._context.settings.dead_after_s)
        try:
            if not cancelled and not stale:
                end = await self._supervise(run, kind, work, cancelled, writer)
        except ChildStartFailed as error:
            # Not the run's fault: another worker, or this one later, may have better luck.
            logger.error("%s", error, extra={"run_id": run.run_id})  # noqa: TRY400 - our own text says it all
            await self._give_up(run, work, str(error))
            return
        finally:
            self._context.active.pop(work.task_id, None)
        if end is None and (cancelled.by_shutdown() or (stale and not cancelled)):
            await self._give_up(run, work, "the worker hung" if stale else "the worker shuts down", 0)
            return
        writer.record_end(end)
        self._context.measure_end(end)
        cause = cancelled.cause if cancelled else None
        if end is not None and end.abandoned:
            cause = await self._cause_after_hanging(run, cause)
        await self._finalise(run, work, end, cause, writer)

    async def _cause_after_hanging(self, run: DagsterRun, cause: Cancellation | None) -> Cancellation:
        """This worker hung, and its child was stopped meanwhile: has another one taken over?"""
        context = self._context
        logger.warning("this worker hung; its run was interrupted", extra={"run_id": run.run_id})
        owner = await retry_async(
            lambda: asyncio.to_thread(context.claims.owner, run.run_id, context.worker_id), doing="read the claims"
        )
        if owner is None or owner.worker_id != context.worker_id:
            return Cancellation(CancelKind.LEASE_LOST, "another worker has taken over")
        return cause or Cancellation(CancelKind.SHUTDOWN, "the worker hung")

    async def _give_up(self, run: DagsterRun, work: RunningTask, why: str, delay_s: int | None = None) -> None:
        context = self._context
        await asyncio.to_thread(context.claims.release, run, context.worker_id, work.task_id, why)
        work.settle_as(
            Settlement.HAND_BACK, context.settings.visibility_timeout_seconds if delay_s is None else delay_s
        )

    async def _supervise(
        self, run: DagsterRun, kind: WorkKind, work: RunningTask, cancelled: Cancelled, writer: EventWriter
    ) -> ChildEnd:
        context = self._context
        argument = {
            "kind": kind,
            "run_id": run.run_id,
            "instance_ref": serialize_value(context.instance.get_ref()),
        }
        spec = ChildSpec(
            target=RUN_TARGET,
            argument=argument,
            mark=work.task_id,
            # Without its worker a child must be gone before the next worker can receive the message.
            grace_s=min(context.grace_s(run), context.settings.dead_after_s),
            hung_after_s=context.settings.hung_after_s,
        )
        return await supervise(context.processes, spec, cancelled, writer, lambda: context.grace_now_s(run, cancelled))

    async def _finalise(
        self,
        run: DagsterRun,
        work: RunningTask,
        end: ChildEnd | None,
        cancellation: Cancellation | None,
        writer: EventWriter | None = None,
    ) -> None:
        context = self._context

        def look() -> Conclusion:
            return examine(context.instance, run.run_id, end, cancellation, context.worker_id)

        async def write() -> Conclusion:
            # The events of the way stand before the final one; meanwhile look how it has to end.
            looking = asyncio.to_thread(look)
            conclusion, _ = await asyncio.gather(looking, writer.written() if writer else asyncio.sleep(0))
            await asyncio.to_thread(self._keep_reason, conclusion.run, cancellation)
            if conclusion.steps and conclusion.run is not None:
                shutting_down = cancellation is not None and cancellation.kind is CancelKind.SHUTDOWN
                await self._stop_steps(conclusion.run, conclusion.steps, patient=not shutting_down)
                conclusion = await asyncio.to_thread(look)
            if conclusion.cleanup.due and conclusion.run is not None:
                if not await clean_up(context, conclusion.run, work.task_id):
                    return replace(conclusion, settlement=Settlement.HAND_BACK)
                conclusion = await asyncio.to_thread(look)
                context.metrics.count(CLEANUPS, Outcome="failed" if conclusion.cleanup.failures else "succeeded")
            await asyncio.to_thread(conclude, context.instance, conclusion, end)
            return conclusion

        # The child is gone and the message still ours: nobody else can do this better, so not at once give up.
        conclusion = await retry_async(write, doing="write the final state of a run", for_s=DATABASE_RETRY_S)
        if conclusion.settlement is Settlement.HAND_BACK:
            resumed = conclusion.verdict is FinalAction.RESUMABLE
            why = "the run will be resumed" if resumed else "its cleanup goes on elsewhere"
            await self._give_up(run, work, f"interrupted; {why}", 0)
            return
        if cancellation is not None and cancellation.kind is CancelKind.REQUESTED:
            outcome = "cleanup failed" if conclusion.cleanup.failures else conclusion.verdict.name.lower()
            context.metrics.count(FINISHED, Outcome=outcome)
            context.metrics.put({TO_FINAL: max(0.0, time() - cancellation.received_at)})
        if conclusion.settlement is Settlement.LEAVE:
            await asyncio.to_thread(context.claims.release, run, context.worker_id, work.task_id, "the lease was lost")
        work.settle_as(conclusion.settlement)

    def _keep_reason(self, run: DagsterRun | None, cancellation: Cancellation | None) -> None:
        """What somebody said who only sent a cancel message. The launcher keeps what is said to it."""
        if run is None or cancellation is None or cancellation.channel is not CancelChannel.CANCEL_QUEUE:
            return
        if cancellation.reason and CANCEL_REASON_TAG not in run.tags:
            self._context.instance.add_run_tags(run.run_id, {CANCEL_REASON_TAG: cancellation.reason})

    async def _stop_steps(self, run: DagsterRun, steps: RunningSteps, *, patient: bool = True) -> None:
        """Before a run is final, its steps have stopped, wherever they work; for as long as that may take."""
        context = self._context
        patience_s = context.settings.steps_patience_s(context.grace_s(run)) if patient else 0
        began, told = time(), False
        while left := await asyncio.to_thread(self._still_at_work, steps):
            if not told:
                logger.info("stopping %d steps of run %s", len(left), run.run_id, extra={"run_id": run.run_id})
                await context.cancel_tasks(left)
                told = True
            waited_s = time() - began
            if waited_s >= patience_s:
                note = engine_events.steps_not_stopped([steps.step_keys[task_id] for task_id in left], waited_s)
                await asyncio.to_thread(append_event, context.instance, run, note)
                return
            await asyncio.sleep(min(0.5, 0.05 + waited_s / 10))
            steps = await asyncio.to_thread(running_steps, context.instance, run.run_id)

    def _still_at_work(self, steps: RunningSteps) -> list[str]:
        """Task ids: of those whose worker lives, or has not been dead for long enough for its children to be gone."""
        alive = self._context.heartbeats_of_steps.alive(steps.workers.values())
        return [task_id for task_id, worker_id in steps.workers.items() if worker_id in alive]
