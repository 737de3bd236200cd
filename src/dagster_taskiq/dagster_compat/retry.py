"""Patience with Dagster's database, in processes and threads that may wait. Knows which of its errors pass."""

import time
from collections.abc import Callable
from typing import TypeVar

from dagster_taskiq._retry import DATABASE_RETRY_S, retry_blocking
from dagster_taskiq._time_limit import CALL_S, limited_until, time_limit
from dagster_taskiq.dagster_compat.storage import outages

_T = TypeVar("_T")


def retry_storage(call: Callable[[], _T], doing: str) -> _T:
    """Call it, again and again while the database is away, for as long as `DATABASE_RETRY_S`; then it raises.

    Each try is given up after `CALL_S` (see `connections`). Under a `time_limit` it is patient no longer than that.
    """
    until = limited_until()
    left_s = DATABASE_RETRY_S if until is None else max(0.0, until - time.monotonic())

    def once() -> _T:
        with time_limit(CALL_S):
            return call()

    return retry_blocking(once, doing=doing, on=outages(), for_s=min(DATABASE_RETRY_S, left_s))
