"""Many runs of Dagster's storage counted in one statement each: what waits, and what will not start any more."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from dagster_taskiq.dagster_compat.api import BACKFILL_ID_TAG

__all__ = ["CANCELLED_BACKFILL", "WaitingCount", "count_cancelled_before_start", "count_waiting", "tag_has_key"]

CANCELLED_BACKFILL: Final = frozenset({"CANCELING", "CANCELED", "FAILING"})
"""Statuses of a backfill whose runs Dagster's daemon ends; no worker starts one of them."""


@dataclass(frozen=True, slots=True)
class WaitingCount:
    """How many runs wait and will start, when the oldest of them was created, and how many will not start."""

    count: int
    oldest: float | None
    of_cancelled_backfills: int = 0


def count_waiting(instance: DagsterInstance, statuses: Iterable[DagsterRunStatus]) -> WaitingCount:
    """The runs of these statuses. In a storage that is not SQL, those of cancelled backfills are not told apart."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import BulkActionsTable, RunsTable, RunTagsTable
    from sqlalchemy import case, exists, func, select

    storage, wanted = instance.run_storage, list(statuses)
    if not isinstance(storage, SqlRunStorage):
        filters = RunsFilter(statuses=wanted)
        oldest = instance.get_run_records(filters, limit=1, ascending=True)
        return WaitingCount(
            instance.get_runs_count(filters), min((_seconds(one.create_timestamp) for one in oldest), default=None)
        )
    runs, tags, backfills = RunsTable.c, RunTagsTable.c, BulkActionsTable.c
    is_cancelled: Any = exists(
        select(tags.id)
        .select_from(RunTagsTable.join(BulkActionsTable, backfills.key == tags.value))
        .where(tags.run_id == runs.run_id, tag_has_key(BACKFILL_ID_TAG), backfills.status.in_(CANCELLED_BACKFILL))
    )
    query = select(
        func.count(), func.count(case((is_cancelled, 1))), func.min(case((~is_cancelled, runs.create_timestamp)))
    ).where(runs.status.in_([status.value for status in wanted]))
    with storage.connect() as connection:
        count, cancelled, oldest_at = connection.execute(query).one()
    return WaitingCount(count - cancelled, _seconds(oldest_at) if oldest_at is not None else None, cancelled)


def count_cancelled_before_start(instance: DagsterInstance, with_tag: str, after: datetime) -> int | None:
    """CANCELED runs that have that tag, were never STARTED, and were changed after that time.

    None where the storage cannot tell: it is not SQL, or its schema is older than Dagster 0.15.
    """
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
    from sqlalchemy import exists, func, select

    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage) or not storage.has_run_stats_index_cols():
        return None
    runs, tags = RunsTable.c, RunTagsTable.c
    query = select(func.count()).where(
        runs.status == DagsterRunStatus.CANCELED.value,
        runs.update_timestamp > after.astimezone(UTC).replace(tzinfo=None),
        runs.start_time.is_(None),
        exists(select(tags.id).where(tags.run_id == runs.run_id, tag_has_key(with_tag))),
    )
    with storage.connect() as connection:
        return int(connection.execute(query).scalar_one())


def tag_has_key(key: str) -> Any:
    """A condition on a row of run tags that was found by its run, and is to be found so.

    SQLite, which has no statistics here, would look it up by the key, and so read the tags of all runs for each run:
    half a minute for 5,000 of them (measured).
    """
    from dagster._core.storage.runs.schema import RunTagsTable
    from sqlalchemy import func

    return func.coalesce(RunTagsTable.c.key, "") == key


def _seconds(at: datetime) -> float:
    """Dagster's storages have UTC without a time zone."""
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
