"""Waiting for events: bounded, and telling what was seen when the event does not come."""

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_until(
    look: Callable[[], _T],
    description: str,
    *,
    within: float = 40.0,
    every: float | None = None,
    seen: Callable[[], object] | None = None,
) -> _T:
    """The first truthy answer of `look`. Fails after `within` seconds and prints what `seen` says.

    Looks every so many seconds; by default often at first, and the less often the longer it lasts: looking costs the
    machine on which the awaited work is done.
    """
    began = time.monotonic()
    while True:
        answer = look()
        if answer:
            return answer
        waited = time.monotonic() - began
        if waited > within:
            what = f"; seen: {seen()}" if seen is not None else f"; last answer: {answer!r}"
            raise AssertionError(f"not within {within:g} s: {description}{what}")
        time.sleep(min(max(0.02, waited / 20), 0.25) if every is None else every)
