"""The runs that are meant, each in one row: where it is, what it waits for, since when. `run explain` has the details.

Reads ids first, and the rest only of the runs that are shown: the number of queries does not depend on how many there
are, except that 500 are read at a time. All calls block on the database, and nothing is changed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dagster import DagsterInstance, DagsterRunStatus, RunRecord, RunsFilter

from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.run_queue import queue_order
from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
from dagster_taskiq.run_query import PAGE, RunQuery, find_runs, partition_of
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.routing import route_of_run
from dagster_taskiq.storage.tags import TASK_ID_TAG, own_tags
from dagster_taskiq.storage.workers import ALIVE, describe_assets
from dagster_taskiq.story.around import look_around, places_in_queue, waits_for_pools
from dagster_taskiq.story.log import Log
from dagster_taskiq.story.model import Wait
from dagster_taskiq.story.phases import Phases
from dagster_taskiq.story.surroundings import Surroundings
from dagster_taskiq.story.waits import what_it_waits_for

Status = DagsterRunStatus

_IN_ORDER: Final = (
    Status.CANCELING,
    Status.STARTED,
    Status.STARTING,
    Status.NOT_STARTED,
    Status.MANAGED,
    Status.QUEUED,
)
"""What an operator has to look at first; then the queue, and last what is over."""


@dataclass(frozen=True, slots=True)
class ListedRun:
    """One run. Times are in seconds since the epoch."""

    run_id: str
    job: str
    """Or the assets of a run without a job of its own."""
    partition: str
    status: str
    since: float
    """Since when it has that status, as far as the run's own record says."""
    created: float
    worker: str | None = None
    worker_state: str | None = None
    """As in `worker list`."""
    queue: str | None = None
    """The SQS queue with the message of a run that was handed over and that no worker has."""
    position: int | None = None
    """In Dagster's queue, among the runs of its route: 1 is taken next."""
    waits_for: str = ""
    """In a few words; empty when it works, or is over."""
    why: str = ""
    """The same as a sentence."""
    route: str = DEFAULT_ROUTE


@dataclass(frozen=True, slots=True)
class RunList:
    """Rows, and what is not among them."""

    runs: tuple[ListedRun, ...]
    counts: Mapping[str, int]
    """By status, of all that are meant."""
    in_queue: int
    """Runs in Dagster's queue, of whatever kind; 0 when no row is of one."""
    more: int
    """That are meant and not shown."""
    now: float


def list_runs(instance: DagsterInstance, settings: Settings, query: RunQuery, limit: int) -> RunList:
    """The runs of that query, at most so many: first what is at work, then Dagster's queue in its order, then the rest.

    Of finished runs those that were created last. A query that the database cannot decide (an expression, partitions, a
    code location, any value of a tag) takes longer: of every run that is not finished it reads the record.
    """
    by_status, counts = (_read_all if query.needs_each_run else _read_ids)(instance, query, limit)
    order: Sequence[str] = ()
    if by_status.get(Status.QUEUED):
        order = queue_order(instance)
        place = {run_id: number for number, run_id in enumerate(order)}
        by_status[Status.QUEUED].sort(key=lambda run_id: place.get(run_id, len(place)))
    unfinished = [run_id for status in _IN_ORDER for run_id in by_status.get(status, ())]
    wanted = (unfinished + by_status.get(None, []))[:limit]
    records = _records(instance, wanted)
    rows = _Rows(instance, settings, records, order)
    shown = [rows.row(records[run_id]) for run_id in wanted if run_id in records]
    total = sum(counts.values())
    return RunList(tuple(shown), counts, len(order), max(0, total - len(wanted)), rows.around.common.now)


_Ids = dict[Status | None, list[str]]
"""By status, those of finished runs under None."""


def _read_ids(instance: DagsterInstance, query: RunQuery, limit: int) -> tuple[_Ids, dict[str, int]]:
    """Ids only, and of finished runs no more than are shown."""
    found: _Ids = {}
    counts: dict[str, int] = {}
    for status in _IN_ORDER:
        if status in query.statuses:
            # Dagster gives the newest first.
            found[status] = list(reversed(instance.get_run_ids(replace(query, statuses=(status,)).as_filter())))
            counts[status.value] = len(found[status])
    if finished := tuple(status for status in query.statuses if status in FINISHED_STATUSES):
        found[None] = list(instance.get_run_ids(replace(query, statuses=finished).as_filter(), limit=limit))
        for status in finished:
            counts[status.value] = instance.get_runs_count(replace(query, statuses=(status,)).as_filter())
    return found, {status: count for status, count in counts.items() if count}


def _read_all(instance: DagsterInstance, query: RunQuery, limit: int) -> tuple[_Ids, dict[str, int]]:
    """As `_read_ids`; of finished runs those are counted that are shown, and one more if there is one."""
    found: _Ids = {}
    counts: dict[str, int] = {}

    def take(records: Iterable[RunRecord], *, finished: bool) -> None:
        for record in records:
            run = record.dagster_run
            found.setdefault(None if finished else run.status, []).append(run.run_id)
            counts[run.status.value] = counts.get(run.status.value, 0) + 1

    if unfinished := tuple(status for status in query.statuses if status not in FINISHED_STATUSES):
        take(find_runs(instance, replace(query, statuses=unfinished)), finished=False)
    if over := tuple(status for status in query.statuses if status in FINISHED_STATUSES):
        take(find_runs(instance, replace(query, statuses=over), newest_first=True, limit=limit + 1), finished=True)
    return found, counts


def _records(instance: DagsterInstance, run_ids: Sequence[str]) -> dict[str, RunRecord]:
    found: dict[str, RunRecord] = {}
    for start in range(0, len(run_ids), PAGE):
        some = instance.get_run_records(RunsFilter(run_ids=run_ids[start : start + PAGE]))
        found.update((record.dagster_run.run_id, record) for record in some)
    return found


class _Rows:
    """What is known besides the records, read for all of them together."""

    def __init__(
        self, instance: DagsterInstance, settings: Settings, records: Mapping[str, RunRecord], order: Sequence[str]
    ) -> None:
        runs = [record.dagster_run for record in records.values()]
        self.around = look_around(instance, settings)
        self._settings = settings
        queued = [run for run in runs if run.status is Status.QUEUED]
        self._places = places_in_queue(instance, queued, order)
        self._in_order = set(order)
        self._pools = waits_for_pools(instance, [run.run_id for run in runs if run.status is Status.STARTED])
        handed_over = [
            run.run_id for run in runs if run.status not in FINISHED_STATUSES and run.status is not Status.QUEUED
        ]
        claims = Claims.of(instance, settings)
        self._claims = {
            run_id: claim
            for start in range(0, len(handed_over), PAGE)
            for run_id, claim in claims.read(handed_over[start : start + PAGE]).items()
        }

    def row(self, record: RunRecord) -> ListedRun:
        run = record.dagster_run
        owner = self.around.owner(self._claims.get(run.run_id))
        place = self._places.get(run.run_id)
        route = route_of_run(run)
        around = replace(
            self.around.common.of_route(route), owner=owner, queue=place, pools=self._pools.get(run.run_id, ())
        )
        wait = next(_waits(record, around), None)
        was_sent = run.status is not Status.QUEUED and TASK_ID_TAG in own_tags(run)
        return ListedRun(
            run_id=run.run_id,
            job=describe_assets(run) or run.job_name,
            partition=partition_of(run),
            status=run.status.value,
            since=_since(record),
            created=record.create_timestamp.timestamp(),
            worker=owner.worker_id if owner is not None else None,
            worker_state=owner.state if owner is not None else None,
            queue=self._queue(route) if was_sent and owner is None and run.status not in FINISHED_STATUSES else None,
            route=route,
            position=place.ahead + 1 if place is not None and run.run_id in self._in_order else None,
            waits_for=wait.cause if wait is not None else "",
            why=wait.what if wait is not None else "",
        )

    def _queue(self, route: str) -> str:
        return queue_name(self._settings.of_route(route).queue_url)


def _since(record: RunRecord) -> float:
    status, changed = record.dagster_run.status, record.update_timestamp.timestamp()
    if status in (Status.QUEUED, Status.NOT_STARTED):
        return record.create_timestamp.timestamp()
    if status is Status.STARTED:
        return record.start_time or changed
    return (record.end_time if status in FINISHED_STATUSES else None) or changed


def _waits(record: RunRecord, around: Surroundings) -> Iterator[Wait]:
    """As `run explain` says it, as far as that does not take the run's log."""
    run, since = record.dagster_run, _since(record)
    if run.status is Status.CANCELING and around.owner is not None and around.owner.state == ALIVE:
        return iter(())  # how far its worker is with it is only in its log
    was_sent = TASK_ID_TAG in own_tags(run)
    phases = Phases(queued_at=since, starting_at=since, submitted_at=since if was_sent else None)
    return what_it_waits_for(run.status.value, phases, (), Log(), around)
