"""Waiting for events: bounded, and log_context what was seen when the event does not come."""

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_until(
    look: Callable[[], _T],
    description: str,
    *,
    within: float = 40.0,
    every: float = 0.02,
    seen: Callable[[], object] | None = None,
) -> _T:
    """The first truthy answer of `look`. Fails after `within` seconds and prints what `seen` says."""
    deadline = time.monotonic() + within
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > deadline:
            what = f"; seen: {seen()}" if seen is not None else f"; last answer: {answer!r}"
            raise AssertionError(f"not within {within:g} s: {description}{what}")
        time.sleep(every)
