"""Try again what failed and may work later: log it once, wait longer each time, log when it works again. A leaf.

The pauses are tenacity's "full jitter": random, between zero and a limit that doubles each time. So workers that lose
a service at the same time do not all return to it at the same time.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception_type
from tenacity.stop import stop_after_delay, stop_never
from tenacity.wait import wait_random_exponential

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 10.0
DATABASE_RETRY_S: Final = 300.0
"""For a database that does not answer: a failover of RDS takes one to two minutes."""


async def retry_async(
    call: Callable[[], Awaitable[_T]],
    *,
    doing: str,
    on: type[Exception] | tuple[type[Exception], ...] = Exception,
    for_s: float | None = None,
    longest_pause_s: float = LONGEST_PAUSE_S,
    until: Callable[[], bool] = lambda: False,
) -> _T:
    """Return what `call` returns in the end; the log calls its failures "cannot `doing`".

    Raises the last error of `call` after `for_s` seconds, if that is given, or when `until` returns True. An error
    that is not `on` is raised at once.
    """
    retrying = AsyncRetrying(**_policy(doing, on, for_s, longest_pause_s, until))

    async def once() -> _T:  # tenacity awaits only what looks like a coroutine function
        return await call()

    return _log_recovery(doing, await retrying(once), retrying)


def retry_blocking(
    call: Callable[[], _T],
    *,
    doing: str,
    on: type[Exception] | tuple[type[Exception], ...] = Exception,
    for_s: float | None = None,
) -> _T:
    """As `retry_async`, where there is no event loop."""
    retrying = Retrying(**_policy(doing, on, for_s, LONGEST_PAUSE_S, lambda: False))
    return _log_recovery(doing, retrying(call), retrying)


def _policy(
    doing: str,
    on: type[Exception] | tuple[type[Exception], ...],
    for_s: float | None,
    longest_pause_s: float,
    until: Callable[[], bool],
) -> dict[str, Any]:
    def log_first_failure(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            logger.warning("cannot %s, trying again: %s", doing, state.outcome.exception())

    too_long = stop_never if for_s is None else stop_after_delay(for_s)
    return {
        "retry": retry_if_exception_type(on),
        "wait": wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=longest_pause_s),
        "stop": lambda state: until() or too_long(state),
        "before_sleep": log_first_failure,
        "reraise": True,
    }


def _log_recovery(doing: str, answer: _T, retrying: AsyncRetrying | Retrying) -> _T:
    tries = retrying.statistics.get("attempt_number", 1)
    if tries > 1:
        logger.warning("can %s again after %d tries", doing, tries - 1)
    return answer


def poll_until(look: Callable[[], _T], *, within_s: float, every_s: float) -> _T:
    """The first true answer of `look`, or its last one when `within_s` seconds are over. Blocks."""
    until = time.monotonic() + within_s
    while not (answer := look()) and time.monotonic() < until:
        time.sleep(every_s)
    return answer
