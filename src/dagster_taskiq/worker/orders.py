"""What people want of this worker, as it reads it with each of its heartbeats: begin nothing new, or stop.

Knows what is stored about that, and one callable; not how a worker stops, nor who reads the storage.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dagster_taskiq.storage.fleet import HOLD_KEY, Hold, StopRequest, log_hold, stop_key

logger = logging.getLogger(__name__)


class Orders:
    """Of one life of a worker. `news` is set when others should read at once in its heartbeat what has changed."""

    def __init__(self, worker_id: str, on_stop: Callable[[StopRequest], None], drain_s: float) -> None:
        """`on_stop`: called with each new request to stop; `drain_s`: how long the drain after it takes at most."""
        self._stop_key = stop_key(worker_id)
        self._on_stop = on_stop
        self._drain_s = drain_s
        self._released = asyncio.Event()
        self._released.set()
        self._request: StopRequest | None = None
        self._stopping: dict[str, Any] | None = None
        self.hold: Hold | None = None
        """The fleet is held: this worker begins no run."""
        self.news = asyncio.Event()

    @property
    def asks(self) -> Sequence[str]:
        """The keys whose values `hear` is to be given."""
        return (HOLD_KEY, self._stop_key)

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether there is a request that nobody needs any more when this worker has stopped."""
        return self._request is not None

    @property
    def cause(self) -> str:
        """Why work is stopped that has not ended when the drain is over."""
        asked = f", asked by {self._request.described()}" if self._request is not None else ""
        if not asked and self._stopping is not None and self._stopping["reason"]:
            asked = f": {self._stopping['reason']}"
        return f"the worker stops{asked}"

    def hear(self, values: Mapping[str, str]) -> None:
        """What is stored at those keys now. What cannot be read changes nothing."""
        hold = Hold.parse_or(self.hold, values.get(HOLD_KEY))
        if hold != self.hold:
            log_hold(hold)
            self.hold = hold
            self.news.set()
            if hold is None:
                self._released.set()
            else:
                self._released.clear()
        request = StopRequest.parse(values.get(self._stop_key))
        if request is not None and request != self._request:
            self._request = request
            self._on_stop(request)

    async def may_begin(self) -> None:
        """Return when the fleet is not held."""
        await self._released.wait()

    def stops(self, by: str, reason: str | None = None, *, finish: bool = False) -> None:
        """The worker has begun to stop: for the heartbeat. `finish`: it ends after its work, however long that takes.

        `by`: a person, or what else has made it stop.
        """
        now = time.time()
        self._stopping = {"at": now, "by": by, "reason": reason, "until": None if finish else now + self._drain_s}
        self.news.set()

    def facts(self) -> dict[str, Any]:
        """For the heartbeat: the hold that this worker has heard of, and that it stops."""
        found: dict[str, Any] = {"held": self.hold.since} if self.hold is not None else {}
        return found | ({"stopping": self._stopping} if self._stopping is not None else {})
