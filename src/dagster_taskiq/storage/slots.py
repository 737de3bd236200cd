"""How many runs can the living workers work on at a time? From their heartbeats, and patient with the database.

Knows heartbeats; not which runs there are.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dagster import DagsterInstance

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeat, Heartbeats
from dagster_taskiq.storage.routing import served_routes

logger = logging.getLogger(__name__)

_READ_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class WorkerSlots:
    """The slots for runs of one worker, and the routes whose runs may have them."""

    routes: frozenset[str]
    runs: int


class RunSlots:
    """Slots for runs of the workers that serve a launcher's queue. Keep the object: it remembers what it has seen."""

    def __init__(
        self,
        instance: DagsterInstance,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeats = Heartbeats.of_runs(instance, settings, clock=clock, monotonic=monotonic)
        self._queue = queue_name(settings.queue_url)
        self._believed_for_s = settings.dead_after_s + settings.death_confirmed_after_s
        self._monotonic = monotonic
        self._workers: tuple[WorkerSlots, ...] = ()
        self._looked_at = self._known_at = float("-inf")

    def count(self) -> int:
        """Slots of living workers, busy or free, whatever they serve. As `of_workers`."""
        return sum(worker.runs for worker in self.of_workers())

    def of_workers(self) -> tuple[WorkerSlots, ...]:
        """Each living worker that takes runs; reads the heartbeats once a second at most. Never raises.

        A worker that stops has as many slots as it has runs. When the database does not answer, what was read last is
        valid for as long as it would take to notice that a worker is dead; then there is none.
        """
        now = self._monotonic()
        if now - self._looked_at < _READ_EVERY_S:
            return self._workers
        self._looked_at = now
        try:
            read = (self._slots_of(beat) for beat in self._heartbeats.living())
            self._workers = tuple(worker for worker in read if worker.runs)
        except Exception as error:  # noqa: BLE001 - whatever the storage raises
            logger.warning("the heartbeats of the workers cannot be read: %r", error)
            if now - self._known_at > self._believed_for_s:
                self._workers = ()
        else:
            self._known_at = now
        return self._workers

    def _slots_of(self, beat: Heartbeat) -> WorkerSlots:
        slots = beat.facts.get("slots")
        serves = beat.facts.get("queue", self._queue) == self._queue
        return WorkerSlots(frozenset(served_routes(beat.facts)), int(slots[0]) if slots and serves else 0)
