"""Which runs wait for a worker, and why? Knows Dagster's runs and workers' heartbeats; not SQS.

All calls block on the database.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from dagster import DagsterInstance, DagsterRunStatus, RunRecord, RunsFilter

from dagster_taskiq.dagster_compat.run_counts import count_cancelled_before_start, count_older, count_waiting
from dagster_taskiq.queue_names import DEFAULT_ROUTE, is_route, queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.claims import held_claims
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.fleet import Hold, read_hold
from dagster_taskiq.storage.routing import route_of_run, sorted_routes
from dagster_taskiq.storage.tags import ROUTE_TAG, TASK_ID_TAG
from dagster_taskiq.storage.workers import ALIVE, WorkerInfo, list_workers

logger = logging.getLogger(__name__)

HELD: Final = "the fleet is held"
"""Why runs wait, beside the line that says by whom."""
NOTED_AFTER_S: Final = 60.0
_LOOK_EVERY_S: Final = 30.0
_NOTES_AT_ONCE: Final = 100
WAITING_STATUSES: Final = (DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING)
_IN_PROGRESS: Final = RunsFilter(
    statuses=[DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
)
_MESSAGES_ARE_KEPT: Final = timedelta(days=14)
"""The longest that SQS allows."""


@dataclass(frozen=True, slots=True)
class WaitingRuns:
    """How many runs wait, and since when the oldest one has been there, in seconds; 0 when there is none."""

    count: int
    """Those that will start."""
    oldest_s: float
    of_cancelled_backfills: int = 0
    """Those that wait and will not start: no worker starts them, and Dagster's daemon ends them."""

    def described(self, why: str) -> str | None:
        """One line about all of them; None when there is none. `why`: as `why_runs_wait` says it."""
        if not self.count:
            return None
        many = f"{self.count} runs wait, the oldest" if self.count > 1 else "1 run waits,"
        return f"{many} for {self.oldest_s:.0f} s: {why}"


@dataclass(frozen=True, slots=True)
class CancelledRuns:
    """What will not start, or is about to end, although it may look as if it waited."""

    canceling: int
    """Runs that are being cancelled."""
    without_worker: int
    """Those of them that no living worker has: the next one that receives the run's message finishes it."""
    messages: int | None
    """Messages in the work queue, about, whose run was cancelled before a worker had it. None: it cannot be told."""


def waiting_runs(instance: DagsterInstance) -> WaitingRuns:
    """The runs in Dagster's queue, and those that were handed over and are not at work yet. Blocks on the database.

    Those that a limit of the run queue, of a tag or of a pool holds back are among them.
    """
    return all_waiting(waiting_by_route(instance).values())


def waiting_by_route(instance: DagsterInstance) -> dict[str, WaitingRuns]:
    """The same by route; a route of which no run waits is left out. Blocks on the database."""
    now = time.time()
    found: dict[str, WaitingRuns] = {}
    for value, one in count_waiting(instance, WAITING_STATUSES, ROUTE_TAG).items():
        route = value if value is not None and is_route(value) else DEFAULT_ROUTE
        oldest_s = max(0.0, now - one.oldest) if one.oldest is not None else 0.0
        waiting = WaitingRuns(one.count, oldest_s, one.of_cancelled_backfills)
        found[route] = all_waiting((found[route], waiting)) if route in found else waiting
    return found


def routes_in_use(instance: DagsterInstance, settings: Settings, workers: Iterable[WorkerInfo]) -> tuple[str, ...]:
    """The unnamed route, those of rules, of living workers, and of runs that wait. `workers`: of `list_workers`."""
    served = (route for worker in workers if worker.state == ALIVE for route in worker.routes)
    ruled = (rule.route for rule in settings.routes)
    return sorted_routes([DEFAULT_ROUTE, *ruled, *served, *waiting_by_route(instance)])


def all_waiting(some: Iterable[WaitingRuns]) -> WaitingRuns:
    """All of these together."""
    some = tuple(some)
    return WaitingRuns(
        sum(one.count for one in some),
        max((one.oldest_s for one in some), default=0.0),
        sum(one.of_cancelled_backfills for one in some),
    )


def cancelled_runs(instance: DagsterInstance, workers: Sequence[WorkerInfo], visible: int | None) -> CancelledRuns:
    """What of all that seems to wait is cancelled already. Blocks on the database.

    `workers`: those of `list_workers`. `visible`: how many messages wait in the work queue. A message says only to who
    receives it which run it is of. But each run in progress that no living worker has needs one; the others are of runs
    that were cancelled, as many as were cancelled before they were started at most.
    """
    living = {worker.worker_id for worker in workers}
    claimed = [claim.run_id for claim in held_claims(instance) if claim.worker_id in living]
    needed = runs_in_progress(instance) - _count_among(instance, claimed, *_IN_PROGRESS.statuses)
    canceling = instance.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.CANCELING]))
    never_started = None
    if visible is not None:
        since = datetime.now(UTC) - _MESSAGES_ARE_KEPT
        never_started = count_cancelled_before_start(instance, TASK_ID_TAG, since)
    messages = None
    if never_started is not None and visible is not None:
        messages = min(never_started, max(0, visible - needed))
    return CancelledRuns(canceling, canceling - _count_among(instance, claimed, DagsterRunStatus.CANCELING), messages)


def _count_among(instance: DagsterInstance, run_ids: Sequence[str], *statuses: DagsterRunStatus) -> int:
    return instance.get_runs_count(RunsFilter(run_ids=run_ids, statuses=statuses)) if run_ids else 0


def runs_in_progress(instance: DagsterInstance) -> int:
    """How many runs Dagster counts against the limit of its queue. Blocks on the database."""
    return instance.get_runs_count(_IN_PROGRESS)


def describe_waiting(
    instance: DagsterInstance, settings: Settings, workers: Sequence[WorkerInfo], hold: Hold | None = None
) -> list[str]:
    """A line about all runs that wait of each route; none when no run waits. `workers`: those of `list_workers`."""
    lines = []
    waiting = waiting_by_route(instance)
    for route in sorted_routes(waiting):
        why = why_runs_wait(workers, settings, route) if hold is None else HELD
        if (line := waiting[route].described(why)) is not None:
            lines.append(f"route {route}: {line}" if {*waiting} != {DEFAULT_ROUTE} else line)
    return lines


def describe_wait(instance: DagsterInstance, settings: Settings, run_id: str) -> str:
    """One line about a run that no worker has: for how long it has waited, how many are older, and why."""
    hold = read_hold(instance)
    record = instance.get_run_record_by_id(run_id)
    if record is None:
        return "it was deleted"
    route = route_of_run(record.dagster_run)
    why = hold.described() if hold is not None else why_runs_wait(list_workers(instance, settings), settings, route)
    older = count_older(instance, WAITING_STATUSES, record.create_timestamp, ROUTE_TAG).get(_tag_of(record), 0)
    return engine_events.waiting(time.time() - record.create_timestamp.timestamp(), older, why).message


class WaitNotes:
    """Writes into the log of each run that has waited for a minute what it waits for, once.

    Keep the object. What had waited for a minute before it was made is not written about again.
    """

    def __init__(
        self, instance: DagsterInstance, settings: Settings, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._instance = instance
        self._settings = settings
        self._clock = clock
        self._look_at = 0.0
        self._written_until = _utc(clock() - NOTED_AFTER_S)
        self._failed_at: str | None = None
        """The run whose note could not be written at the last look."""

    def write(self) -> None:
        """Look twice a minute at most, and never raise: a note that is missing must not keep a run from being launched.

        One query when no run has waited for so long; a hundred notes at a time.
        """
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY_S
        try:
            self._write(now)
        except Exception:
            logger.exception("it could not be noted why runs wait")

    def _write(self, now: float) -> None:
        due = RunsFilter(
            statuses=WAITING_STATUSES, created_after=self._written_until, created_before=_utc(now - NOTED_AFTER_S)
        )
        records = self._instance.get_run_records(due, limit=_NOTES_AT_ONCE, ascending=True)
        if not records:
            return
        workers = list_workers(self._instance, self._settings)
        older = count_older(self._instance, WAITING_STATUSES, records[0].create_timestamp, ROUTE_TAG)
        for record in records:
            run, value = record.dagster_run, _tag_of(record)
            waited_s = now - record.create_timestamp.timestamp()
            try:
                why = why_runs_wait(workers, self._settings, route_of_run(run))
                append_event(self._instance, run, engine_events.waiting(waited_s, older.get(value, 0), why))
            except Exception:
                # Once it may be an outage; twice it is this run, and those after it must not wait for it.
                if self._failed_at != run.run_id:
                    self._failed_at = run.run_id
                    raise
                logger.warning("no note about why run %s waits", run.run_id, exc_info=True)
            older[value] = older.get(value, 0) + 1
            self._written_until = record.create_timestamp


def _tag_of(record: RunRecord) -> str | None:
    return record.dagster_run.tags.get(ROUTE_TAG)


def _utc(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def why_runs_wait(workers: Sequence[WorkerInfo], settings: Settings, route: str = DEFAULT_ROUTE) -> str:
    """What keeps a route's runs from a worker, as far as heartbeats tell. `workers`: those of `list_workers`."""
    serving = serving_runs(workers, settings, route)
    if not serving:
        return no_worker(route, "runs")
    slots = sum(one.runs or 0 for one in serving)
    free = slots - sum(work.step_key is None for one in serving for work in one.work)
    if free <= 0:
        return f"no free slot, {slots} of {slots} are taken (workers: {len(serving)})"
    return (
        f"{free} of {slots} slots are free; a worker is about to receive it, or a limit of the run queue holds it back"
    )


def serving(workers: Iterable[WorkerInfo], settings: Settings, route: str) -> list[WorkerInfo]:
    """The living workers that serve a route of this queue."""
    queue = queue_name(settings.queue_url)
    return [one for one in workers if one.state == ALIVE and one.queue in (None, queue) and route in one.routes]


def serving_runs(workers: Iterable[WorkerInfo], settings: Settings, route: str) -> list[WorkerInfo]:
    """Those of them that take runs."""
    return [one for one in serving(workers, settings, route) if one.runs]


def serving_steps(workers: Iterable[WorkerInfo], settings: Settings, route: str) -> list[WorkerInfo]:
    """Those of them that take steps."""
    return [one for one in serving(workers, settings, route) if one.steps]


def no_worker(route: str, what: str) -> str:
    """Nobody serves a route. `what`: "runs" or "steps"."""
    if route == DEFAULT_ROUTE:
        return f"no worker that takes {what} is alive"
    start = f"dagster-taskiq worker start -q {route}"
    return f"no worker of route {route} that takes {what} is alive; start one with `{start}`"
