"""Stop an attempt that takes too long: by an exception in it, or by the end of its process. A leaf."""

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

HARD_TIMEOUT_S: Final = 5.0
"""For this time after its timeout an attempt may still run; then its process is ended."""


class _OutOfTime(BaseException):
    """An attempt took too long; an `except Exception` in it must not catch this."""


def too_long(seconds: float) -> str:
    """Why an attempt has failed that ended at its timeout."""
    return f"it took longer than its timeout of {seconds:g} s"


def no_reaction(seconds: float) -> str:
    """Why an attempt has failed that did not."""
    return f"it did not react to its timeout of {seconds:g} s, and its process was ended"


@contextmanager
def attempt_limit(seconds: float) -> Iterator[None]:
    """After these seconds, have `TimeoutError` leave the block. Code that does not react to it ends with the process.

    A thread without the interpreter lock ends the process, because the code that does not react may hold the lock. In
    the main thread only.
    """

    def out_of_time(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, out_of_time)
    faulthandler.dump_traceback_later(seconds + HARD_TIMEOUT_S, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(too_long(seconds)) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
