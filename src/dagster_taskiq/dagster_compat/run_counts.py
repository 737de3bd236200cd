"""Many runs of Dagster's storage counted in one statement each: what waits, and what will not start any more."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from dagster_taskiq.dagster_compat.api import BACKFILL_ID_TAG

__all__ = [
    "CANCELLED_BACKFILL",
    "TaggedCount",
    "WaitingCount",
    "count_by_tag",
    "count_cancelled_before_start",
    "count_older",
    "count_waiting",
    "tag_has_key",
    "tag_values",
    "without_tag",
]

_TOGETHER: Final = 500
"""Runs whose tags are read in one query."""
CANCELLED_BACKFILL: Final = frozenset({"CANCELING", "CANCELED", "FAILING"})
"""Statuses of a backfill whose runs Dagster's daemon ends; no worker starts one of them."""


@dataclass(frozen=True, slots=True)
class WaitingCount:
    """How many runs wait and will start, when the oldest of them was created, and how many will not start."""

    count: int
    oldest: float | None
    of_cancelled_backfills: int = 0


@dataclass(frozen=True, slots=True)
class TaggedCount:
    """How many runs have that status and that value of a tag; None: they do not have the tag."""

    status: DagsterRunStatus
    value: str | None
    count: int


def count_by_tag(instance: DagsterInstance, tag: str, statuses: Iterable[DagsterRunStatus]) -> list[TaggedCount]:
    """The runs of these statuses, by status and by the value of one tag, in one query."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable
    from sqlalchemy import func, select

    storage, wanted = instance.run_storage, list(statuses)
    if not isinstance(storage, SqlRunStorage):
        found = Counter((run.status, run.tags.get(tag)) for run in instance.get_runs(RunsFilter(statuses=wanted)))
        return [TaggedCount(status, value, count) for (status, value), count in found.items()]
    runs = RunsTable.c
    of_status = runs.status.in_([status.value for status in wanted])
    each = select(runs.status, _value_of(tag).label("value")).where(of_status).subquery()
    query = select(each.c.status, each.c.value, func.count()).group_by(each.c.status, each.c.value)
    with storage.connect() as connection:
        rows = connection.execute(query).fetchall()
    return [TaggedCount(DagsterRunStatus(status), value, count) for status, value, count in rows]


def without_tag(instance: DagsterInstance, tag: str, status: DagsterRunStatus, limit: int) -> list[str]:
    """Ids of runs of that status that do not have the tag, the oldest first; so many at most."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
    from sqlalchemy import exists, select

    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        found = instance.get_runs(RunsFilter(statuses=[status]), ascending=True)
        return [run.run_id for run in found if tag not in run.tags][:limit]
    runs, tags = RunsTable.c, RunTagsTable.c
    has_it = exists(select(tags.id).where(tags.run_id == runs.run_id, tag_has_key(tag)))
    query = select(runs.run_id).where(runs.status == status.value, ~has_it).order_by(runs.id).limit(limit)
    with storage.connect() as connection:
        return [row[0] for row in connection.execute(query).fetchall()]


def tag_values(instance: DagsterInstance, tag: str, run_ids: Sequence[str]) -> dict[str, str]:
    """By run, the value of the tag; runs without it are left out. 500 runs in a query."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunTagsTable
    from sqlalchemy import select

    storage, tags = instance.run_storage, RunTagsTable.c
    found: dict[str, str] = {}
    for start in range(0, len(run_ids), _TOGETHER):
        some = run_ids[start : start + _TOGETHER]
        if not isinstance(storage, SqlRunStorage):
            runs = instance.get_runs(RunsFilter(run_ids=some))
            found.update((run.run_id, run.tags[tag]) for run in runs if tag in run.tags)
            continue
        # No join: until PostgreSQL has analyzed its tables, as when many runs have just come, it takes seconds for it.
        query = select(tags.run_id, tags.value).where(tags.run_id.in_(some), tag_has_key(tag))
        with storage.connect() as connection:
            found.update((row[0], row[1]) for row in connection.execute(query).fetchall())
    return found


def _value_of(tag: str) -> Any:
    """The value of that tag, of the run in a query of runs; NULL when it does not have it."""
    from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
    from sqlalchemy import func, select

    tags = RunTagsTable.c
    # The least: a run has one. Without it the databases could not know.
    query = select(func.min(tags.value)).where(tags.run_id == RunsTable.c.run_id, tag_has_key(tag))
    return query.correlate(RunsTable).scalar_subquery()


def count_waiting(
    instance: DagsterInstance, statuses: Iterable[DagsterRunStatus], by_tag: str
) -> dict[str | None, WaitingCount]:
    """The runs of these statuses, by the value of a tag; None: without it. A value that no run has is not there.

    In a storage that is not SQL, those of cancelled backfills are not told apart.
    """
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import BulkActionsTable, RunsTable, RunTagsTable
    from sqlalchemy import case, exists, func, select

    storage, wanted = instance.run_storage, list(statuses)
    if not isinstance(storage, SqlRunStorage):
        found: dict[str | None, WaitingCount] = {}
        for record in instance.get_run_records(RunsFilter(statuses=wanted), ascending=True):
            value = record.dagster_run.tags.get(by_tag)
            known = found.get(value, WaitingCount(0, _seconds(record.create_timestamp)))
            found[value] = WaitingCount(known.count + 1, known.oldest)
        return found
    runs, tags, backfills = RunsTable.c, RunTagsTable.c, BulkActionsTable.c
    is_cancelled: Any = exists(
        select(tags.id)
        .select_from(RunTagsTable.join(BulkActionsTable, backfills.key == tags.value))
        .where(tags.run_id == runs.run_id, tag_has_key(BACKFILL_ID_TAG), backfills.status.in_(CANCELLED_BACKFILL))
    )
    each = (
        select(_value_of(by_tag).label("value"), case((is_cancelled, 1)).label("cancelled"), runs.create_timestamp)
        .where(runs.status.in_([status.value for status in wanted]))
        .subquery()
    )
    live_since = func.min(case((each.c.cancelled.is_(None), each.c.create_timestamp)))
    query = select(each.c.value, func.count(), func.count(each.c.cancelled), live_since).group_by(each.c.value)
    with storage.connect() as connection:
        rows = connection.execute(query).fetchall()
    return {
        value: WaitingCount(count - cancelled, _seconds(oldest) if oldest is not None else None, cancelled)
        for value, count, cancelled, oldest in rows
    }


def count_older(
    instance: DagsterInstance, statuses: Iterable[DagsterRunStatus], than: datetime, by_tag: str
) -> dict[str | None, int]:
    """The runs of these statuses that were created before that time, by the value of a tag; None: without it."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable
    from sqlalchemy import func, select

    storage, wanted = instance.run_storage, list(statuses)
    if not isinstance(storage, SqlRunStorage):
        runs_found = instance.get_runs(RunsFilter(statuses=wanted, created_before=than))
        return dict(Counter(run.tags.get(by_tag) for run in runs_found))
    runs = RunsTable.c
    each = (
        select(_value_of(by_tag).label("value"))
        .where(runs.status.in_([status.value for status in wanted]))
        .where(runs.create_timestamp < than.astimezone(UTC).replace(tzinfo=None))
        .subquery()
    )
    query = select(each.c.value, func.count()).group_by(each.c.value)
    with storage.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query).fetchall()}


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
