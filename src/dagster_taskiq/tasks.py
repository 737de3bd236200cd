"""The taskiq tasks of this package: what a work message asks for, from preflight to the run's final state.

Each task supervises one child. Knows Dagster's runs through `preflight` and `finalise`, children through
`supervisor`, and the message through `current_work`; not SQS.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from time import time
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun
from taskiq import AsyncBroker

from dagster_taskiq import dagster_internals as core
from dagster_taskiq import events
from dagster_taskiq.cancellable_receiver import Running, current_work
from dagster_taskiq.cancellation import CancelKind, Cancellation
from dagster_taskiq.child import RUN_TARGET
from dagster_taskiq.claims import Claims, write_note
from dagster_taskiq.errors import ChildStartFailed, SettingsError
from dagster_taskiq.finalise import conclude, examine
from dagster_taskiq.messages import is_run_id
from dagster_taskiq.outage import Outage
from dagster_taskiq.preflight import Candidate, Decision, Step, WorkKind, preflight
from dagster_taskiq.process import ChildSpec
from dagster_taskiq.settings import Settings, grace_from_tag
from dagster_taskiq.settlement import Settlement
from dagster_taskiq.supervisor import Cancelled, ChildEnd, Processes, supervise
from dagster_taskiq.tags import GRACE_SECONDS_TAG
from dagster_taskiq.to_the_end import to_the_end

logger = logging.getLogger(__name__)

EXECUTE_RUN: Final = "dagster_taskiq.execute_run"
RESUME_RUN: Final = "dagster_taskiq.resume_run"
_FINAL_STATE_TRIES: Final = 10  # about a minute


@dataclass(slots=True)
class RunWork:
    """Everything that work on runs needs; one per worker."""

    instance: DagsterInstance
    settings: Settings
    claims: Claims
    processes: Processes
    worker_id: str
    where: str
    watched: dict[str, str] = field(default_factory=dict)
    """Task id to run id, of the work that has passed its preflight: what the status watch looks at."""

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
        if cancelled and cancelled.cause.kind is CancelKind.SHUTDOWN:
            work.settle_as(Settlement.HAND_BACK)
            return
        candidate = Candidate(kind, run_id, work.task_id, self.worker_id, self.where)
        try:
            decision = await asyncio.to_thread(preflight, self.instance, self.claims, candidate)
            await self._carry_out(decision, candidate, work, cancelled)
        except Exception:  # the database, above all: the message stays, and is tried again when it is visible again
            extra = {"run_id": run_id, "task_id": work.task_id}
            logger.exception("work could not be carried out; its message is handed back", extra=extra)
            work.settle_as(Settlement.HAND_BACK, self.settings.visibility_timeout_seconds)
            with suppress(Exception):  # or else our claim keeps the others from it for as long as we live
                await asyncio.to_thread(self._release, candidate)

    def _release(self, candidate: Candidate) -> None:
        run = self.instance.get_run_by_id(candidate.run_id)
        if run is not None:
            self.claims.release(run, self.worker_id, candidate.task_id, "it could not be carried out here")

    async def _carry_out(self, decision: Decision, candidate: Candidate, work: Running, cancelled: Cancelled) -> None:
        extra = {"run_id": candidate.run_id, "task_id": candidate.task_id, "why": decision.why}
        logger.info("run %s: %s", candidate.run_id, decision.step.value, extra=extra)
        run = decision.run
        if decision.step is Step.HAND_BACK:
            work.settle_as(Settlement.HAND_BACK, self.settings.visibility_timeout_seconds)
        elif decision.step is Step.DROP or run is None:
            work.settle_as(Settlement.DELETE)
        elif decision.step is Step.FAIL:
            failure = core.unexpected_termination()
            await asyncio.to_thread(self.instance.report_run_failed, run, decision.why, failure)
            work.settle_as(Settlement.DELETE)
        elif decision.step is Step.FINISH_CANCELLATION:
            requested = Cancellation(CancelKind.REQUESTED, decision.why)
            await self._finalise(run, work, None, requested)
        else:
            await self._run(run, decision.step, candidate, work, cancelled)

    async def _run(
        self, run: DagsterRun, step: Step, candidate: Candidate, work: Running, cancelled: Cancelled
    ) -> None:
        kind: WorkKind = "resume_run" if step is Step.RESUME else "execute_run"
        if kind == "resume_run" and candidate.kind == "execute_run":
            # As the run monitoring daemon would announce it: by this event Dagster counts the attempts.
            await asyncio.to_thread(self.instance.report_engine_event, core.RESUME_RUN_LOG_MESSAGE, run)
        chronicle = _Chronicle(self.instance, run, self.worker_id, cancelled)
        self.watched[work.task_id] = run.run_id
        end: ChildEnd | None = None
        try:
            if not cancelled:
                end = await self._supervise(run, kind, work, cancelled, chronicle)
        except ChildStartFailed as error:
            # Not the run's fault: another worker, or this one later, may have better luck.
            logger.error("%s", error, extra={"run_id": run.run_id})  # noqa: TRY400 - our own text says it all
            await self._give_up(run, work, str(error))
            return
        finally:
            self.watched.pop(work.task_id, None)
        if end is None and cancelled.cause.kind is CancelKind.SHUTDOWN:
            await self._give_up(run, work, "the worker shuts down", 0)
            return
        chronicle.tell_end(end)
        await self._finalise(run, work, end, cancelled.cause if cancelled else None, chronicle)

    async def _give_up(self, run: DagsterRun, work: Running, why: str, delay_s: int | None = None) -> None:
        await asyncio.to_thread(self.claims.release, run, self.worker_id, work.task_id, why)
        work.settle_as(Settlement.HAND_BACK, self.settings.visibility_timeout_seconds if delay_s is None else delay_s)

    async def _supervise(
        self, run: DagsterRun, kind: WorkKind, work: Running, cancelled: Cancelled, chronicle: "_Chronicle"
    ) -> ChildEnd:
        grace_s = _grace(run, self.settings.grace_seconds)

        def grace_now() -> float:
            shutting_down = cancelled.cause.kind is CancelKind.SHUTDOWN
            return min(grace_s, self.settings.shutdown_grace_s) if shutting_down else grace_s

        argument = {
            "kind": kind,
            "run_id": run.run_id,
            "instance_ref": core.serialize_value(self.instance.get_ref()),
        }
        spec = ChildSpec(
            target=RUN_TARGET,
            argument=argument,
            mark=work.task_id,
            # Without its worker a child must be gone before the next worker can receive the message.
            grace_s=min(grace_s, self.settings.dead_after_s),
        )
        return await supervise(self.processes, spec, cancelled, chronicle, grace_now)

    async def _finalise(
        self,
        run: DagsterRun,
        work: Running,
        end: ChildEnd | None,
        cancellation: Cancellation | None,
        chronicle: "_Chronicle | None" = None,
    ) -> None:
        outage = Outage("write the final state of a run")
        while True:
            try:
                look = asyncio.to_thread(examine, self.instance, run.run_id, end, cancellation, self.worker_id)
                # The events of the way stand before the final one; meanwhile look how it has to end.
                conclusion, _ = await asyncio.gather(look, chronicle.written() if chronicle else asyncio.sleep(0))
                await asyncio.to_thread(conclude, self.instance, conclusion, end)
                break
            except Exception as error:
                # The child is gone and the message still ours: nobody else can do this better, so not at once give up.
                if outage.tries >= _FINAL_STATE_TRIES:
                    raise
                await outage.wait(error)
        outage.over()
        if conclusion.settlement is Settlement.HAND_BACK:
            await self._give_up(run, work, "interrupted; the run will be resumed", 0)
            return
        if conclusion.settlement is Settlement.LEAVE:
            await asyncio.to_thread(self.claims.release, run, self.worker_id, work.task_id, "the lease was lost")
        work.settle_as(conclusion.settlement)


def _grace(run: DagsterRun, default_s: float) -> float:
    """The run's own grace, if it is tagged with a sensible one."""
    if GRACE_SECONDS_TAG not in run.tags:
        return default_s
    try:
        return grace_from_tag(run.tags[GRACE_SECONDS_TAG])
    except SettingsError as error:
        logger.warning("tag %s ignored: %s", GRACE_SECONDS_TAG, error, extra={"run_id": run.run_id})
        return default_s


class _Chronicle:
    """Writes a run's engine events in order, beside the supervision and never in its way."""

    def __init__(self, instance: DagsterInstance, run: DagsterRun, worker_id: str, cancelled: Cancelled) -> None:
        self._instance = instance
        self._run = run
        self._worker_id = worker_id
        self._cancelled = cancelled
        self._tail: asyncio.Task[None] | None = None

    def interrupting(self, pid: int, grace_s: float) -> None:
        """See `supervisor.Observer`."""
        at = time()
        self._write(events.reached(self._worker_id, self._cancelled.cause))
        self._write(events.interrupting(pid, grace_s, at))

    def killing(self, pid: int, waited_s: float) -> None:
        """See `supervisor.Observer`."""
        self._write(events.killed(pid, waited_s, time()))

    def tell_end(self, end: ChildEnd | None) -> None:
        """What is to be said of a cancellation when all is over."""
        if self._cancelled and end is None:
            self._write(events.reached(self._worker_id, self._cancelled.cause))
        elif end is not None and end.interrupted_at is not None:
            self._write(events.tree_gone(end.gone_at - end.interrupted_at, end.killed, end.gone_at))

    async def written(self) -> None:
        """Until everything that was said is in the database."""
        if self._tail is not None:
            await asyncio.wait({self._tail})

    def _write(self, note: events.Note) -> None:
        self._tail = asyncio.create_task(self._after(self._tail, note), name=f"write {note.stage}")

    async def _after(self, earlier: asyncio.Task[None] | None, note: events.Note) -> None:
        if earlier is not None:
            await asyncio.wait({earlier})
        try:
            await asyncio.to_thread(write_note, self._instance, self._run, note)
        except Exception:  # an event that cannot be written must not keep the run from its end
            logger.exception("engine event could not be written", extra={"run_id": self._run.run_id})
