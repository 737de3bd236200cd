"""The taskiq task that executes one step, from preflight to the step's end. As `tasks`, but for steps.

How a step ends is written by its own process, as Dagster does it. What that process cannot say (it was killed, it
never began) is told here, and the run's executor, which follows the log, makes a failure or a retry of it.
"""

import asyncio
import logging
from time import time
from typing import Any, Final

from dagster import DagsterRun
from taskiq import AsyncBroker

from dagster_taskiq import dagster_internals as core
from dagster_taskiq import events
from dagster_taskiq.cancellable_receiver import Running, current_work
from dagster_taskiq.cancellation import CancelKind
from dagster_taskiq.child import STEP_TARGET
from dagster_taskiq.chronicle import Chronicle
from dagster_taskiq.claims import StepRef, write_note
from dagster_taskiq.errors import ChildStartFailed, MessageUnreadable, PayloadUnavailable
from dagster_taskiq.finalise import how_it_ended
from dagster_taskiq.messages import StepOrder
from dagster_taskiq.metrics import WAITED
from dagster_taskiq.patience import DATABASE_PATIENCE_S, patiently
from dagster_taskiq.payload_bucket import PayloadBucket
from dagster_taskiq.preflight import Action, Candidate, Decision, preflight_step, preflight_step_again
from dagster_taskiq.process import ChildSpec
from dagster_taskiq.settlement import Settlement
from dagster_taskiq.supervisor import Cancelled, ChildEnd, supervise
from dagster_taskiq.to_the_end import to_the_end
from dagster_taskiq.workplace import Piece, Workplace

logger = logging.getLogger(__name__)

EXECUTE_STEP: Final = "dagster_taskiq.execute_step"


class StepWork:
    """Sees work on steps through. `payloads`: where what is too large for a message is found, if anywhere."""

    def __init__(self, place: Workplace, payloads: PayloadBucket | None) -> None:
        self._place = place
        self._payloads = payloads

    def register(self, broker: AsyncBroker) -> None:
        """Make the task known to a worker's broker."""

        # Any argument is let in, to be refused in `work`: taskiq would drop a message whose arguments do not fit.
        async def execute_step(*_: Any, **arguments: Any) -> None:
            await self.work(arguments)

        broker.register_task(execute_step, EXECUTE_STEP)

    async def work(self, arguments: dict[str, Any]) -> None:
        """See one message through. The cancellation of the calling task becomes an event (`to_the_end`)."""
        work = current_work()
        try:
            order = StepOrder.from_kwargs(arguments)
            if order.task_id != work.task_id:
                raise MessageUnreadable("step message whose task id is not that of its step")  # noqa: TRY301
        except MessageUnreadable as error:
            if work.receive_count == 1:
                logger.warning("%s; it is left to expire", error, extra={"task_id": work.task_id})
            work.settle_as(Settlement.LEAVE)
            return
        cancelled = Cancelled(lambda: work.cancellation)
        name = f"execute_step {order.task_id}"
        await to_the_end(self._work(order, work, cancelled), name=name, on_cancel=cancelled.note)

    async def _work(self, order: StepOrder, work: Running, cancelled: Cancelled) -> None:
        if cancelled.by_shutdown():
            work.settle_as(Settlement.HAND_BACK)
            return
        extra = {"run_id": order.run_id, "step_key": order.step_key, "task_id": order.task_id}
        try:
            decision = await self._claim(order, work, cancelled)
        except Exception:  # the database, above all: the message stays, and is tried again when it is visible again
            logger.exception("step could not be looked up; its message is handed back", extra=extra)
            work.settle_as(Settlement.HAND_BACK, self._place.settings.visibility_timeout_seconds)
            return
        if decision is not None and decision.run is not None:
            await self._carry_out(order, decision, decision.run, work, cancelled)

    async def _carry_out(
        self, order: StepOrder, decision: Decision, run: DagsterRun, work: Running, cancelled: Cancelled
    ) -> None:
        extra = {"run_id": order.run_id, "step_key": order.step_key, "task_id": order.task_id}
        step = StepRef(order.step_key, order.task_id)
        chronicle = Chronicle(self._place.instance, run, self._place.worker_id, cancelled, step)
        end, why = None, "cancelled before it began"
        if work.sent_at and work.receive_count == 1:
            self._place.metrics.put({WAITED: max(0.0, time() - work.sent_at)}, Kind="step")
        self._place.at_work[order.task_id] = Piece(order.run_id, order.step_key)
        try:
            if decision.is_stale(self._place.settings.dead_after_s):
                why = "its worker hung after it had claimed it"
            elif not cancelled:
                end = await self._supervise(order, run, cancelled, chronicle)
                why = how_it_ended(end, f"the process of step {order.step_key}")
        except ChildStartFailed as error:
            # Not the step's fault: another worker, or this one later, may have better luck.
            logger.error("%s", error, extra=extra)  # noqa: TRY400 - our own text says it all
            await self._give_up(run, step, work, str(error), self._place.settings.visibility_timeout_seconds)
            return
        except PayloadUnavailable as error:
            why = f"what the step has to know could not be read: {error}"
        except Exception as error:  # whatever it is, the run must not wait for a step that nobody works on
            logger.exception("step could not be carried out", extra=extra)
            why = f"it could not be carried out: {error!r}"
        finally:
            self._place.at_work.pop(order.task_id, None)
        if end is None and cancelled.by_shutdown():
            await self._give_up(run, step, work, "the worker shuts down", 0)
            return
        said = _said_how_it_ended(end)
        chronicle.tell_end(end, said=said)
        self._place.measure_end(end)
        await chronicle.written()
        if not said:
            requested = bool(cancelled) and cancelled.cause.kind is CancelKind.REQUESTED
            await self._tell_lost(run, step, why, retry=not requested)
        work.settle_as(Settlement.DELETE)
        await self._forget_payload(order)

    async def _claim(self, order: StepOrder, work: Running, cancelled: Cancelled) -> Decision | None:
        """With the run, if its step is ours now. If it is not, says what becomes of the message."""
        place = self._place
        step = StepRef(order.step_key, order.task_id)
        candidate = Candidate("execute_step", order.run_id, order.task_id, place.worker_id, place.where)
        looked = work.receive_count == 1

        def look_and_claim() -> Decision:
            nonlocal looked
            had_before = None if looked else preflight_step_again(place.claims, step, candidate)
            # From here on a claim of ours may be this one: a database that fails in between must not make us drop it.
            looked = True
            return had_before or preflight_step(place.instance, place.claims, step, candidate)

        decision = await patiently(
            lambda: asyncio.to_thread(look_and_claim),
            doing="look up a step",
            for_s=DATABASE_PATIENCE_S,
            until=cancelled.by_shutdown,
        )
        extra = {"run_id": order.run_id, "task_id": order.task_id, "why": decision.why}
        logger.info("step %s of run %s: %s", order.step_key, order.run_id, decision.action.value, extra=extra)
        if decision.action is Action.START:
            return decision
        handed_back = decision.action is Action.HAND_BACK
        work.settle_as(
            Settlement.HAND_BACK if handed_back else Settlement.DELETE, place.settings.visibility_timeout_seconds
        )
        return None

    async def _supervise(
        self, order: StepOrder, run: DagsterRun, cancelled: Cancelled, chronicle: Chronicle
    ) -> ChildEnd:
        place = self._place
        state = order.state
        if state is None:
            if self._payloads is None:
                raise PayloadUnavailable("it is in S3, and this worker has no payload_bucket in its settings")
            state = await self._payloads.get(order.task_id)
        argument = {
            "order": {**order.to_kwargs(), "state": state},
            "instance_ref": core.serialize_value(place.instance.get_ref()),
        }
        spec = ChildSpec(
            target=STEP_TARGET,
            argument=argument,
            mark=order.task_id,
            # Without its worker a child must be gone before the run's executor calls the step lost.
            grace_s=min(place.grace_s(run), place.settings.dead_after_s),
            hung_after_s=place.settings.hung_after_s,
        )
        return await supervise(place.processes, spec, cancelled, chronicle, lambda: place.grace_now_s(run, cancelled))

    async def _give_up(self, run: DagsterRun, step: StepRef, work: Running, why: str, delay_s: int) -> None:
        place = self._place
        await asyncio.to_thread(place.claims.release, run, place.worker_id, step.task_id, why, step.step_key)
        work.settle_as(Settlement.HAND_BACK, delay_s)

    async def _tell_lost(self, run: DagsterRun, step: StepRef, why: str, *, retry: bool) -> None:
        """The run must hear of it, or it would wait until it looks after the worker: so not at once give up."""
        place = self._place
        note = events.step_lost(place.worker_id, step.task_id, why, retry=retry)
        await patiently(
            lambda: asyncio.to_thread(write_note, place.instance, run, note, step.step_key),
            doing="tell how a step ended",
        )

    async def _forget_payload(self, order: StepOrder) -> None:
        if order.state is None and self._payloads is not None:
            try:
                await self._payloads.delete(order.task_id)
            except PayloadUnavailable as error:
                logger.warning("payload not deleted: %s", error)


def _said_how_it_ended(end: ChildEnd | None) -> bool:
    return end is not None and any("step_ended" in message for message in end.messages)
