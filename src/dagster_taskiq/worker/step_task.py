"""The taskiq task that executes one step, from admit_run to the step's end. As `tasks`, but for steps.

How a step ends is written by its own process, as Dagster does it. What that process cannot say (it was killed, it
never began) is told here, and the run's executor, which follows the log, makes a failure or a retry of it.
"""

import asyncio
import logging
from time import time
from typing import Any

from dagster import DagsterRun
from taskiq import AsyncBroker

from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq._shield import shielded
from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.child.main import STEP_TARGET
from dagster_taskiq.dagster_compat.api import serialize_value
from dagster_taskiq.errors import ChildStartFailed, MessageUnreadable, PayloadUnavailable
from dagster_taskiq.messages import EXECUTE_STEP, StepMessage
from dagster_taskiq.metrics import WAITED
from dagster_taskiq.process.child_handle import ChildSpec
from dagster_taskiq.process.supervise import Cancelled, ChildEnd, supervise
from dagster_taskiq.sqs.s3_payloads import PayloadBucket
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.event_log import StepRef, append_event
from dagster_taskiq.tasks.running_task import RunningTask, current_work
from dagster_taskiq.worker.admission import Action, Candidate, Decision, admit_step, admit_step_again
from dagster_taskiq.worker.context import ActiveTask, WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.finalization import how_it_ended

logger = logging.getLogger(__name__)


class StepWork:
    """Sees work on steps through. `payloads`: where what is too large for a message is found, if anywhere."""

    def __init__(self, context: WorkerContext, payloads: PayloadBucket | None) -> None:
        self._context = context
        self._payloads = payloads

    def register(self, broker: AsyncBroker) -> None:
        """Make the task known to a worker's broker."""

        # Any argument is let in, to be refused in `work`: taskiq would drop a message whose arguments do not fit.
        async def execute_step(*_: Any, **arguments: Any) -> None:
            await self.work(arguments)

        broker.register_task(execute_step, EXECUTE_STEP)

    async def work(self, arguments: dict[str, Any]) -> None:
        """See one message through. The cancellation of the calling task becomes an event (`shielded`)."""
        work = current_work()
        try:
            order = StepMessage.from_kwargs(arguments)
            if order.task_id != work.task_id:
                raise MessageUnreadable("step message whose task id is not that of its step")  # noqa: TRY301
        except MessageUnreadable as error:
            if work.receive_count == 1:
                logger.warning("%s; it is left to expire", error, extra={"task_id": work.task_id})
            work.settle_as(Settlement.LEAVE)
            return
        cancelled = Cancelled(lambda: work.cancellation)
        name = f"execute_step {order.task_id}"
        await shielded(self._work(order, work, cancelled), name=name, on_cancel=cancelled.note)

    async def _work(self, order: StepMessage, work: RunningTask, cancelled: Cancelled) -> None:
        if cancelled.by_shutdown():
            work.settle_as(Settlement.HAND_BACK)
            return
        extra = {"run_id": order.run_id, "step_key": order.step_key, "task_id": order.task_id}
        try:
            decision = await self._claim(order, work, cancelled)
        except Exception:  # the database, above all: the message stays, and is tried again when it is visible again
            logger.exception("step could not be looked up; its message is handed back", extra=extra)
            work.settle_as(Settlement.HAND_BACK, self._context.settings.visibility_timeout_seconds)
            return
        if decision is not None and decision.run is not None:
            await self._carry_out(order, decision, decision.run, work, cancelled)

    async def _carry_out(
        self, order: StepMessage, decision: Decision, run: DagsterRun, work: RunningTask, cancelled: Cancelled
    ) -> None:
        extra = {"run_id": order.run_id, "step_key": order.step_key, "task_id": order.task_id}
        step = StepRef(order.step_key, order.task_id)
        writer = EventWriter(self._context.instance, run, self._context.worker_id, cancelled, step)
        end, why = None, "cancelled before it began"
        if work.sent_at and work.receive_count == 1:
            self._context.metrics.put({WAITED: max(0.0, time() - work.sent_at)}, Kind="step")
        self._context.active[order.task_id] = ActiveTask(order.run_id, order.step_key)
        try:
            if decision.is_stale(self._context.settings.dead_after_s):
                why = "its worker hung after it had claimed it"
            elif not cancelled:
                end = await self._supervise(order, run, cancelled, writer)
                why = how_it_ended(end, f"the process of step {order.step_key}")
        except ChildStartFailed as error:
            # Not the step's fault: another worker, or this one later, may have better luck.
            logger.error("%s", error, extra=extra)  # noqa: TRY400 - our own text says it all
            await self._give_up(run, step, work, str(error), self._context.settings.visibility_timeout_seconds)
            return
        except PayloadUnavailable as error:
            why = f"what the step has to know could not be read: {error}"
        except Exception as error:  # whatever it is, the run must not wait for a step that nobody works on
            logger.exception("step could not be carried out", extra=extra)
            why = f"it could not be carried out: {error!r}"
        finally:
            self._context.active.pop(order.task_id, None)
        if end is None and cancelled.by_shutdown():
            await self._give_up(run, step, work, "the worker shuts down", 0)
            return
        said = _said_how_it_ended(end)
        writer.record_end(end, said=said)
        self._context.measure_end(end)
        await writer.written()
        if not said:
            requested = bool(cancelled) and cancelled.cause.kind is CancelKind.REQUESTED
            await self._report_lost(run, step, why, retry=not requested)
        work.settle_as(Settlement.DELETE)
        await self._forget_payload(order)

    async def _claim(self, order: StepMessage, work: RunningTask, cancelled: Cancelled) -> Decision | None:
        """With the run, if its step is ours now. If it is not, says what becomes of the message."""
        context = self._context
        step = StepRef(order.step_key, order.task_id)
        candidate = Candidate("execute_step", order.run_id, order.task_id, context.worker_id, context.where)
        looked = work.receive_count == 1

        def look_and_claim() -> Decision:
            nonlocal looked
            had_before = None if looked else admit_step_again(context.claims, step, candidate)
            # From here on a claim of ours may be this one: a database that fails in between must not make us drop it.
            looked = True
            return had_before or admit_step(context.instance, context.claims, step, candidate)

        decision = await retry_async(
            lambda: asyncio.to_thread(look_and_claim),
            doing="look up a step",
            for_s=DATABASE_RETRY_S,
            until=cancelled.by_shutdown,
        )
        extra = {"run_id": order.run_id, "task_id": order.task_id, "why": decision.why}
        logger.info("step %s of run %s: %s", order.step_key, order.run_id, decision.action.value, extra=extra)
        if decision.action is Action.START:
            return decision
        handed_back = decision.action is Action.HAND_BACK
        work.settle_as(
            Settlement.HAND_BACK if handed_back else Settlement.DELETE, context.settings.visibility_timeout_seconds
        )
        return None

    async def _supervise(
        self, order: StepMessage, run: DagsterRun, cancelled: Cancelled, writer: EventWriter
    ) -> ChildEnd:
        context = self._context
        state = order.state
        if state is None:
            if self._payloads is None:
                raise PayloadUnavailable("it is in S3, and this worker has no payload_bucket in its settings")
            state = await self._payloads.get(order.task_id)
        argument = {
            "order": {**order.to_kwargs(), "state": state},
            "instance_ref": serialize_value(context.instance.get_ref()),
        }
        spec = ChildSpec(
            target=STEP_TARGET,
            argument=argument,
            mark=order.task_id,
            # Without its worker a child must be gone before the run's executor calls the step lost.
            grace_s=min(context.grace_s(run), context.settings.dead_after_s),
            hung_after_s=context.settings.hung_after_s,
        )
        return await supervise(context.processes, spec, cancelled, writer, lambda: context.grace_now_s(run, cancelled))

    async def _give_up(self, run: DagsterRun, step: StepRef, work: RunningTask, why: str, delay_s: int) -> None:
        context = self._context
        await asyncio.to_thread(context.claims.release, run, context.worker_id, step.task_id, why, step.step_key)
        work.settle_as(Settlement.HAND_BACK, delay_s)

    async def _report_lost(self, run: DagsterRun, step: StepRef, why: str, *, retry: bool) -> None:
        """The run must hear of it, or it would wait until it looks after the worker: so not at once give up."""
        context = self._context
        note = engine_events.step_lost(context.worker_id, step.task_id, why, retry=retry)
        await retry_async(
            lambda: asyncio.to_thread(append_event, context.instance, run, note, step.step_key),
            doing="tell how a step ended",
        )

    async def _forget_payload(self, order: StepMessage) -> None:
        if order.state is None and self._payloads is not None:
            try:
                await self._payloads.delete(order.task_id)
            except PayloadUnavailable as error:
                logger.warning("payload not deleted: %s", error)


def _said_how_it_ended(end: ChildEnd | None) -> bool:
    return end is not None and any("step_ended" in message for message in end.messages)
