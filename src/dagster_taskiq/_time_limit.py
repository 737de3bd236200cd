"""How long the calls of this thread may take together. A leaf; knows only time.

Python cannot stop a call that waits for an answer which never comes. But who waits can be told how long it may: the
connections to the database (`dagster_compat.connections`) are closed when the time is over, and that ends the wait.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

CALL_S: Final = 15.0
"""For a call to the database about one run or step: it takes milliseconds. Dagster's webserver allows as much."""
_limits = threading.local()


@contextmanager
def time_limit(within_s: float) -> Iterator[None]:
    """What is called in here, by this thread, has so many seconds; less, if less is left of a limit around this one.

    Raises `TimeoutError` from whatever error ends it when the time is over. A result that comes late is a result.
    """
    outer: float | None = getattr(_limits, "until", None)
    until = time.monotonic() + within_s
    _limits.until = until if outer is None else min(until, outer)
    try:
        yield
    except Exception as error:
        if time.monotonic() < _limits.until:
            raise
        raise TimeoutError(f"no answer within {within_s:g} s") from error
    finally:
        _limits.until = outer


def check_time() -> None:
    """Raise `TimeoutError` when the time of this thread is over: nobody waits for it any more.

    To be called before a write that somebody else may have made, or must no longer be made, by then.
    """
    until = limited_until()
    if until is not None and time.monotonic() > until:
        raise TimeoutError("the time for this is over")


def limited_until() -> float | None:
    """When the time of this thread is over, by `time.monotonic`; None without a limit."""
    until: float | None = getattr(_limits, "until", None)
    return until
