"""Which workers are alive? A heartbeat is a value in Dagster's key-value storage, written only by its worker.

Knows that storage and time; not runs, not SQS, not processes. All calls block on the database.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

from dagster import DagsterInstance

from dagster_taskiq._text import one_line
from dagster_taskiq.dagster_compat.key_values import put_value_and_read
from dagster_taskiq.dagster_compat.storage import delete_values, put_value, values_under
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.stored import Unreadable, is_number, stored_object, stored_time, tell_unreadable

_PREFIX: Final = "dagster-taskiq/heartbeat/"
_LONGEST_KEY: Final = 64
"""MySQL's unique index has so many characters of a key, and names of hosts are long."""
_DIGEST_BYTES: Final = 10
_ENTRY: Final = len(("run", "step", "since"))
_CODE: Final = len(("location", "mark", "why"))
_FORGOTTEN_AFTER_S: Final = 7 * 24 * 3_600


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last heartbeat of a worker. `at` is by that worker's clock, in seconds since the epoch."""

    worker_id: str
    at: float
    gone: bool
    facts: Mapping[str, Any]


class Heartbeats:
    """Reads and writes heartbeats, and decides which workers are dead.

    An old heartbeat alone does not mean that a worker is dead: after an outage of the database all of them are old, and
    the clocks of two machines may differ. A worker is dead when it has reported its end, or when its heartbeat is older
    than `dead_after_s` *and* still the same `confirm_s` after that was first seen, by this process's own clock. When a
    look in between failed, the waiting starts again. Therefore keep the object.
    """

    def __init__(
        self,
        instance: DagsterInstance,
        dead_after_s: float,
        confirm_s: float,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._instance = instance
        self._dead_after_s = dead_after_s
        self._confirm_s = confirm_s
        self._clock = clock
        self._monotonic = monotonic
        self._suspects: dict[str, tuple[str | None, float]] = {}
        self._living: set[str] = set()
        self._lock = Lock()

    @classmethod
    def of_runs(cls, instance: DagsterInstance, settings: Settings, **clocks: Callable[[], float]) -> "Heartbeats":
        """For runs: a dead worker's run is taken over when its message comes again."""
        return cls(instance, settings.dead_after_s, settings.death_confirmed_after_s, **clocks)

    @classmethod
    def without_a_message(cls, instance: DagsterInstance, settings: Settings) -> "Heartbeats":
        """For runs whose message has not come again: much later, because their worker may only lack the database."""
        return cls(instance, settings.given_up_after_s, settings.death_confirmed_after_s)

    @classmethod
    def of_steps(cls, instance: DagsterInstance, settings: Settings) -> "Heartbeats":
        """For steps: later, so that a dead worker's children are gone before a step is tried again."""
        return cls(instance, settings.step_lost_after_s, settings.death_confirmed_after_s)

    @property
    def confirm_s(self) -> float:
        """How long to wait before looking again at a worker that is in doubt."""
        return self._confirm_s

    def beat(
        self, worker_id: str, facts: Mapping[str, Any] | None = None, asks: Sequence[str] = ()
    ) -> Mapping[str, str]:
        """Write that the worker is alive, and other facts about it.

        `asks`: keys of the same storage, whose values are returned; what is not there is left out. On PostgreSQL that
        costs no further query.
        """
        value = {"at": self._clock(), **(facts or {})}
        if not asks:
            self._write(worker_id, value)
            return {}
        return put_value_and_read(self._instance, _key(worker_id), _text(worker_id, value), asks)

    def gone(self, worker_id: str) -> None:
        """Write that the worker has ended, so that nobody has to wait until its heartbeat is old."""
        self._write(worker_id, {"at": self._clock(), "gone": True})

    def alive(self, worker_ids: Iterable[str]) -> set[str]:
        """Those that are alive, or not yet known to be dead."""
        alive, in_doubt = self.look(worker_ids)
        return alive | in_doubt

    def look(self, worker_ids: Iterable[str]) -> tuple[set[str], set[str]]:
        """Those that are alive, and those in doubt: look at these again after `confirm_s`."""
        wanted = set(worker_ids)
        if not wanted:
            return set(), set()
        cursors = self._instance.daemon_cursor_storage
        found = self._read(lambda: cursors.get_cursor_values({_key(name) for name in wanted}))
        verdicts = {name: self._judge(name, found.get(_key(name))) for name in wanted}
        return {name for name in wanted if verdicts[name] == "alive"}, {
            name for name in wanted if verdicts[name] == "in doubt"
        }

    def living(self) -> list[Heartbeat]:
        """The last heartbeat of every worker that is alive; of one in doubt only if this object has seen it alive.

        (For a process that has just started, everybody who ever died without a word is in doubt.)
        """
        found = self._read(lambda: values_under(self._instance, _PREFIX))
        beats = [_heartbeat(key, value) for key, value in found.items()]
        verdicts = {beat.worker_id: self._judge(beat.worker_id, found[_key(beat.worker_id)]) for beat in beats}
        known = self._living
        self._living = {
            name
            for name, verdict in verdicts.items()
            if verdict == "alive" or (verdict == "in doubt" and name in known)
        }
        return [beat for beat in beats if beat.worker_id in self._living]

    def last(self) -> list[Heartbeat]:
        """The last heartbeat of every worker, also of those that are gone, as long as it is stored."""
        return [_heartbeat(key, value) for key, value in values_under(self._instance, _PREFIX).items()]

    def forget_the_long_dead(self) -> None:
        """Delete the heartbeats of workers that have written none for a week."""
        oldest = self._clock() - _FORGOTTEN_AFTER_S
        delete_values(self._instance, [_key(last.worker_id) for last in self.last() if last.at < oldest])

    def _read(self, read: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
        try:
            found = read()
        except Exception:
            with self._lock:
                self._suspects.clear()
            raise
        with self._lock:
            # As long as its heartbeat is stored at most: a fleet on spot instances has new names every day.
            oldest = self._monotonic() - _FORGOTTEN_AFTER_S
            self._suspects = {name: seen for name, seen in self._suspects.items() if seen[1] > oldest}
        return found

    def _judge(self, worker_id: str, value: str | None) -> str:
        last = _heartbeat(_key(worker_id), value) if value is not None else None
        with self._lock:
            if last is not None and last.gone:
                return "dead"
            # A heartbeat from the future is as wrong as one from the past.
            if last is not None and abs(self._clock() - last.at) < self._dead_after_s:
                self._suspects.pop(worker_id, None)
                return "alive"
            now = self._monotonic()
            before, since = self._suspects.get(worker_id, (value, now))
            # Its clock may be wrong, but it has written. What is older than the one before it arrived late: an outage
            # had held it, and it says nothing about now. (It is remembered: that clock may have been set back.)
            if before != value and not _is_older(value, before):
                self._suspects[worker_id] = (value, now)
                return "alive"
            self._suspects[worker_id] = (value, since)
            return "dead" if now - since >= self._confirm_s else "in doubt"

    def _write(self, worker_id: str, value: Mapping[str, Any]) -> None:
        put_value(self._instance, _key(worker_id), _text(worker_id, value))


def _text(worker_id: str, value: Mapping[str, Any]) -> str:
    named = {} if _key(worker_id) == _PREFIX + worker_id else {"worker": worker_id}
    return json.dumps({**value, **named})


def _key(worker_id: str) -> str:
    return key_of_worker(_PREFIX, worker_id)


def key_of_worker(prefix: str, worker_id: str) -> str:
    """The key of something about one life of a worker; not too long for MySQL, however long its name is."""
    key = prefix + worker_id
    if len(key) <= _LONGEST_KEY:
        return key
    digest = hashlib.blake2s(worker_id.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{key[: _LONGEST_KEY - len(digest) - 1]}~{digest}"


def _is_older(value: str | None, before: str | None) -> bool:
    return value is not None and before is not None and _heartbeat("", value).at < _heartbeat("", before).at


def _heartbeat(key: str, value: str) -> Heartbeat:
    """One that cannot be read is of a worker that may live: it says so by changing, and it offers no slots."""
    worker_id = key.removeprefix(_PREFIX)
    try:
        facts = stored_object(value)
        at = stored_time(facts.pop("at", None))
    except Unreadable as error:
        tell_unreadable(f"the heartbeat of worker {one_line(worker_id)}", error)
        return Heartbeat(worker_id, 0.0, False, {})
    gone, worker_id = bool(facts.pop("gone", False)), str(facts.pop("worker", worker_id))
    return Heartbeat(worker_id, at, gone, {name: fact for name, fact in facts.items() if _fits(name, fact)})


def _fits(name: str, fact: object) -> bool:
    """Whether the fact is what its readers take it for; one that none of them knows is."""
    return name not in _FITTING or _FITTING[name](fact)


def _is_work(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == _ENTRY
        and isinstance(entry[0], str)
        and isinstance(entry[1], str | None)
        and is_number(entry[2])
    )


def _is_unusable(message: object) -> bool:
    return (
        isinstance(message, dict)
        and all(isinstance(message.get(name), str) for name in ("id", "why"))
        and all(is_number(message.get(name)) for name in ("received", "again_at"))
    )


def _is_code(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == _CODE and all(isinstance(part, str) for part in entry)


def _is_stopping(fact: object) -> bool:
    return (
        isinstance(fact, dict)
        and is_number(fact.get("at"))
        and isinstance(fact.get("reason"), str | None)
        and (fact.get("until") is None or is_number(fact["until"]))
    )


_FITTING: Final[Mapping[str, Callable[[Any], bool]]] = {
    "since": is_number,
    "where": lambda fact: isinstance(fact, str),
    "queue": lambda fact: isinstance(fact, str),
    "routes": lambda fact: isinstance(fact, list),
    "slots": lambda fact: isinstance(fact, list) and len(fact) == len(("runs", "steps")) and all(map(is_number, fact)),
    "work": lambda fact: isinstance(fact, list) and all(map(_is_work, fact)),
    "work_routes": lambda fact: isinstance(fact, list) and all(isinstance(route, str | None) for route in fact),
    "held": is_number,
    "stopping": _is_stopping,
    "code": lambda fact: isinstance(fact, list) and all(map(_is_code, fact)),
    "unusable": lambda fact: isinstance(fact, list) and all(map(_is_unusable, fact)),
}
"""What a worker says of itself; that of another version may say it otherwise."""
