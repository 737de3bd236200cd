"""Writes the engine events of one piece of work in order, beside the supervision and never in its way.

Knows the wording and the event log; not processes, not queues.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from time import time

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._lane import Lane
from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.dagster_compat.storage import outages
from dagster_taskiq.process.step_timers import LateStep
from dagster_taskiq.process.supervise import ChildEnd
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.event_log import StepRef, append_event

logger = logging.getLogger(__name__)


class EventWriter:
    """What happens to a run, or with `step` to one of its steps, as it is to stand in the event log."""

    def __init__(
        self,
        instance: DagsterInstance,
        run: DagsterRun,
        worker_id: str,
        signal: CancelSignal,
        step: StepRef | None = None,
        *,
        lane: Lane,
    ) -> None:
        self._instance = instance
        self._run = run
        self._worker_id = worker_id
        self._signal = signal
        self._step = step
        self._lane = lane
        self._tail: asyncio.Task[None] | None = None

    def interrupting(self, pid: int, grace_s: float) -> None:
        """See `supervise.Observer`."""
        at = time()
        self._write_reached()
        self._write(engine_events.interrupting(pid, grace_s, at))

    def staying(self, pid: int, stays: Sequence[str], patience_s: float) -> None:
        """See `supervise.Observer`."""
        event = engine_events.waiting_for_threads(pid, stays, patience_s, time())
        logger.info("%s", event.message, extra={"run_id": self._run.run_id})
        self._write(event)

    def killing(self, pid: int, waited_s: float, shield: str | None, stays: Sequence[str] | None) -> None:
        """See `supervise.Observer`."""
        if stays is None:
            self._write(engine_events.killed(pid, waited_s, shield, time()))
        else:
            self._write(engine_events.threads_killed(pid, waited_s, stays, time()))

    def step_interrupting(self, step: LateStep, grace_s: float) -> None:
        """See `step_timers.StepObserver`."""
        self._write(engine_events.step_timed_out(step.pid, step.reason, grace_s, time()), step.step_key)

    def step_killing(self, step: LateStep, waited_s: float, shield: str | None) -> None:
        """See `step_timers.StepObserver`."""
        self._write(engine_events.killed(step.pid, waited_s, shield, time()), step.step_key)

    def record_end(self, end: ChildEnd | None, *, reported: bool = False) -> None:
        """What the log is to hold when all is over: of a cancellation, and of a step always.

        `reported`: whether the step's own process has written how the step ended.
        """
        if end is None:
            self._write_reached()
            return
        after_s = end.gone_at - end.interrupted_at if end.interrupted_at is not None else None
        if self._step is not None or after_s is not None:
            ended = reported if self._step is not None else None
            self._write(engine_events.tree_gone(after_s, end.killed, end.gone_at, ended=ended))

    async def written(self) -> None:
        """Until everything that was recorded is in the database."""
        if self._tail is not None:
            await asyncio.wait({self._tail})

    def _write_reached(self) -> None:
        if self._signal.cancellation is not None:
            self._write(engine_events.reached(self._worker_id, self._signal.cancellation))

    def _write(self, event: engine_events.EngineEvent, step_key: str | None = None) -> None:
        cancellation = self._signal.cancellation
        if self._step is None and cancellation is not None and cancellation.kind is CancelKind.LEASE_LOST:
            return  # another worker has the run, and writes its log
        self._tail = asyncio.create_task(self._after(self._tail, event, step_key), name=f"write {event.stage}")

    async def _after(
        self, earlier: asyncio.Task[None] | None, event: engine_events.EngineEvent, step_key: str | None
    ) -> None:
        if earlier is not None:
            await asyncio.wait({earlier})
        if self._step is not None:
            # Whose attempt it is about, for whoever follows the steps of the run in its log.
            mine = {engine_events.WORKER_KEY: self._worker_id, engine_events.TASK_ID_KEY: self._step.task_id}
            event, step_key = replace(event, facts={**event.facts, **mine}), self._step.step_key
        try:
            await retry_async(
                lambda: self._lane.call(append_event, self._instance, self._run, event, step_key),
                doing="write an engine event",
                # A step's run waits until it reads that the step is over: so that is tried whatever happens.
                on=outages() if self._step is None else Exception,
                for_s=DATABASE_RETRY_S if self._step is None else None,
            )
        except Exception:  # an event that cannot be written must not keep the run from its end
            logger.exception("engine event could not be written", extra={"run_id": self._run.run_id})
