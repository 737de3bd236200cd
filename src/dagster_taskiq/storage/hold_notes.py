"""Writes into the log of each run that waits that the fleet is held, and by whom; once for each hold.

Knows Dagster's runs; not why the fleet is held. All calls block on the database.
"""

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from dagster import DagsterInstance, RunsFilter

from dagster_taskiq.dagster_compat.key_values import read_values
from dagster_taskiq.dagster_compat.storage import put_value
from dagster_taskiq.storage.engine_events import WHY_KEY, EngineEvent, Stage
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.fleet import RELEASE, Hold
from dagster_taskiq.storage.stored import Unreadable, stored_object, stored_time, tell_unreadable
from dagster_taskiq.storage.waiting import WAITING_STATUSES

logger = logging.getLogger(__name__)

_KEY: Final = "dagster-taskiq/fleet-hold-noted"
_LOOK_EVERY_S: Final = 2.0
_NOTES_AT_ONCE: Final = 100


def held_note(hold: Hold) -> EngineEvent:
    """For the log of a run that is not begun."""
    why = hold.described()
    message = f"not begun: {why}. What waits begins after: {RELEASE}"
    return EngineEvent(Stage.WAITING, message, {WHY_KEY: why})


class HoldNotes:
    """Keep the object. How far it is is stored, so that a daemon that is started again does not say it again."""

    def __init__(self, instance: DagsterInstance, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._instance = instance
        self._clock = clock
        self._look_at = float("-inf")
        self._about: float | None = None
        self._written_until = 0.0
        """The time when the last run was created that was written about."""

    def write(self, hold: Hold) -> None:
        """Look every two seconds at most, and never raise. One query when there is nothing to write; 100 at a time."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY_S
        try:
            self._write(hold)
        except Exception:
            logger.exception("it could not be noted that the fleet is held")

    def _write(self, hold: Hold) -> None:
        if self._about != hold.since:
            self._written_until = _written_until(read_values(self._instance, [_KEY]).get(_KEY, "{}"), hold)
            self._about = hold.since
        after = datetime.fromtimestamp(self._written_until, UTC)
        waiting = RunsFilter(statuses=WAITING_STATUSES, created_after=after)
        records = self._instance.get_run_records(waiting, limit=_NOTES_AT_ONCE, ascending=True)
        for record in records:
            append_event(self._instance, record.dagster_run, held_note(hold))
            self._written_until = record.create_timestamp.timestamp()
        if records:
            put_value(self._instance, _KEY, json.dumps({"hold": hold.since, "until": self._written_until}))


def _written_until(text: str, hold: Hold) -> float:
    """How far it was, by what is stored about this hold; 0: nothing, so from the first run on."""
    try:
        stored = stored_object(text)
        return stored_time(stored.get("until")) if stored.get("hold") == hold.since else 0.0
    except Unreadable as error:
        tell_unreadable("how far a hold was noted", error)
        return 0.0
