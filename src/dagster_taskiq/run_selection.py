"""Which runs are meant, and in which order they are to be stopped: read page by page, nothing is changed.

Knows Dagster's runs; not how one is cancelled. All calls block on the database.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster_shared.record import replace as with_fields

from dagster_taskiq._text import clean_text
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, PRIORITY_TAG
from dagster_taskiq.run_query import PAGE, UNFINISHED, RunQuery, Unclear, find_runs
from dagster_taskiq.termination import BEFORE_START

WhichRuns: TypeAlias = RunsFilter | RunQuery | Iterable[str] | Callable[[DagsterRun], bool]
"""A filter of Dagster's, a query of ours, ids, or a function that is asked about every run that is not finished."""


@dataclass(frozen=True, slots=True)
class RunSelection:
    """The ids of runs that are meant, as they were when they were read. Its length counts those that can be stopped."""

    waiting: tuple[str, ...] = ()
    """In Dagster's queue (QUEUED), in the order in which it would start them."""
    handed_over: tuple[str, ...] = ()
    """NOT_STARTED and STARTING: most of them have no worker yet."""
    at_work: tuple[str, ...] = ()
    """STARTED, and CANCELING already."""
    already_finished: tuple[str, ...] = ()
    not_found: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.handed_over) + len(self.at_work)

    def among(self, run_ids: Iterable[str]) -> "RunSelection":
        """Those of it that are among these."""
        kept = frozenset(run_ids)
        return RunSelection(*(tuple(filter(kept.__contains__, getattr(self, one.name))) for one in fields(self)))

    def new_to(self, seen: AbstractSet[str]) -> "RunSelection":
        """Those of it that can be stopped and are not among these."""
        return self.among({*self.waiting, *self.handed_over, *self.at_work} - seen)


def select_runs(instance: DagsterInstance, which: WhichRuns, *, unclear: Unclear | None = None) -> RunSelection:
    """The runs that `cancel_runs` would stop, for who wants to see or to count them first. Changes nothing.

    A filter or a query that names no statuses means runs that are not finished; one that does, also those that are.
    Ids are whole ids. Reads 500 runs at a time and keeps their ids. `unclear`: as for `find_runs`.
    """
    if callable(which) or isinstance(which, RunsFilter | RunQuery):
        return selection_of(_read(instance, which, unclear))
    run_ids = list(dict.fromkeys(map(clean_text, which)))
    found = selection_of(_read(instance, run_ids))
    known = {*found.waiting, *found.handed_over, *found.at_work, *found.already_finished}
    return replace(found, not_found=tuple(run_id for run_id in run_ids if run_id not in known))


def is_query(which: WhichRuns) -> bool:
    """Whether other runs may come to match it; ids do not."""
    return callable(which) or isinstance(which, RunsFilter | RunQuery)


def selection_of(runs: Iterable[DagsterRun]) -> RunSelection:
    """These runs, in the order in which they are to be stopped. Keeps their ids."""
    waiting: list[tuple[int, str]] = []
    others: dict[str, list[str]] = {"handed_over": [], "at_work": [], "already_finished": []}
    for run in runs:
        if run.status is DagsterRunStatus.QUEUED:
            waiting.append((-_priority(run), run.run_id))
        elif run.status in FINISHED_STATUSES:
            others["already_finished"].append(run.run_id)
        else:
            others["handed_over" if run.status in BEFORE_START else "at_work"].append(run.run_id)
    waiting.sort(key=lambda one: one[0])  # stable, as Dagster's daemon does it: of equals the oldest first
    found = {name: tuple(run_ids) for name, run_ids in others.items()}
    return RunSelection(tuple(run_id for _, run_id in waiting), **found)


def _read(instance: DagsterInstance, which: WhichRuns, unclear: Unclear | None = None) -> Iterator[DagsterRun]:
    if isinstance(which, RunQuery):
        query = which if which.statuses else replace(which, statuses=UNFINISHED)
        yield from (record.dagster_run for record in find_runs(instance, query, unclear=unclear))
    elif isinstance(which, RunsFilter):
        yield from _pages(instance, which if which.statuses else with_fields(which, statuses=list(UNFINISHED)))
    elif callable(which):
        yield from filter(which, _pages(instance, RunsFilter(statuses=list(UNFINISHED))))
    else:
        for run_ids in groups_of(PAGE, list(which)):
            yield from instance.get_runs(RunsFilter(run_ids=run_ids), ascending=True)


def groups_of(size: int, run_ids: Sequence[str]) -> Iterator[list[str]]:
    """In their order, so many at a time."""
    for start in range(0, len(run_ids), size):
        yield list(run_ids[start : start + size])


def _pages(instance: DagsterInstance, filters: RunsFilter) -> Iterator[DagsterRun]:
    cursor: str | None = None
    while True:
        page: Sequence[DagsterRun] = instance.get_runs(filters, cursor, PAGE, ascending=True)
        yield from page
        if len(page) < PAGE:
            return
        cursor = page[-1].run_id


def _priority(run: DagsterRun) -> int:
    """As Dagster's daemon reads it."""
    try:
        return int(run.tags.get(PRIORITY_TAG, "0"))
    except ValueError:
        return 0
