"""Does this worker still have its runs? Compares its claims with their rows, and its heartbeats with the clock.

What others may have taken over is stopped. Knows claims and time; not processes, not queues.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, NoReturn

from dagster_taskiq._lane import Lane
from dagster_taskiq._retry import retry_async
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.worker.context import WorkerContext

_SHORTEST_BOUND_S: Final = 2.0
TAKEN_OVER: Final = "another worker has taken over"
CUT_OFF: Final = "the worker could not write its heartbeat"


class ClaimWatch:
    """`cancel` is called with the task id of each piece of work that has to stop."""

    def __init__(
        self,
        context: WorkerContext,
        cancel: Callable[[str, Cancellation], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._cancel = cancel
        self._clock = clock
        self._every_s = context.settings.status_poll_seconds
        self._lane = Lane("the database, for the claims", max(self._every_s, _SHORTEST_BOUND_S))

    async def run(self) -> NoReturn:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._watch_rows(), name="watch the claims")
            both.create_task(self._watch_heartbeat(), name="watch the own heartbeat")
        raise AssertionError  # neither of them ends

    async def look(self) -> None:
        """Compare the rows once. Raises what the database raises, and `TimeoutError`."""
        for claim in (await self._lane.call(self._context.claims.lost)).values():
            self._context.lose(claim.task_id)
            self._cancel(claim.task_id, Cancellation(CancelKind.LEASE_LOST, cause=TAKEN_OVER))

    def check_heartbeat(self) -> None:
        """Stop everything when no heartbeat has been written for so long that others may soon take the runs over."""
        context = self._context
        silent_s = self._clock() - context.heard_at
        context.is_cut_off = silent_s > context.settings.cut_off_after_s
        if context.is_cut_off:
            why = Cancellation(CancelKind.SHUTDOWN, cause=f"{CUT_OFF} for {silent_s:.0f} s")
            for task_id, active in list(context.active.items()):
                self._cancel(task_id, why)
                active.lost.set(why)  # a cleanup goes on when its run was cancelled, but not beside another one

    async def _watch_rows(self) -> NoReturn:
        while True:
            await asyncio.sleep(self._every_s)
            await retry_async(self.look, doing="read the claims", longest_pause_s=self._every_s)

    async def _watch_heartbeat(self) -> NoReturn:
        while True:
            await asyncio.sleep(self._context.settings.heartbeat_every_s)
            self.check_heartbeat()
