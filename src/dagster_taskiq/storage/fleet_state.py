"""Is the fleet held, does every worker know, and what still runs? From heartbeats and Dagster's runs.

All calls block on the database; nothing is changed.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.fleet import Hold, read_hold
from dagster_taskiq.storage.routing import route_of_run, sorted_routes
from dagster_taskiq.storage.waiting import waiting_by_route
from dagster_taskiq.storage.workers import WorkerInfo, WorkInfo, list_workers

_STARTING = DagsterRunStatus.STARTING


@dataclass(frozen=True, slots=True)
class RouteState:
    """The same of one route. A worker of several routes is counted for each of them, with all that it has at work."""

    workers: Sequence[WorkerInfo]
    runs_waiting: int

    @property
    def runs(self) -> int:
        """How many runs its workers have at work."""
        return sum(work.step_key is None for work in _work_of(self.workers))

    @property
    def steps(self) -> int:
        """How many steps of `taskiq_executor` they have at work."""
        return len(_work_of(self.workers)) - self.runs


@dataclass(frozen=True, slots=True)
class FleetState:
    """What `fleet status` shows."""

    hold: Hold | None
    workers: Sequence[WorkerInfo]
    """Those that are alive or silent."""
    runs_waiting: int
    handed_over: int
    """Runs that were sent to the workers and that none has begun."""
    start_timeout_s: float | None
    """After which Dagster's run monitoring fails those; None: never."""
    routes: Mapping[str, RouteState]
    """The unnamed one, those of rules and workers, and those that runs wait for."""

    @property
    def not_heard(self) -> list[str]:
        """Ids of the workers that have not said yet that they know of the hold."""
        hold = self.hold
        return [] if hold is None else [one.worker_id for one in self.workers if one.held != hold.since]

    @property
    def runs(self) -> int:
        """How many runs are at work."""
        return sum(work.step_key is None for work in self._work)

    @property
    def steps(self) -> int:
        """How many steps of `taskiq_executor` are at work."""
        return len(self._work) - self.runs

    @property
    def is_idle(self) -> bool:
        """The fleet is held, every worker knows, and nothing is at work."""
        return self.hold is not None and not self.not_heard and not self._work

    @property
    def _work(self) -> list[WorkInfo]:
        return _work_of(self.workers)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "hold": asdict(self.hold) if self.hold is not None else None,
            "workers": [one.worker_id for one in self.workers],
            "not_heard": self.not_heard,
            "at_work": {"runs": self.runs, "steps": self.steps},
            "runs_waiting": self.runs_waiting,
            "handed_over": self.handed_over,
            "routes": {
                route: {
                    "workers": [one.worker_id for one in of_route.workers],
                    "at_work": {"runs": of_route.runs, "steps": of_route.steps},
                    "runs_waiting": of_route.runs_waiting,
                }
                for route, of_route in self.routes.items()
            },
        }


def _work_of(workers: Sequence[WorkerInfo]) -> list[WorkInfo]:
    return [work for worker in workers for work in worker.work]


def look_at_fleet(instance: DagsterInstance, settings: Settings) -> FleetState:
    """How it is now."""
    workers = list_workers(instance, settings)
    begun = {work.run_id for worker in workers for work in worker.work if work.status == _STARTING.value}
    starting = instance.get_runs_count(RunsFilter(statuses=[_STARTING]))
    monitored = instance.run_monitoring_enabled
    timeout_s = float(instance.run_monitoring_start_timeout_seconds) if monitored else 0.0
    waiting = Counter({route: runs.count for route, runs in waiting_by_route(instance).items()})
    waiting.subtract(_routes_of(instance, begun))
    named = {DEFAULT_ROUTE, *waiting, *(rule.route for rule in settings.routes)}
    routes = sorted_routes(named.union(*(worker.routes for worker in workers)))
    return FleetState(
        hold=read_hold(instance),
        workers=workers,
        runs_waiting=waiting.total(),
        handed_over=max(0, starting - len(begun)),
        start_timeout_s=timeout_s or None,
        routes={
            route: RouteState([worker for worker in workers if route in worker.routes], max(0, waiting[route]))
            for route in routes
        },
    )


def _routes_of(instance: DagsterInstance, run_ids: Collection[str]) -> list[str]:
    runs = instance.get_runs(RunsFilter(run_ids=sorted(run_ids))) if run_ids else ()
    return [route_of_run(run) for run in runs]
