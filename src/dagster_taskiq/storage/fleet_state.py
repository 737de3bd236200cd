"""Is the fleet held, does every worker know, and what still runs? From heartbeats and Dagster's runs.

All calls block on the database; nothing is changed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.fleet import Hold, read_hold
from dagster_taskiq.storage.routing import sorted_routes
from dagster_taskiq.storage.waiting import waiting_by_route
from dagster_taskiq.storage.workers import WorkerInfo, WorkInfo, list_workers

_STARTING = DagsterRunStatus.STARTING


@dataclass(frozen=True, slots=True)
class RouteState:
    """The same of one route. A worker of several routes is named for each of them; what is at work has one route."""

    workers: Sequence[WorkerInfo]
    work: Sequence[WorkInfo]
    runs_waiting: int

    @property
    def runs(self) -> int:
        """How many runs of it are at work."""
        return sum(work.step_key is None for work in self.work)

    @property
    def steps(self) -> int:
        """How many steps of `taskiq_executor` that have come on it are at work."""
        return len(self.work) - self.runs


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
    """The unnamed one, those of rules and workers, those that runs wait for, and those of what is at work."""

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
        return [work for worker in self.workers for work in worker.work]

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


def look_at_fleet(instance: DagsterInstance, settings: Settings) -> FleetState:
    """How it is now."""
    workers = list_workers(instance, settings)
    at_work = [work for worker in workers for work in worker.work]
    begun = {work.run_id: work.route for work in at_work if work.step_key is None and work.status == _STARTING.value}
    starting = instance.get_runs_count(RunsFilter(statuses=[_STARTING]))
    monitored = instance.run_monitoring_enabled
    timeout_s = float(instance.run_monitoring_start_timeout_seconds) if monitored else 0.0
    waiting = Counter({route: runs.count for route, runs in waiting_by_route(instance).items()})
    waiting.subtract(begun.values())
    waiting = +waiting  # one that has just begun may not be among them
    named = {DEFAULT_ROUTE, *waiting, *(rule.route for rule in settings.routes), *(work.route for work in at_work)}
    routes = sorted_routes(named.union(*(worker.routes for worker in workers)))
    return FleetState(
        hold=read_hold(instance),
        workers=workers,
        runs_waiting=waiting.total(),
        handed_over=max(0, starting - len(begun)),
        start_timeout_s=timeout_s or None,
        routes={
            route: RouteState(
                workers=[worker for worker in workers if route in worker.routes],
                work=[work for work in at_work if work.route == route],
                runs_waiting=waiting[route],
            )
            for route in routes
        },
    )
