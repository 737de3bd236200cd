"""Runs of some statuses that have a tag, whatever its value: Dagster's own filter wants values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from dagster_taskiq.dagster_compat.run_counts import tag_has_key

__all__ = ["TaggedRun", "runs_with_tag"]

_TOGETHER: Final = 500
"""Runs whose tags are read in one query."""
_MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class TaggedRun:
    """A run, the value of its tag, and when it was created, in seconds since the epoch."""

    run_id: str
    status: DagsterRunStatus
    value: str
    created_at: float


def runs_with_tag(instance: DagsterInstance, tag: str, statuses: Iterable[DagsterRunStatus]) -> list[TaggedRun]:
    """The oldest first; of the first 10,000 runs of these statuses. One query where no run has ever had the tag."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
    from sqlalchemy import select

    storage, wanted = instance.run_storage, list(statuses)
    if not isinstance(storage, SqlRunStorage):
        records = instance.get_run_records(RunsFilter(statuses=wanted), limit=_MOST, ascending=True)
        return [
            TaggedRun(one.dagster_run.run_id, one.dagster_run.status, value, _seconds(one.create_timestamp))
            for one in records
            if (value := one.dagster_run.tags.get(tag)) is not None
        ]
    rows, tags = RunsTable.c, RunTagsTable.c
    waiting = (
        select(rows.run_id, rows.status, rows.create_timestamp)
        .where(rows.status.in_([status.value for status in wanted]))
        .order_by(rows.id)
        .limit(_MOST)
    )
    with storage.connect() as connection:
        if connection.execute(select(tags.run_id).where(tags.key == tag).limit(1)).first() is None:
            return []
        found = connection.execute(waiting).fetchall()
        values: dict[str, str] = {}
        for some in _groups([row[0] for row in found]):
            # No join: until PostgreSQL has analyzed its tables, it takes seconds for it.
            query = select(tags.run_id, tags.value).where(tags.run_id.in_(some), tag_has_key(tag))
            values.update((row[0], row[1]) for row in connection.execute(query).fetchall())
    return [
        TaggedRun(run_id, DagsterRunStatus(status), values[run_id], _seconds(created))
        for run_id, status, created in found
        if run_id in values
    ]


def _groups(run_ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (run_ids[start : start + _TOGETHER] for start in range(0, len(run_ids), _TOGETHER))


def _seconds(at: datetime) -> float:
    """Dagster's storages have UTC without a time zone."""
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
