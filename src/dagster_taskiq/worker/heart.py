"""The worker's heartbeat: writes into Dagster's database that it is alive, and what it is working on.

Knows heartbeats and time; not how anybody judges them.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NoReturn

from dagster_taskiq._retry import retry_async
from dagster_taskiq.metrics import RUNNING
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.worker.context import WorkerContext

_MEASURE_EVERY_S: Final = 60


class Heart:
    """Beats until cancelled."""

    def __init__(self, heartbeats: Heartbeats, context: WorkerContext) -> None:
        self._heartbeats = heartbeats
        self._context = context
        self._started_at = time.time()
        self._measured_at = 0.0
        # Threads of its own, so that no work that waits for the database keeps it from beating; and several, because
        # a beat may still hang in an outage, or in the pauses of Dagster's own tries, when the next one could arrive.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="heartbeat")

    async def run(self) -> NoReturn:
        """Beat until cancelled. A database that is away for a while stops nobody."""
        every_s = self._context.settings.heartbeat_every_s
        while True:
            await asyncio.sleep(every_s)
            await retry_async(lambda: self.beat(within_s=every_s), doing="write the heartbeat", longest_pause_s=every_s)

    async def beat(self, within_s: float | None = None) -> None:
        """Beat once. Raises what the database raises, and `TimeoutError`."""
        context = self._context
        work = [[task.run_id, task.step_key, round(task.since, 3)] for task in context.active.values()]
        facts: dict[str, Any] = {
            "since": self._started_at,
            "where": context.where,
            "slots": [context.settings.max_concurrent_runs, context.settings.max_concurrent_steps],
            "work": work,
        }
        if context.metrics.wanted and time.monotonic() - self._measured_at > _MEASURE_EVERY_S:
            self._measured_at = time.monotonic()
            context.metrics.put({RUNNING: len(work)})
        loop = asyncio.get_running_loop()
        beating = loop.run_in_executor(self._threads, self._heartbeats.beat, context.worker_id, facts)
        try:
            async with asyncio.timeout(within_s):
                await beating
        except TimeoutError:
            raise TimeoutError(f"the database has not answered within {within_s:g} s") from None

    async def stop(self) -> None:
        """Write that the worker has ended, so that nobody waits for its heartbeat to grow old."""
        try:
            await asyncio.to_thread(self._heartbeats.gone, self._context.worker_id)
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
