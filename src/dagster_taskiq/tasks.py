"""The taskiq tasks of this package: what a work message asks for, from preflight to the run's final state.

Each task supervises one child. Knows Dagster's runs through `preflight` and `finalise`, children through
`supervisor`, and the message through `current_work`; not SQS.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from time import time
from typing import Any, Final

from dagster import DagsterRun
from taskiq import AsyncBroker

from dagster_taskiq import dagster_internals as core
from dagster_taskiq import events
from dagster_taskiq.cancellable_receiver import Running, current_work
from dagster_taskiq.cancellation import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.child import RUN_TARGET
from dagster_taskiq.chronicle import Chronicle
from dagster_taskiq.claims import OpenSteps, open_steps, write_note
from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.finalise import Conclusion, Verdict, conclude, examine, fail
from dagster_taskiq.messages import is_run_id
from dagster_taskiq.metrics import CLEANUPS, FINISHED, TO_FINAL, WAITED
from dagster_taskiq.patience import DATABASE_PATIENCE_S, patiently
from dagster_taskiq.preflight import Action, Candidate, Decision, WorkKind, preflight
from dagster_taskiq.process import ChildSpec
from dagster_taskiq.settlement import Settlement
from dagster_taskiq.supervised_cleanup import clean_up
from dagster_taskiq.supervisor import Cancelled, ChildEnd, supervise
from dagster_taskiq.tags import CANCEL_REASON_TAG
from dagster_taskiq.to_the_end import to_the_end
from dagster_taskiq.workplace import Piece, Workplace

logger = logging.getLogger(__name__)

EXECUTE_RUN: Final = "dagster_taskiq.execute_run"
RESUME_RUN: Final = "dagster_taskiq.resume_run"


class RunWork:
    """Sees work on runs through."""

    def __init__(self, place: Workplace) -> None:
        self._place = place

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
        """See one message through. The cancellation of the calling task becomes an event (`to_the_end`)."""
        work = current_work()
        if not is_run_id(run_id):
            if work.receive_count == 1:
                logger.warning("work message names no run; it is left to expire", extra={"task_id": work.task_id})
            work.settle_as(Settlement.LEAVE)
            return
        cancelled = Cancelled(lambda: work.cancellation)
        await to_the_end(self._work(kind, run_id, work, cancelled), name=f"{kind} {run_id}", on_cancel=cancelled.note)

    async def _work(self, kind: WorkKind, run_id: str, work: Running, cancelled: Cancelled) -> None:
        if cancelled.by_shutdown():
            work.settle_as(Settlement.HAND_BACK)
            return
        candidate = Candidate(kind, run_id, work.task_id, self._place.worker_id, self._place.where)
        try:
            decision = await self._decide(candidate, cancelled)
            await self._carry_out(decision, candidate, work, cancelled)
        except Exception:  # the database, above all: the message stays, and is tried again when it is visible again
            extra = {"run_id": run_id, "task_id": work.task_id}
            logger.exception("work could not be carried out; its message is handed back", extra=extra)
            work.settle_as(Settlement.HAND_BACK, self._place.settings.visibility_timeout_seconds)
            with suppress(Exception):  # or else our claim keeps the others from it for as long as we live
                await asyncio.to_thread(self._release, candidate)

    async def _decide(self, candidate: Candidate, cancelled: Cancelled) -> Decision:
        """See `preflight`; patient with the database, and with a worker of which it is not known if it is dead."""
        while True:
            decision = await patiently(
                lambda: asyncio.to_thread(preflight, self._place.instance, self._place.claims, candidate),
                doing="look up a run",
                for_s=DATABASE_PATIENCE_S,
                until=cancelled.by_shutdown,
            )
            if decision.action is not Action.LOOK_AGAIN:
                return decision
            if cancelled.by_shutdown():
                return Decision(Action.HAND_BACK, "the worker shuts down")
            await asyncio.sleep(self._place.claims.heartbeats.confirm_s)

    def _release(self, candidate: Candidate) -> None:
        place = self._place
        run = place.instance.get_run_by_id(candidate.run_id)
        if run is not None:
            place.claims.release(run, place.worker_id, candidate.task_id, "it could not be carried out here")

    async def _carry_out(self, decision: Decision, candidate: Candidate, work: Running, cancelled: Cancelled) -> None:
        extra = {"run_id": candidate.run_id, "task_id": candidate.task_id, "why": decision.why}
        logger.info("run %s: %s", candidate.run_id, decision.action.value, extra=extra)
        place, run = self._place, decision.run
        if decision.action is Action.HAND_BACK:
            work.settle_as(Settlement.HAND_BACK, place.settings.visibility_timeout_seconds)
        elif decision.action is Action.DROP or run is None:
            work.settle_as(Settlement.DELETE)
        elif decision.action is Action.FAIL:
            await self._stop_steps(run, await asyncio.to_thread(open_steps, place.instance, run.run_id))
            if await asyncio.to_thread(fail, place.instance, run.run_id, decision.why):
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
        work: Running,
        cancelled: Cancelled,
        decision: Decision,
    ) -> None:
        if kind == "resume_run" and candidate.kind == "execute_run":
            # As the run monitoring daemon would announce it: by this event Dagster counts the attempts.
            await asyncio.to_thread(self._place.instance.report_engine_event, core.RESUME_RUN_LOG_MESSAGE, run)
        chronicle = Chronicle(self._place.instance, run, self._place.worker_id, cancelled)
        self._place.at_work[work.task_id] = Piece(run.run_id)
        end: ChildEnd | None = None
        if work.sent_at and work.receive_count == 1:
            self._place.metrics.put({WAITED: max(0.0, time() - work.sent_at)}, Kind="run")
        stale = decision.is_stale(self._place.settings.dead_after_s)
        try:
            if not cancelled and not stale:
                end = await self._supervise(run, kind, work, cancelled, chronicle)
        except ChildStartFailed as error:
            # Not the run's fault: another worker, or this one later, may have better luck.
            logger.error("%s", error, extra={"run_id": run.run_id})  # noqa: TRY400 - our own text says it all
            await self._give_up(run, work, str(error))
            return
        finally:
            self._place.at_work.pop(work.task_id, None)
        if end is None and (cancelled.by_shutdown() or (stale and not cancelled)):
            await self._give_up(run, work, "the worker hung" if stale else "the worker shuts down", 0)
            return
        chronicle.tell_end(end)
        self._place.measure_end(end)
        cause = cancelled.cause if cancelled else None
        if end is not None and end.abandoned:
            cause = await self._cause_after_hanging(run, cause)
        await self._finalise(run, work, end, cause, chronicle)

    async def _cause_after_hanging(self, run: DagsterRun, cause: Cancellation | None) -> Cancellation:
        """This worker hung, and its child was stopped meanwhile: has another one taken over?"""
        place = self._place
        logger.warning("this worker hung; its run was interrupted", extra={"run_id": run.run_id})
        owner = await patiently(
            lambda: asyncio.to_thread(place.claims.owner, run.run_id, place.worker_id), doing="read the claims"
        )
        if owner is None or owner.worker_id != place.worker_id:
            return Cancellation(CancelKind.LEASE_LOST, "another worker has taken over")
        return cause or Cancellation(CancelKind.SHUTDOWN, "the worker hung")

    async def _give_up(self, run: DagsterRun, work: Running, why: str, delay_s: int | None = None) -> None:
        place = self._place
        await asyncio.to_thread(place.claims.release, run, place.worker_id, work.task_id, why)
        work.settle_as(Settlement.HAND_BACK, place.settings.visibility_timeout_seconds if delay_s is None else delay_s)

    async def _supervise(
        self, run: DagsterRun, kind: WorkKind, work: Running, cancelled: Cancelled, chronicle: Chronicle
    ) -> ChildEnd:
        place = self._place
        argument = {
            "kind": kind,
            "run_id": run.run_id,
            "instance_ref": core.serialize_value(place.instance.get_ref()),
        }
        spec = ChildSpec(
            target=RUN_TARGET,
            argument=argument,
            mark=work.task_id,
            # Without its worker a child must be gone before the next worker can receive the message.
            grace_s=min(place.grace_s(run), place.settings.dead_after_s),
            hung_after_s=place.settings.hung_after_s,
        )
        return await supervise(place.processes, spec, cancelled, chronicle, lambda: place.grace_now_s(run, cancelled))

    async def _finalise(
        self,
        run: DagsterRun,
        work: Running,
        end: ChildEnd | None,
        cancellation: Cancellation | None,
        chronicle: Chronicle | None = None,
    ) -> None:
        place = self._place

        def look() -> Conclusion:
            return examine(place.instance, run.run_id, end, cancellation, place.worker_id)

        async def write() -> Conclusion:
            # The events of the way stand before the final one; meanwhile look how it has to end.
            looking = asyncio.to_thread(look)
            conclusion, _ = await asyncio.gather(looking, chronicle.written() if chronicle else asyncio.sleep(0))
            await asyncio.to_thread(self._keep_reason, conclusion.run, cancellation)
            if conclusion.steps and conclusion.run is not None:
                shutting_down = cancellation is not None and cancellation.kind is CancelKind.SHUTDOWN
                await self._stop_steps(conclusion.run, conclusion.steps, patient=not shutting_down)
                conclusion = await asyncio.to_thread(look)
            if conclusion.cleanup.due and conclusion.run is not None:
                if not await clean_up(place, conclusion.run, work.task_id):
                    return replace(conclusion, settlement=Settlement.HAND_BACK)
                conclusion = await asyncio.to_thread(look)
                place.metrics.count(CLEANUPS, Outcome="failed" if conclusion.cleanup.failures else "succeeded")
            await asyncio.to_thread(conclude, place.instance, conclusion, end)
            return conclusion

        # The child is gone and the message still ours: nobody else can do this better, so not at once give up.
        conclusion = await patiently(write, doing="write the final state of a run", for_s=DATABASE_PATIENCE_S)
        if conclusion.settlement is Settlement.HAND_BACK:
            resumed = conclusion.verdict is Verdict.RESUMABLE
            why = "the run will be resumed" if resumed else "its cleanup goes on elsewhere"
            await self._give_up(run, work, f"interrupted; {why}", 0)
            return
        if cancellation is not None and cancellation.kind is CancelKind.REQUESTED:
            outcome = "cleanup failed" if conclusion.cleanup.failures else conclusion.verdict.name.lower()
            place.metrics.count(FINISHED, Outcome=outcome)
            place.metrics.put({TO_FINAL: max(0.0, time() - cancellation.received_at)})
        if conclusion.settlement is Settlement.LEAVE:
            await asyncio.to_thread(place.claims.release, run, place.worker_id, work.task_id, "the lease was lost")
        work.settle_as(conclusion.settlement)

    def _keep_reason(self, run: DagsterRun | None, cancellation: Cancellation | None) -> None:
        """What somebody said who only sent a cancel message. The launcher keeps what is said to it."""
        if run is None or cancellation is None or cancellation.channel is not CancelChannel.CANCEL_QUEUE:
            return
        if cancellation.reason and CANCEL_REASON_TAG not in run.tags:
            self._place.instance.add_run_tags(run.run_id, {CANCEL_REASON_TAG: cancellation.reason})

    async def _stop_steps(self, run: DagsterRun, steps: OpenSteps, *, patient: bool = True) -> None:
        """Before a run is final, its steps have stopped, wherever they work; for as long as that may take."""
        place = self._place
        patience_s = place.settings.steps_patience_s(place.grace_s(run)) if patient else 0
        began, told = time(), False
        while left := await asyncio.to_thread(self._still_at_work, steps):
            if not told:
                logger.info("stopping %d steps of run %s", len(left), run.run_id, extra={"run_id": run.run_id})
                await place.cancel_tasks(left)
                told = True
            waited_s = time() - began
            if waited_s >= patience_s:
                note = events.steps_not_stopped([steps.step_keys[task_id] for task_id in left], waited_s)
                await asyncio.to_thread(write_note, place.instance, run, note)
                return
            await asyncio.sleep(min(0.5, 0.05 + waited_s / 10))
            steps = await asyncio.to_thread(open_steps, place.instance, run.run_id)

    def _still_at_work(self, steps: OpenSteps) -> list[str]:
        """Task ids: of those whose worker lives, or has not been dead for long enough for its children to be gone."""
        alive = self._place.heartbeats_of_steps.alive(steps.workers.values())
        return [task_id for task_id, worker_id in steps.workers.items() if worker_id in alive]
