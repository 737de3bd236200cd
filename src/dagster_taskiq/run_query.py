"""Which runs are meant, as a person says it: a job, tags, a schedule, partitions, an expression.

Knows Dagster's runs and their tags; not what is done with them. What the database can decide, it decides; the rest is
asked of every run that is read, page by page.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord, RunsFilter

from dagster_taskiq.dagster_compat.api import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    BACKFILL_ID_TAG,
    FINISHED_STATUSES,
    MULTIDIMENSIONAL_PARTITION_PREFIX,
    PARTITION_NAME_TAG,
    SCHEDULE_NAME_TAG,
    SENSOR_NAME_TAG,
)
from dagster_taskiq.errors import QueryError
from dagster_taskiq.run_where import Tags, where
from dagster_taskiq.storage.routing import code_location_of

UNFINISHED: Final = tuple(status for status in DagsterRunStatus if status not in FINISHED_STATUSES)
PAGE: Final = 500
"""Runs that are read at a time."""
Unclear: TypeAlias = Callable[[str, QueryError], object]
"""Is told of a run, by its id, that it cannot be told whether it is meant, and why."""


@dataclass(frozen=True, slots=True)
class RunQuery:
    """Which runs are meant; all that is given has to be true of a run. Raises `QueryError` when it contradicts itself.

    `tags`: pairs; with None instead of a value, the run has that tag. Of several pairs with one key, one has to fit.
    `statuses`: none means any. `partition`: a partition key, or DIMENSION=KEY. `partition_range`: first and last, both
    included, an empty text for an open end; see `is_between`. `location`: the code location. `where`: an expression,
    see `run_where`. `older_than_s`: seconds since the run was created.
    """

    job: str | None = None
    tags: tuple[tuple[str, str | None], ...] = ()
    statuses: tuple[DagsterRunStatus, ...] = ()
    schedule: str | None = None
    sensor: str | None = None
    backfill: str | None = None
    partition: str | None = None
    partition_range: tuple[str, str] | None = None
    location: str | None = None
    where: str | None = None
    older_than_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse what can mean no run."""
        if sum(one is not None for one in (self.schedule, self.sensor, self.backfill)) > 1:
            raise QueryError("a run is launched by one schedule, sensor or backfill; give one of them")
        if self.partition is not None and self.partition_range is not None:
            raise QueryError("a partition and a range of partitions exclude each other; give one of them")
        if self.partition_range is not None:
            first, last = self.partition_range
            last = last.removeprefix(first.partition("=")[0] + "=")
            if first and last and _order(first.partition("=")[2] or first) > _order(last):
                raise QueryError(f"the range of partitions {first}..{last} is empty: its end is before its beginning")
        if self.where is not None:
            where(self.where)

    @property
    def is_empty(self) -> bool:
        """Whether it means every run, whatever its status."""
        return replace(self, statuses=()) == RunQuery()

    @property
    def needs_each_run(self) -> bool:
        """Whether `as_filter` does not decide it: every run that the database gives has to be asked."""
        return any(None in values for values in self._wanted_tags().values()) or any(
            one is not None for one in (self.partition, self.partition_range, self.location, self.where)
        )

    def matches(self, run: DagsterRun, created: float, now: float | None = None) -> bool:
        """Whether this run is meant. `created`, `now`: seconds since the epoch."""
        age = (time.time() if now is None else now) - created
        return (
            (not self.statuses or run.status in self.statuses)
            and (self.job is None or run.job_name == self.job)
            and all(
                key in run.tags and (None in values or run.tags[key] in values)
                for key, values in self._wanted_tags().items()
            )
            and (self.older_than_s is None or age >= self.older_than_s)
            and (self.location is None or location_of(run) == self.location)
            and self._has_partition(run)
            and self._is_true_of(run, age)
        )

    def as_filter(self, now: float | None = None) -> RunsFilter:
        """What the database can decide of it."""
        before = None
        if self.older_than_s is not None:
            before = datetime.fromtimestamp((time.time() if now is None else now) - self.older_than_s, UTC)
        tags: dict[str, str | Sequence[str]] = {}
        for key, values in self._wanted_tags().items():
            if None not in values:
                tags[key] = [value for value in values if value is not None]
        return RunsFilter(job_name=self.job, tags=tags, statuses=list(self.statuses), created_before=before)

    def _wanted_tags(self) -> dict[str, list[str | None]]:
        wanted: dict[str, list[str | None]] = {}
        for key, value in self.tags:
            wanted.setdefault(key, []).append(value)
        launched_by = (
            (SCHEDULE_NAME_TAG, self.schedule), (SENSOR_NAME_TAG, self.sensor), (BACKFILL_ID_TAG, self.backfill)
        )  # fmt: skip
        for key, name in launched_by:
            if name is not None:
                wanted[key] = [name]
        return wanted

    def _is_true_of(self, run: DagsterRun, age_s: float) -> bool:
        if self.where is None:
            return True
        try:
            return where(self.where)(attributes_of(run, age_s))
        except QueryError as error:
            raise QueryError(f"{error}; of run {run.run_id}") from error

    def _has_partition(self, run: DagsterRun) -> bool:
        given = (self.partition, self.partition) if self.partition is not None else self.partition_range
        if given is None:
            return True
        return any(is_between(*given, dimension, *keys) for dimension, keys in _partitions(run))


def find_runs(
    instance: DagsterInstance,
    query: RunQuery,
    *,
    newest_first: bool = False,
    limit: int | None = None,
    unclear: Unclear | None = None,
) -> Iterator[RunRecord]:
    """The records of the runs that are meant, in the order in which they were created. Blocks on the database.

    Reads 500 at a time, and no more pages than are needed for `limit` of them. Raises `QueryError` for a run of which
    the expression cannot be evaluated; with `unclear` that is told of it, and the run is left out.
    """
    now, found = time.time(), 0
    cursor: str | None = None
    while limit is None or found < limit:
        page = instance.get_run_records(query.as_filter(now), limit=PAGE, ascending=not newest_first, cursor=cursor)
        for record in page:
            try:
                is_meant = query.matches(record.dagster_run, record.create_timestamp.timestamp(), now)
            except QueryError as error:
                if unclear is None:
                    raise
                unclear(record.dagster_run.run_id, error)
                continue
            if is_meant:
                yield record
                found += 1
                if found == limit:
                    return
        if len(page) < PAGE:
            return
        cursor = page[-1].dagster_run.run_id


def location_of(run: DagsterRun) -> str:
    """The code location that a run is of; empty for one that was launched without any."""
    return code_location_of(run) or ""


def partition_of(run: DagsterRun) -> str:
    """Its partition key, or "first..last" of a run that has a range of them; empty without any."""
    for dimension, (first, last) in _partitions(run):
        if dimension is None:
            return first if first == last else f"{first}..{last}"
    return ""


def attributes_of(run: DagsterRun, age_s: float) -> dict[str, Any]:
    """What an expression can name of a run; the same names as in `run_where.SAMPLE`."""
    return {
        "run_id": run.run_id,
        "job": run.job_name,
        "status": run.status.value,
        "tags": Tags(run.tags),
        "partition": partition_of(run),
        "age": age_s,
        "location": location_of(run),
        "assets": sorted(key.to_user_string() for key in run.asset_selection or ()),
        "schedule": run.tags.get(SCHEDULE_NAME_TAG, ""),
        "sensor": run.tags.get(SENSOR_NAME_TAG, ""),
        "backfill": run.tags.get(BACKFILL_ID_TAG, ""),
    }


def is_between(first: str, last: str, dimension: str | None, its_first: str, its_last: str) -> bool:
    """Whether partitions from `its_first` to `its_last`, of that dimension if any, are among `first` to `last`.

    Dagster's instance does not know the partitions definitions, so keys are compared as text, and numbers in it by
    their value: as the calendar for dates, and p2 before p10. With a dimension, `first` has to name it (`date=…`).
    """
    if dimension is not None:
        if not first.startswith(f"{dimension}="):
            return False
        first, last = first.removeprefix(f"{dimension}="), last.removeprefix(f"{dimension}=")
    if first == last:
        return its_first == first if its_first == its_last else _order(its_first) <= _order(first) <= _order(its_last)
    return (not last or _order(its_first) <= _order(last)) and (not first or _order(its_last) >= _order(first))


def _partitions(run: DagsterRun) -> Iterator[tuple[str | None, tuple[str, str]]]:
    """By dimension, or None for all of them: the first and the last partition key of a run."""
    for tag, value in run.tags.items():
        if tag.startswith(MULTIDIMENSIONAL_PARTITION_PREFIX):
            yield tag.removeprefix(MULTIDIMENSIONAL_PARTITION_PREFIX), (value, value)
    if (partition := run.tags.get(PARTITION_NAME_TAG)) is not None:
        yield None, (partition, partition)
    start, end = (run.tags.get(tag) for tag in (ASSET_PARTITION_RANGE_START_TAG, ASSET_PARTITION_RANGE_END_TAG))
    if start is not None and end is not None:
        yield None, (start, end)


def _order(key: str) -> list[Any]:
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", key))]
