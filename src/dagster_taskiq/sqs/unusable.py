"""Messages that nobody can use: how long each is hidden before it may come again, and what an operator is told.

Without a dead-letter queue such a message is there until it expires, after up to fourteen days. It is never deleted
here: another version of the worker may know what to do with it. Knows receive counts and time; not SQS.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Final

from dagster_taskiq._text import clean_text

logger = getLogger(__name__)

LONGEST_PAUSE_S: Final = 3_600
"""For what cannot be read or is of no known kind: in fourteen days it comes some 350 times, and not 40,000 times."""
LONGEST_PAUSE_OF_WORK_S: Final = 600
"""For work that can be read and fails before it begins: its reason may have gone."""
_MOST: Final = 100
_MOST_TOLD: Final = 10
_LONGEST_WHY: Final = 200
_LATE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class UnusableMessage:
    """One of them as it was received last. `at` and `again_at` are in seconds since the epoch."""

    message_id: str
    why: str
    receive_count: int
    at: float
    again_at: float

    def to_json(self) -> dict[str, Any]:
        """For the heartbeat."""
        return {
            "id": self.message_id,
            "why": self.why,
            "received": self.receive_count,
            "again_at": round(self.again_at),
        }


class UnusableMessages:
    """Those of one queue, as far as one worker has seen them; a limited number of them."""

    def __init__(self, first_pause_s: float, *, clock: Callable[[], float] = time.time) -> None:
        """`first_pause_s`: after the first receive; it doubles with each further one."""
        self._first_pause_s = first_pause_s
        self._clock = clock
        self._seen: OrderedDict[str, UnusableMessage] = OrderedDict()

    def add(self, message_id: str, why: str, receive_count: int, longest_s: int = LONGEST_PAUSE_S) -> int:
        """Record it; for how many seconds to hide it: twice as long each time, `longest_s` at most.

        It is logged once, unless it is about work that fails: of that whoever has tried it says more.
        """
        now = self._clock()
        doublings = min(max(0, receive_count - 1), 32)
        pause_s = int(max(1.0, min(self._first_pause_s * 2**doublings, longest_s)))
        why = clean_text(" ".join(why.split()))[:_LONGEST_WHY]
        before = self._seen.pop(message_id, None)
        self._seen[message_id] = UnusableMessage(message_id, why, receive_count, now, now + pause_s)
        while len(self._seen) > _MOST:
            self._seen.popitem(last=False)
        if before is None and longest_s == LONGEST_PAUSE_S:
            text = "message %s is left to expire; received %d times, it comes again after %d s, later more rarely: %s"
            logger.warning(text, message_id, receive_count, pause_s, why)
        return pause_s

    def told(self) -> list[UnusableMessage]:
        """Those that are likely to be there still, the most often received ones first; ten at most."""
        now = self._clock()
        there = [one for one in self._seen.values() if now < one.again_at + (one.again_at - one.at) + _LATE_S]
        return sorted(there, key=lambda one: -one.receive_count)[:_MOST_TOLD]
