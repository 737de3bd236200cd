"""Patience with Dagster's database, in processes and threads that may wait. Knows which of its errors pass."""

from collections.abc import Callable
from typing import TypeVar

from dagster_taskiq import dagster_internals as core
from dagster_taskiq.patience import DATABASE_PATIENCE_S, patiently_blocking

_T = TypeVar("_T")


def patiently_asking(call: Callable[[], _T], doing: str) -> _T:
    """Call it, again and again while the database is away, for as long as `DATABASE_PATIENCE_S`; then it raises."""
    return patiently_blocking(call, doing=doing, on=core.outages(), for_s=DATABASE_PATIENCE_S)
