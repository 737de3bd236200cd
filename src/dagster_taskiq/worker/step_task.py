"""The taskiq task that executes one step, from admission to the step's end. As `run_task`, but for steps.

How a step ends is written by its own process, as Dagster does it. What that process cannot write (it was killed, it
never began) is written here, and the run's executor, which follows the log, makes a failure or a retry of it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from dagster import DagsterRun
from taskiq import AsyncBroker

from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.child.main import STEP_TARGET
from dagster_taskiq.errors import MessageUnreadable, PayloadUnavailable
from dagster_taskiq.messages import EXECUTE_STEP, StepMessage, step_task_id
from dagster_taskiq.process.supervise import ChildEnd
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.sqs.s3_payloads import PayloadBucket
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.storage import step_events
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import StepRef, append_event, read_engine_events
from dagster_taskiq.tasks.running_task import RunningTask, current_task
from dagster_taskiq.worker.admission import Action, Candidate, Decision, admit_step, admit_step_again
from dagster_taskiq.worker.cleanup_task import LateSteps
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.finalization import how_it_ended
from dagster_taskiq.worker.run_child import ChildWork, NotStarted, run_child, see_through
from dagster_taskiq.worker.work_log import HANDED_BACK, WorkLog

logger = logging.getLogger(__name__)


class StepWork:
    """Carries out work on steps. `payloads`: where what is too large for a message is found, if anywhere."""

    def __init__(
        self,
        context: WorkerContext,
        payloads: PayloadBucket | None,
        route_of: Callable[[str], str] = lambda _: DEFAULT_ROUTE,
    ) -> None:
        """`route_of`: the route that a queue belongs to, by its URL."""
        self._context = context
        self._payloads = payloads
        self._route_of = route_of

    def register(self, broker: AsyncBroker) -> None:
        """Make the task known to a worker's broker."""

        # Any argument is let in, to be refused in `carry_out`: taskiq would drop a message whose arguments do not fit.
        async def execute_step(*_: Any, **arguments: Any) -> Settled:
            return await self.carry_out(arguments)

        broker.register_task(execute_step, EXECUTE_STEP)

    async def carry_out(self, arguments: dict[str, Any]) -> Settled:
        """See one message through; what is to become of it."""
        task = current_task()
        try:
            message = StepMessage.from_kwargs(arguments)
            if message.task_id != task.task_id:
                raise MessageUnreadable("step message whose task id is not that of its step")  # noqa: TRY301
        except MessageUnreadable as error:
            return task.unusable(str(error))
        return await see_through(self._carry_out(message, task), task.signal, name=f"execute_step {message.task_id}")

    async def _carry_out(self, message: StepMessage, task: RunningTask) -> Settled:
        if task.signal.is_shutdown:
            return Settled(Settlement.HAND_BACK)
        extra = {"run_id": message.run_id, "step_key": message.step_key, "task_id": message.task_id}
        try:
            decision = await self._admit(message, task)
        except Exception as error:  # the database, above all: the message stays, and is tried again later
            logger.exception("step could not be looked up; its message is handed back", extra=extra)
            return task.failing(f"step {message.step_key} of run {message.run_id}: {error!r}")
        if decision.action is not Action.START:  # of which `_execute` logs that it begins
            extra["reason"] = decision.why
            logger.info("step not started: %s", decision.action.value, extra=extra)
        if decision.action is Action.HAND_BACK:
            return self._context.hand_back_later()
        if decision.action in (Action.HAND_ON, Action.WAIT_FOR_CODE):
            waits = decision.action is Action.WAIT_FOR_CODE
            return Settled(
                Settlement.HAND_BACK, self._context.turns.after_s(task.task_id, task.receive_count, waits=waits)
            )
        if decision.action is Action.NO_CODE and decision.run is not None:
            return await self._fail(message, decision.run, self._ref(message, task), decision.why)
        if decision.action is not Action.START or decision.run is None:
            return Settled(Settlement.DELETE)
        return await self._execute(message, decision, decision.run, task)

    async def _admit(self, message: StepMessage, task: RunningTask) -> Decision:
        """See `admit_step`; patient with the database."""
        context = self._context
        step = self._ref(message, task)
        candidate = Candidate("execute_step", message.run_id, message.task_id, context.worker_id, context.where)
        looked = task.receive_count == 1

        def look_and_claim() -> Decision:
            nonlocal looked
            had_before = (
                None
                if looked
                else admit_step_again(
                    context.instance, context.step_claims, context.heartbeats_of_steps, step, candidate
                )
            )
            if had_before is not None and had_before.action is Action.LOOK_AGAIN:
                return had_before
            if had_before is None and not self._is_to_begin_again(message):
                return Decision(Action.DROP, f"the run has not asked for try {message.interruption} of that attempt")
            # From here on a claim of ours may be this one: a database that fails in between must not make us drop it.
            looked = True
            return had_before or admit_step(context.instance, context.step_claims, step, candidate, context.find_code)

        while True:
            try:
                decision = await retry_async(
                    lambda: context.lane.call(look_and_claim),
                    doing="look up a step",
                    for_s=DATABASE_RETRY_S,
                    until=lambda: task.signal.is_shutdown,
                )
            except Exception:
                if looked:  # a claim of ours would keep everybody, this worker included, from ever beginning it
                    await self._release_unbegun(message.run_id, step)
                raise
            if decision.action is not Action.LOOK_AGAIN:
                return decision
            if task.signal.is_shutdown:
                return Decision(Action.HAND_BACK, "the worker shuts down")
            await asyncio.sleep(context.heartbeats_of_steps.confirm_s)

    def _is_to_begin_again(self, message: StepMessage) -> bool:
        """Whether an attempt that was interrupted may begin again: the run's log says so, before its message is sent.

        Or else whoever writes to the queue could have a step work twice at the same time.
        """
        if not message.interruption:
            return True
        run_id, step_key = message.run_id, message.step_key
        before = StepRef(step_key, step_task_id(run_id, step_key, message.attempt, message.interruption - 1))
        notes = read_engine_events(self._context.instance, run_id, before)
        return any(stage is Stage.STEP_INTERRUPTED for stage, _ in notes)

    def _ref(self, message: StepMessage, task: RunningTask) -> StepRef:
        return StepRef(message.step_key, message.task_id, self._route_of(task.queue_url))

    async def _release_unbegun(self, run_id: str, step: StepRef) -> None:
        context = self._context

        def release() -> None:
            run = context.instance.get_run_by_id(run_id)
            if run is not None:
                context.step_claims.release(run, step, context.worker_id, "it could not be carried out here")

        try:
            await context.through_outages(release, "release a claim", at_least_s=0)
        except Exception:
            logger.exception("a claim could not be released", extra={"run_id": run_id, "task_id": step.task_id})

    async def _execute(self, message: StepMessage, decision: Decision, run: DagsterRun, task: RunningTask) -> Settled:
        context, signal, step = self._context, task.signal, self._ref(message, task)
        writer = EventWriter(context.instance, run, context.worker_id, signal, step, lane=context.lane)
        context.measure_wait(task, "step")
        log = WorkLog(run, context.worker_id, step_key=message.step_key)
        end, why = None, "its worker hung after it had claimed it"
        if not decision.is_stale(context.settings.dead_after_s):
            with context.working_on(message.task_id, message.run_id, step):
                end, why = await self._run_child(message, run, task, writer)
        if isinstance(end, NotStarted) or (end is None and signal.is_shutdown):
            why, delay_s = (end.why, end.delay_s) if end is not None else ("the worker shuts down", 0)
            log.ended(HANDED_BACK, why)
            return await context.give_up(run, why, delay_s=delay_s, step=step)
        # Before the event that it is over: the run may be final, and its claims deleted, as soon as that is read.
        await self._end_claim(run.run_id, step)
        said = [one["step_ended"] for one in (end.messages if end is not None else ()) if "step_ended" in one]
        reported = bool(said)
        writer.record_end(end, reported=reported)
        if end is not None:
            context.measure_end(end)
        await writer.written()
        if not reported:
            over = signal.cancellation is not None and signal.cancellation.kind.ends_the_work
            if signal.is_shutdown:
                why = self._why_interrupted(signal, end)
            await self._report_lost(run, message, why, may_retry=not over, interrupted=signal.is_shutdown)
        log.ended(str(said[-1]).removeprefix("STEP_") if said else "lost", None if said else why)
        await self._forget_payload(message)
        return Settled(Settlement.DELETE)

    def _why_interrupted(self, signal: CancelSignal, end: ChildEnd | None) -> str:
        cause = signal.cancellation.cause if signal.cancellation is not None else None
        killed = ", and the step's process had to be killed" if end is not None and end.kill_at is not None else ""
        return f"{cause or 'the worker stops'} (worker {self._context.worker_id}){killed}"

    async def _fail(self, message: StepMessage, run: DagsterRun, step: StepRef, why: str) -> Settled:
        """It is not begun, here or elsewhere; its retries would end in the same way."""
        await self._end_claim(run.run_id, step)
        await self._report_lost(run, message, why, may_retry=False)
        await self._forget_payload(message)
        return Settled(Settlement.DELETE)

    async def _end_claim(self, run_id: str, step: StepRef) -> None:
        context = self._context
        await retry_async(
            lambda: context.lane.call(context.step_claims.end, run_id, step, context.worker_id),
            doing="write that a step is over",
        )

    async def _run_child(
        self, message: StepMessage, run: DagsterRun, task: RunningTask, writer: EventWriter
    ) -> tuple[ChildEnd | NotStarted | None, str]:
        """How the step's process ended, and the same in words."""
        context, end = self._context, None
        try:
            if not task.signal.is_set:
                work = ChildWork(
                    target=STEP_TARGET,
                    argument={"message": {**message.to_kwargs(), "state": await self._state(message)}},
                    task_id=message.task_id,
                    grace_s=lambda cancellation: context.grace_s(run, cancellation),
                    exit_patience_s=context.settings.exit_patience_seconds,
                    is_one_step=True,
                )
                steps = LateSteps(context, run, message.task_id, writer)
                end = await run_child(context, work, task.signal, writer, steps)
        except PayloadUnavailable as error:
            return None, f"what the step has to know could not be read: {error}"
        except Exception as error:  # whatever it is, the run must not wait for a step that nobody works on
            extra = {"run_id": message.run_id, "step_key": message.step_key, "task_id": message.task_id}
            logger.exception("step could not be carried out", extra=extra)
            return None, f"it could not be carried out: {error!r}"
        if isinstance(end, ChildEnd):
            return end, how_it_ended(end, f"the process of step {message.step_key}")
        return end, "cancelled before it began"

    async def _state(self, message: StepMessage) -> str:
        """What the step's process has to know of the other steps. Raises `PayloadUnavailable`."""
        if message.state is not None:
            return message.state
        if self._payloads is None:
            raise PayloadUnavailable("it is in S3, and this worker has no payload_bucket in its settings")
        return await self._payloads.get(message.task_id)

    async def _report_lost(
        self, run: DagsterRun, message: StepMessage, why: str, *, may_retry: bool, interrupted: bool = False
    ) -> None:
        """The run must learn of it, or it would wait until it looks after the worker: so not at once give up."""
        context = self._context
        event = step_events.step_lost(context.worker_id, message.task_id, why, retry=may_retry, interrupted=interrupted)
        await retry_async(
            lambda: context.lane.call(append_event, context.instance, run, event, message.step_key),
            doing="report how a step ended",
        )

    async def _forget_payload(self, message: StepMessage) -> None:
        if message.state is None and self._payloads is not None:
            try:
                await self._payloads.delete(message.task_id)
            except PayloadUnavailable as error:
                logger.warning("payload not deleted: %s", error)
