"""The taskiq tasks for runs: what a work message asks for, from admission to the run's final state.

Knows Dagster's runs through `admission` and `finalize_run`, children through `run_child`; not SQS. What becomes of the
message is what each function returns.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dagster import DagsterRun
from taskiq import AsyncBroker

from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.child.main import RUN_TARGET
from dagster_taskiq.dagster_compat.api import RESUME_RUN_LOG_MESSAGE
from dagster_taskiq.messages import EXECUTE_RUN, RESUME_RUN, is_run_id
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.storage.claims import ClaimState
from dagster_taskiq.storage.engine_events import run_interrupted
from dagster_taskiq.storage.event_log import append_event, interruptions_of_run
from dagster_taskiq.storage.queue_ttl import end_of_waiting
from dagster_taskiq.storage.stops import stored_stop
from dagster_taskiq.storage.tags import TASK_ID_TAG, own_tags
from dagster_taskiq.storage.unstarted import end_unstarted
from dagster_taskiq.tasks.running_task import RunningTask, current_task
from dagster_taskiq.worker.admission import Action, Candidate, Decision, WorkKind, admit_run
from dagster_taskiq.worker.claim_watch import TAKEN_OVER
from dagster_taskiq.worker.cleanup_task import LateSteps
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.finalization import fail
from dagster_taskiq.worker.finalize_run import finalize_run, stop_steps
from dagster_taskiq.worker.run_child import ChildWork, NotStarted, run_child, see_through
from dagster_taskiq.worker.run_deadline import within_its_time
from dagster_taskiq.worker.work_log import HANDED_BACK, WorkLog

logger = logging.getLogger(__name__)


class RunWork:
    """Carries out work on runs."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def register(self, broker: AsyncBroker) -> None:
        """Make the tasks known to a worker's broker."""

        # Any argument is let in, to be refused in `carry_out`: taskiq would drop a message whose arguments do not fit.
        async def execute_run(run_id: Any = None, *_: Any, **__: Any) -> Settled:
            return await self.carry_out("execute_run", run_id)

        async def resume_run(run_id: Any = None, *_: Any, **__: Any) -> Settled:
            return await self.carry_out("resume_run", run_id)

        broker.register_task(execute_run, EXECUTE_RUN)
        broker.register_task(resume_run, RESUME_RUN)

    async def carry_out(self, kind: WorkKind, run_id: object, *, elsewhere: str | None = None) -> Settled:
        """See one message through; what is to become of it. `elsewhere`: why no process may be begun for it here."""
        task = current_task()
        if not is_run_id(run_id):
            return task.unusable("work message names no run")
        candidate = Candidate(kind, run_id, task.task_id, self._context.worker_id, self._context.where, elsewhere)
        return await see_through(self._carry_out(candidate, task), task.signal, name=f"{kind} {run_id}")

    async def _carry_out(self, candidate: Candidate, task: RunningTask) -> Settled:
        if task.signal.is_shutdown:
            return Settled(Settlement.HAND_BACK)
        try:
            if not await self._end_older_work(candidate):
                return Settled(Settlement.DELETE)
            with self._working_on(candidate.run_id, task):
                decision = await self._admit(candidate, task.signal)
                return await self._follow(decision, candidate, task)
        except Exception as error:  # the database, above all: the message stays, and is tried again later
            why = f"run {candidate.run_id}: {error!r}"
            extra = {"run_id": candidate.run_id, "task_id": task.task_id}
            logger.exception("work could not be carried out; its message is handed back", extra=extra)
            try:  # or else our claim keeps the others from it for as long as we live
                await self._context.through_outages(lambda: self._release(candidate), "release a claim", at_least_s=0)
            except Exception:
                logger.exception("a claim could not be released", extra=extra)
            return task.failing(why)

    @contextmanager
    def _working_on(self, run_id: str, task: RunningTask) -> Iterator[None]:
        """One task of this worker works on a run at a time."""
        ended = asyncio.Event()
        self._context.at_work[run_id] = task, ended
        try:
            yield
        finally:
            del self._context.at_work[run_id]
            ended.set()

    async def _end_older_work(self, candidate: Candidate) -> bool:
        """Stop what this worker does for the run under an older task id, because the run was resumed under a new one.

        Returns when its child is gone. False: it is this message that is worthless.
        """
        context = self._context
        while (older := context.at_work.get(candidate.run_id)) is not None:
            run = await context.lane.call(context.instance.get_run_by_id, candidate.run_id)
            if run is None or own_tags(run).get(TASK_ID_TAG) != candidate.task_id:
                return False
            task, ended = older
            extra = {"run_id": candidate.run_id, "task_id": task.task_id}
            logger.warning("the run was resumed, and its process still runs here; stopping that first", extra=extra)
            task.cancel(Cancellation(CancelKind.LEASE_LOST, cause="the run was resumed as another task"))
            await ended.wait()
        return True

    async def _admit(self, candidate: Candidate, signal: CancelSignal) -> Decision:
        """See `admit_run`; patient with the database, and with a worker of which it is not known if it is dead."""
        claims = self._context.claims
        while True:
            decision = await retry_async(
                lambda: self._context.lane.call(
                    admit_run,
                    self._context.instance,
                    claims,
                    candidate,
                    self._context.held(),
                    self._context.find_code,
                ),
                doing="look up a run",
                for_s=DATABASE_RETRY_S,
                until=lambda: signal.is_shutdown,
            )
            if decision.action is not Action.LOOK_AGAIN:
                return decision
            if signal.is_shutdown:
                return Decision(Action.HAND_BACK, "the worker shuts down")
            await asyncio.sleep(claims.heartbeats.confirm_s)

    def _release(self, candidate: Candidate) -> None:
        context = self._context
        run = context.instance.get_run_by_id(candidate.run_id)
        # As it is stored: the answer to a claim may have been lost.
        claim = context.claims.read([candidate.run_id]).get(candidate.run_id)
        if claim is None or claim.worker_id != candidate.worker_id:
            context.claims.disown(candidate.run_id)
        elif (claim.task_id, claim.state) != (candidate.task_id, ClaimState.HELD):
            return  # that of older work on the run, which goes on here
        elif run is None:
            context.claims.forget(candidate.run_id)
        else:
            context.claims.release(run, "it could not be carried out here", claim)

    async def _follow(self, decision: Decision, candidate: Candidate, task: RunningTask) -> Settled:
        context, run = self._context, decision.run
        if decision.action not in (Action.START, Action.RESUME):  # of these two `_execute` logs that they begin
            logger.info("run not started: %s", decision.action.value, extra=_about(candidate, decision))
        if decision.action is Action.HAND_BACK:
            # While the fleet is held nobody receives it: it is to be there when that ends.
            return Settled(Settlement.HAND_BACK) if context.held() else context.hand_back_later()
        if decision.action in (Action.HAND_ON, Action.WAIT_FOR_CODE):
            waits = decision.action is Action.WAIT_FOR_CODE
            return Settled(Settlement.HAND_BACK, context.turns.after_s(task.task_id, task.receive_count, waits=waits))
        if decision.action is Action.DROP or run is None:
            return Settled(Settlement.DELETE)
        if decision.action is Action.EXPIRE:
            return await self._expire(run, decision.why)
        if decision.action in (Action.FAIL, Action.NO_CODE):
            await stop_steps(context, run)
            if await context.lane.call(fail, context.instance, context.claims, run.run_id, decision.why):
                forget = context.forget_claims
                await context.through_outages(lambda: forget(run.run_id), "delete the claims on a run that is final")
                return Settled(Settlement.DELETE)
            return await finalize_run(context, run, task.task_id, None, None)  # it was stopped meanwhile, or is over
        if decision.action is Action.FINISH_CANCELLATION:
            return await self._finish(run, task, decision.why)
        kind: WorkKind = "resume_run" if decision.action is Action.RESUME else "execute_run"
        if kind == "resume_run" and candidate.kind == "execute_run":
            await context.lane.call(self._announce_interruption, run, decision.why)
        return await self._execute(run, kind, task, decision)

    async def _finish(self, run: DagsterRun, task: RunningTask, why: str) -> Settled:
        """Nobody works on it any more: it was stopped, because somebody has asked for it, or for its time limit."""
        stop = await self._context.lane.call(stored_stop, self._context.instance, run)
        stop = replace(stop or Cancellation(CancelKind.REQUESTED), cause=why)
        return await finalize_run(self._context, run, task.task_id, None, stop)

    def _announce_interruption(self, run: DagsterRun, why: str) -> None:
        instance, most = self._context.instance, self._context.settings.max_interruptions
        if most == 0:
            # As the run monitoring daemon would announce it: by this event Dagster counts the attempts.
            instance.report_engine_event(RESUME_RUN_LOG_MESSAGE, run)
        else:
            append_event(instance, run, run_interrupted(why, interruptions_of_run(instance, run.run_id) + 1, most))

    async def _expire(self, run: DagsterRun, why: str) -> Settled:
        """It is claimed here, so that nobody else begins with it."""
        context, end = self._context, end_of_waiting(self._context.settings, why)

        def write() -> None:
            if context.claims.holds(run.run_id):  # or else another worker has begun with it, while this one hung
                end_unstarted(context.instance, run.run_id, end)
                context.forget_claims(run.run_id)

        await context.through_outages(write, "end a run that has waited too long")
        return Settled(Settlement.DELETE)

    async def _execute(self, run: DagsterRun, kind: WorkKind, task: RunningTask, decision: Decision) -> Settled:
        context = self._context
        context.measure_wait(task, "run")
        log = WorkLog(run, context.worker_id, why=decision.why, again=kind == "resume_run")
        if decision.is_stale(context.settings.dead_after_s) and not task.signal.is_set:
            log.ended(HANDED_BACK, "the worker hung")
            return await context.give_up(run, "the worker hung", delay_s=0)
        # Since it was admitted; from here on it counts as at work, and goes on.
        if (held := context.held()) is not None and not task.signal.is_set:
            log.ended(HANDED_BACK, held)
            return await context.give_up(run, held, delay_s=0)
        writer = EventWriter(context.instance, run, context.worker_id, task.signal, lane=context.lane)
        work = ChildWork(
            target=RUN_TARGET,
            argument={"kind": kind, "run_id": run.run_id},
            task_id=task.task_id,
            grace_s=lambda cancellation: context.grace_s(run, cancellation),
            exit_patience_s=context.settings.exit_patience_seconds,
        )
        with context.working_on(task.task_id, run.run_id):
            steps = LateSteps(context, run, task.task_id, writer)
            async with within_its_time(context, run, task, is_new=kind == "execute_run"):
                end = await run_child(context, work, task.signal, writer, steps)
        if isinstance(end, NotStarted):
            log.ended(HANDED_BACK, end.why)
            return await context.give_up(run, end.why, delay_s=end.delay_s)
        writer.record_end(end)
        cancellation = task.signal.cancellation
        if end is not None:
            context.measure_end(end)
            if end.abandoned:
                cancellation = await self._why_abandoned(run, cancellation)
        return await finalize_run(context, run, task.task_id, end, cancellation, writer, log)

    async def _why_abandoned(self, run: DagsterRun, cancellation: Cancellation | None) -> Cancellation:
        """This worker hung, and its child was stopped meanwhile: has another one taken over?"""
        context = self._context
        logger.warning("this worker hung; its run was interrupted", extra={"run_id": run.run_id})
        ours = await retry_async(lambda: context.lane.call(context.claims.holds, run.run_id), doing="read the claims")
        if not ours:
            return Cancellation(CancelKind.LEASE_LOST, cause=TAKEN_OVER)
        return cancellation or Cancellation(CancelKind.SHUTDOWN, cause="the worker hung")


def _about(candidate: Candidate, decision: Decision) -> dict[str, str]:
    job = {"job": decision.run.job_name} if decision.run is not None else {}
    return {**job, "run_id": candidate.run_id, "task_id": candidate.task_id, "reason": decision.why}
