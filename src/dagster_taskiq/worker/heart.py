"""The worker's heartbeat: writes into Dagster's database that it is alive, and what it is working on.

With the same query it reads what people want of this worker. Knows heartbeats and time; not how anybody judges them.
"""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

from dagster_taskiq._lane import Lane
from dagster_taskiq._retry import retry_async
from dagster_taskiq.metrics import RUNNING
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.code_locations import ASK_KEY, FACT
from dagster_taskiq.storage.fleet import forget_stop
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.orders import Orders

_MEASURE_EVERY_S: Final = 60
_LOOK_EVERY_S: Final = 0.5


class Heart:
    """Beats until cancelled."""

    def __init__(self, heartbeats: Heartbeats, context: WorkerContext, stopping: asyncio.Event, orders: Orders) -> None:
        """`stopping`: set when the worker takes no more work. `orders` are given what is read."""
        self._heartbeats = heartbeats
        self._context = context
        self._stopping = stopping
        self._orders = orders
        self._started_at = time.time()
        self._measured_at = 0.0
        self._told: set[str] = set()
        """Task ids of the work that the last heartbeat has named."""
        # A beat that has not arrived when the next one is due may as well be given up.
        self._lane = Lane("the database, for the heartbeat", context.settings.heartbeat_every_s)
        self._writing = 0
        """Threads of the lane that write a heartbeat, also those that nobody waits for any more."""
        self._has_ended = False
        self._changed = threading.Condition()

    async def run(self) -> NoReturn:
        """Beat until cancelled. A database that is away for a while stops nobody."""
        every_s = self._context.settings.heartbeat_every_s
        while True:
            await self._pause(every_s)
            await retry_async(self.beat, doing="write the heartbeat", longest_pause_s=every_s)

    async def beat(self) -> None:
        """Beat once. Raises what the database raises, and `TimeoutError`."""
        context = self._context
        self._told, active = set(context.active), [*context.active.values()]
        work = [[task.run_id, task.step_key, round(task.since, 3)] for task in active]
        facts: dict[str, Any] = {
            "since": self._started_at,
            "where": context.where,
            "queue": queue_name(context.settings.queue_url),
            "routes": [*context.settings.serves],
            "slots": self._slots(),
            "work": work,
            **self._orders.facts(),
        }
        if len(context.settings.serves) > 1:  # or else it is clear
            facts["work_routes"] = [task.route for task in active]
        if code := context.told_code():
            facts[FACT] = code
        if unusable := context.unusable():
            facts["unusable"] = [message.to_json() for message in unusable]
        if context.metrics.wanted and time.monotonic() - self._measured_at > _MEASURE_EVERY_S:
            self._measured_at = time.monotonic()
            context.metrics.put({RUNNING: len(work)})
        began = time.monotonic()
        asked = await self._lane.call(self._write, facts, (*self._orders.asks, ASK_KEY))
        context.heard_at = began
        self._orders.hear(asked)
        context.hear_code(asked)

    def _write(self, facts: Mapping[str, Any], asks: Sequence[str]) -> Mapping[str, str]:
        with self._changed:
            if self._has_ended:
                return {}
            self._writing += 1
        try:
            return self._heartbeats.beat(self._context.worker_id, facts, asks)
        finally:
            with self._changed:
                self._writing -= 1
                self._changed.notify_all()

    def _write_the_end(self) -> None:
        """After the last heartbeat, also one that is late: or else the worker would seem to be alive again."""
        with self._changed:
            self._has_ended = True
            self._changed.wait_for(lambda: not self._writing)
        self._heartbeats.gone(self._context.worker_id)

    async def _pause(self, every_s: float) -> None:
        """Until the next beat is due; it is when there are news: a worker that stops is handed nothing more over.

        Of a worker that stops people ask whether it still works on something: so that is news, too.
        """
        due = time.monotonic() + every_s
        while (left_s := due - time.monotonic()) > 0 and not self._orders.news.is_set() and not self._has_changed():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _LOOK_EVERY_S)):
                    await self._orders.news.wait()
        self._orders.news.clear()

    def _has_changed(self) -> bool:
        return self._stopping.is_set() and self._told != self._context.active.keys()

    def _slots(self) -> list[int]:
        """Slots for runs and for steps; a worker that stops has none that is free."""
        settings = self._context.settings
        if not self._stopping.is_set():
            return [settings.max_concurrent_runs, settings.max_concurrent_steps]
        at_work = self._context.active_by_kind()
        return [at_work["runs"], at_work["steps"]]

    async def stop(self) -> None:
        """Write that the worker has ended, so that nobody waits for its heartbeat to grow old."""
        try:
            await self._lane.call(self._write_the_end)
            if self._orders.was_asked_to_stop:
                await self._lane.call(forget_stop, self._context.instance, self._context.worker_id)
        finally:
            self._lane.close()
