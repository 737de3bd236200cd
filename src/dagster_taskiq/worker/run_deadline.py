"""The time limit of a run that works here: its clock, and what happens when it is over.

Knows the run's record and the running task, which it cancels; not how work is stopped, nor what becomes of the run.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic, time
from typing import Final

from dagster import DagsterRun

from dagster_taskiq._retry import retry_async
from dagster_taskiq._text import duration
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.storage.engine_events import EngineEvent, ignored_time_limit
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.time_limits import TimeLimit, limit_of_run, mark_timed_out
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.worker.context import WorkerContext

logger = logging.getLogger(__name__)

_HEAD_START_S: Final = 0.5
_NOT_BEGUN_S: Final = 1.0
"""Between two looks whether a run has begun, whose code takes longer to load than the run may take."""


@asynccontextmanager
async def within_its_time(
    context: WorkerContext, run: DagsterRun, task: RunningTask, *, is_new: bool
) -> AsyncIterator[None]:
    """As long as this lasts, the task is cancelled when the run has taken longer than it may.

    `is_new`: the run has not begun before. Of one that has, the clock goes on; when its time is over, the task is
    cancelled before the body begins. When it leaves, what it has to write is written, or was given up. It raises what
    the body raises, and nothing for a database that is away: that is waited for, until the worker shuts down.
    """
    limit, ignored = limit_of_run(context.instance, run)
    if ignored is not None and is_new:
        await _append(context, run, ignored_time_limit(ignored))
    if limit is None:
        yield
        return
    clock = _Clock(context, run, task, limit)
    if not is_new:
        await clock.look()
        if clock.is_late:
            await clock.strike()
    watching = asyncio.create_task(clock.run(), name=f"time limit of run {run.run_id}")
    try:
        yield
    finally:
        if not clock.is_over:
            watching.cancel()
        await asyncio.wait({watching})


class _Clock:
    """Counts by the monotonic clock from the moment on in which the start of the run is known.

    That moment is in the run's record, by the clock of whichever worker began with it. So a clock that is set while
    the run works changes nothing, and one that is wrong gives a run no more than its limit from now on.
    """

    def __init__(self, context: WorkerContext, run: DagsterRun, task: RunningTask, limit: TimeLimit) -> None:
        self.is_over = False
        self._context = context
        self._run = run
        self._task = task
        self._limit = limit
        self._began: float | None = None
        self._until: float | None = None

    @property
    def is_late(self) -> bool:
        """Whether the time of the run was over when that was looked up."""
        return self._until is not None and monotonic() >= self._until

    async def run(self) -> None:
        """Until the time is over, the task is cancelled, and what that means is written."""
        if self._until is None:
            await asyncio.sleep(self._limit.seconds)  # it cannot have begun before this
            await self.look()
        while self._until is None:
            if self._task.signal.is_shutdown:
                return  # it is being interrupted without that
            await asyncio.sleep(_NOT_BEGUN_S)
            await self.look()
        await asyncio.sleep(max(0.0, self._until - monotonic()))
        await self.strike()

    async def look(self) -> None:
        """Read when the run began, if it has begun, and that can be read."""
        context = self._context
        try:
            record = await retry_async(
                lambda: context.lane.call(context.instance.get_run_record_by_id, self._run.run_id),
                doing="read when a run began",
                until=lambda: self._task.signal.is_shutdown,
            )
        except Exception:  # whatever it is: the worker shuts down, and the run ends, or goes on elsewhere
            logger.exception("it could not be read when a run began", extra={"run_id": self._run.run_id})
            return
        self._began = record.start_time if record is not None else None
        if self._began is not None:
            left_s = self._began + self._limit.seconds - time()
            self._until = monotonic() + min(max(0.0, left_s), self._limit.seconds)

    async def strike(self) -> None:
        """Its time is over: cancel the task, and say so in the database. Once."""
        if self._began is None or self.is_over:
            return
        self.is_over = True
        reason = self._limit.exceeded("run")
        cause = reason.replace("timed out:", f"timed out after {duration(time() - self._began)}:", 1)
        logger.warning("%s", cause, extra={"run_id": self._run.run_id, "task_id": self._task.task_id})
        marking = asyncio.create_task(self._mark(reason), name=f"mark run {self._run.run_id}")
        # Dagster tells those that are CANCELING, and then interrupted, from those that a mere signal has hit.
        await asyncio.wait({marking}, timeout=_HEAD_START_S)
        self._task.cancel(Cancellation(CancelKind.DEADLINE, reason, cause=cause))
        await asyncio.wait({marking})

    async def _mark(self, reason: str) -> None:
        """For others, should this worker die before the run has ended."""
        cancellation, context = self._task.cancellation, self._context
        if cancellation is not None and cancellation.kind > CancelKind.DEADLINE:
            return  # somebody has asked for its end before
        try:
            await context.lane.call(mark_timed_out, context.instance, self._run.run_id, reason)
        except Exception:  # whatever it is: this worker knows how the run has to end
            logger.exception("it could not be written that a run timed out", extra={"run_id": self._run.run_id})


async def _append(context: WorkerContext, run: DagsterRun, event: EngineEvent) -> None:
    try:
        await context.lane.call(append_event, context.instance, run, event)
    except Exception:
        logger.exception("engine event could not be written", extra={"run_id": run.run_id})
