"""Remember a limited number of things for a limited time. Knows time, not what is remembered."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class TTLCache(Generic[V]):
    """A bounded mapping that forgets its entries after `ttl_s` seconds; when it is full, it drops the oldest one."""

    def __init__(
        self, *, at_most: int = 10_000, ttl_s: float = float("inf"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ttl_s = ttl_s
        self._at_most = at_most
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, V]] = OrderedDict()

    def add(self, key: str, value: V) -> bool:
        """Keep it from now on; False when it was there already (its time then starts again)."""
        new = self.get(key) is None
        self._entries.pop(key, None)
        self._entries[key] = (self._clock(), value)
        while len(self._entries) > self._at_most:
            self._entries.popitem(last=False)
        return new

    def get(self, key: str) -> V | None:
        """The value of the key, or None when there is none, or it is too old."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() - entry[0] > self.ttl_s:
            del self._entries[key]
            return None
        return entry[1]

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None
