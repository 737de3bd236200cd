"""How many runs can the living workers work on at a time? From their heartbeats, and patient with the database.

Knows heartbeats; not which runs there are.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from dagster import DagsterInstance

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeat, Heartbeats

logger = logging.getLogger(__name__)

_READ_EVERY_S: Final = 1.0


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
        self._count = 0
        self._looked_at = self._known_at = float("-inf")

    def count(self) -> int:
        """Slots of living workers, busy or free; reads the heartbeats once a second at most. Never raises.

        A worker that stops has as many slots as it has runs. When the database does not answer, the last count is valid
        for as long as it would take to notice that a worker is dead; then it is 0.
        """
        now = self._monotonic()
        if now - self._looked_at < _READ_EVERY_S:
            return self._count
        self._looked_at = now
        try:
            self._count = sum(self._slots_of(beat) for beat in self._heartbeats.living())
        except Exception as error:  # noqa: BLE001 - whatever the storage raises
            logger.warning("the heartbeats of the workers cannot be read: %r", error)
            if now - self._known_at > self._believed_for_s:
                self._count = 0
        else:
            self._known_at = now
        return self._count

    def _slots_of(self, beat: Heartbeat) -> int:
        slots = beat.facts.get("slots")
        serves = beat.facts.get("queue", self._queue) == self._queue
        return int(slots[0]) if slots and serves else 0
