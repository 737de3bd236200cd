"""What people ask of the workers over Dagster's database: to begin nothing new (a hold), or to stop.

Knows the key-value storage; not how a worker follows. All calls block on the database.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final

from dagster import DagsterInstance

from dagster_taskiq._text import clean_text, one_line
from dagster_taskiq.dagster_compat.key_values import delete_value, read_values
from dagster_taskiq.dagster_compat.storage import delete_values, put_value, values_under
from dagster_taskiq.storage.heartbeats import key_of_worker
from dagster_taskiq.storage.stored import Unreadable, stored_object, stored_time, tell_unreadable

logger = logging.getLogger(__name__)

HOLD_KEY: Final = "dagster-taskiq/fleet-hold"
_STOP_PREFIX: Final = "dagster-taskiq/stop/"
_FORGOTTEN_AFTER_S: Final = 7 * 24 * 3_600
RELEASE: Final = "dagster-taskiq fleet release"


@dataclass(frozen=True, slots=True)
class Hold:
    """The fleet is held: runs wait, and what runs goes on. `since` is in seconds since the epoch, and names this hold.

    A hold whose author or reason was changed is still the same one.
    """

    since: float
    by: str
    reason: str

    @classmethod
    def parse(cls, text: str | None) -> "Hold | None":
        """The hold that is stored as this text; None: there is none. Raises `Unreadable`."""
        if text is None:
            return None
        stored = stored_object(text)
        return cls(stored_time(stored.get("since", 0)), str(stored.get("by", "")), str(stored.get("reason", "")))

    @classmethod
    def parse_or(cls, known: "Hold | None", text: str | None) -> "Hold | None":
        """As `parse`; `known`, what was stored before, when that cannot be read. The log says so."""
        try:
            return cls.parse(text)
        except Unreadable as error:
            tell_unreadable("the hold on the fleet", error)
            return known

    def described(self) -> str:
        """In one line: "the fleet is held by ada@host since 2026-11-29 10:02 UTC: migration"."""
        since = f"{datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M} UTC"
        return f"the fleet is held by {one_line(self.by)} since {since}: {one_line(self.reason)}"

    def notice(self) -> str:
        """The same, and how it is ended."""
        return f"{self.described()}; no run begins until: {RELEASE}"


def read_hold(instance: DagsterInstance) -> Hold | None:
    """The hold on the workers of this instance; None: there is none, or none that can be read."""
    return Hold.parse_or(None, read_values(instance, [HOLD_KEY]).get(HOLD_KEY))


def hold_fleet(instance: DagsterInstance, *, reason: str, by: str) -> Hold:
    """From now on no worker of this instance begins a run, until `release_fleet`. Of one that is held: a new reason."""
    before = read_hold(instance)
    hold = Hold(before.since if before is not None else time.time(), clean_text(by), clean_text(reason))
    put_value(instance, HOLD_KEY, json.dumps(asdict(hold)))
    return hold


def release_fleet(instance: DagsterInstance) -> Hold | None:
    """End the hold, and return it; None: there was none."""
    text = read_values(instance, [HOLD_KEY]).get(HOLD_KEY)
    if text is not None:
        delete_values(instance, [HOLD_KEY])
    return Hold.parse_or(None, text)


class HoldWatch:
    """Whether the fleet is held, for a process that asks again and again. Keep the object. Never raises."""

    def __init__(self, instance: DagsterInstance) -> None:
        self._instance = instance
        self._hold: Hold | None = None

    def look(self) -> Hold | None:
        """The hold; what it was at the last look when that cannot be read. Logs when it changes."""
        try:
            hold = Hold.parse_or(self._hold, read_values(self._instance, [HOLD_KEY]).get(HOLD_KEY))
        except Exception as error:  # noqa: BLE001 - whatever the storage raises
            logger.warning("it cannot be read whether the fleet is held: %r", error)
            return self._hold
        if hold != self._hold:
            log_hold(hold)
        self._hold = hold
        return hold


def log_hold(hold: Hold | None) -> None:
    """Say in the log of a process of ours that it has heard of a hold, or of its end."""
    if hold is None:
        logger.info("the fleet is released: runs begin again")
    else:
        logger.warning("%s", hold.notice())


@dataclass(frozen=True, slots=True)
class StopRequest:
    """What one life of a worker is asked to do. `at` is in seconds since the epoch."""

    at: float
    by: str
    reason: str | None = None
    finish: bool = False
    """To end after what runs, however long that takes; or else it drains as at SIGTERM."""

    def described(self) -> str:
        """Who asks, and why, in one line."""
        return f"{one_line(self.by)}: {one_line(self.reason)}" if self.reason else one_line(self.by)

    @classmethod
    def parse(cls, text: str | None) -> "StopRequest | None":
        """The request that is stored as this text; None: there is none, or none that can be read."""
        if text is None:
            return None
        try:
            stored = stored_object(text)
            at, reason = stored_time(stored.get("at", 0)), stored.get("reason")
        except Unreadable as error:
            tell_unreadable("a request to stop a worker", error)
            return None
        by, finish = str(stored.get("by", "")), bool(stored.get("finish", False))
        return cls(at, by, str(reason) if reason else None, finish=finish)


def stop_key(worker_id: str) -> str:
    """Where a worker finds what is asked of it. Another life of the same worker has another id, and another key."""
    return key_of_worker(_STOP_PREFIX, worker_id)


def ask_to_stop(instance: DagsterInstance, worker_id: str, request: StopRequest) -> None:
    """The worker hears it with its next heartbeat."""
    put_value(instance, stop_key(worker_id), json.dumps(asdict(request)))


def forget_stop(instance: DagsterInstance, worker_id: str) -> None:
    """The worker has stopped."""
    delete_values(instance, [stop_key(worker_id)])


def forget_old_stops(instance: DagsterInstance) -> None:
    """Delete requests of a week ago, to workers that died before they heard them; and what nobody can read."""
    oldest = time.time() - _FORGOTTEN_AFTER_S
    for key, text in values_under(instance, _STOP_PREFIX).items():
        request = StopRequest.parse(text)
        if request is None or request.at < oldest:
            delete_value(instance, key, text)
