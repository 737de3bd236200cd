"""Which one of many workers does what only one of them has to do? One row of Dagster's key-value storage.

Knows that storage and this process's own clock; not what has to be done. All calls block on the database. Whoever has
the row changes it each time; whoever sees it unchanged for long enough may take it. So no two clocks are compared.
"""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Final

from dagster import DagsterInstance

from dagster_taskiq.dagster_compat.key_values import insert_value, read_values, replace_value
from dagster_taskiq.storage.stored import Unreadable, stored_object, tell_unreadable

_PREFIX: Final = "dagster-taskiq/leader/"


class Leadership:
    """Of one worker over one task. Two may have it for a moment, when one of them stood still: no harm may follow."""

    def __init__(
        self,
        instance: DagsterInstance,
        task: str,
        worker_id: str,
        lapses_after_s: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lapses_after_s`: seconds without a change of the row after which another worker takes it."""
        self._instance = instance
        self._key = _PREFIX + hashlib.blake2s(task.encode(), digest_size=8).hexdigest()
        self._worker_id = worker_id
        self._lapses_after_s = lapses_after_s
        self._monotonic = monotonic
        self._turn = 0
        self._mine: str | None = None
        self._seen: tuple[str | None, float] = (None, 0.0)
        self._not_before = float("-inf")

    def take(self) -> bool:
        """Keep it, or take it if nobody has it; whether this worker has it now. One query, or two."""
        if self._monotonic() < self._not_before:
            return False
        new = self._next(resigned=False)
        if self._mine is not None:
            mine, self._mine = self._mine, None
            if replace_value(self._instance, self._key, mine, new):
                self._mine = new
                return True
        now = read_values(self._instance, [self._key]).get(self._key)
        if now is None:
            taken = insert_value(self._instance, self._key, new)
        else:
            taken = self._has_lapsed(now) and replace_value(self._instance, self._key, now, new)
        self._mine = new if taken else None
        return taken

    def resign(self, for_s: float = 0.0) -> None:
        """Let another worker have it at once, and do not take it back for so many seconds."""
        self._not_before = self._monotonic() + for_s
        mine, self._mine = self._mine, None
        if mine is not None:
            replace_value(self._instance, self._key, mine, self._next(resigned=True))

    def _next(self, *, resigned: bool) -> str:
        self._turn += 1
        return json.dumps({"worker": self._worker_id, "turn": self._turn, "resigned": resigned})

    def _has_lapsed(self, value: str) -> bool:
        before, since = self._seen
        if before != value:
            self._seen = (value, self._monotonic())
            return _has_resigned(value)
        return self._monotonic() - since >= self._lapses_after_s


def _has_resigned(value: str) -> bool:
    """What cannot be read is no resignation; it lapses when nobody changes it."""
    try:
        return bool(stored_object(value).get("resigned"))
    except Unreadable as error:
        tell_unreadable("which worker looks for lost runs", error)
        return False
