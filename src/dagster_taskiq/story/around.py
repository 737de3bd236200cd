"""What is around runs that are not over, read once for all of them: workers, slots, Dagster's queue, its limits.

All calls block on the database, and nothing is changed. How many queries it takes does not depend on how many runs
there are.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.dagster_compat.run_counts import tag_values
from dagster_taskiq.dagster_compat.run_queue import (
    daemon_heard,
    limits_that_hold,
    pool_waits,
    priority_of,
    queue_order,
    run_queue_config,
)
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claim, ClaimState
from dagster_taskiq.storage.fleet import read_hold
from dagster_taskiq.storage.room import Room
from dagster_taskiq.storage.routing import route_of_run
from dagster_taskiq.storage.tags import ROUTE_TAG
from dagster_taskiq.storage.waiting import runs_in_progress
from dagster_taskiq.storage.workers import ALIVE, WorkerInfo, list_workers
from dagster_taskiq.story.surroundings import OwnerFacts, PoolWait, QueuePlace, RouteFacts, Surroundings


@dataclass(frozen=True, slots=True)
class Around:
    """What is the same for every run."""

    workers: Mapping[str, WorkerInfo]
    common: Surroundings

    def owner(self, claim: Claim | None) -> OwnerFacts | None:
        """Who has a run with that claim."""
        if claim is None or claim.state is ClaimState.RELEASED:
            return None
        worker = self.workers.get(claim.worker_id)
        return OwnerFacts(
            claim.worker_id,
            state=worker.state if worker is not None else "unknown",
            heard=worker.heard if worker is not None else None,
            given_up=claim.state is ClaimState.GIVEN_UP,
        )


def look_around(instance: DagsterInstance, settings: Settings) -> Around:
    """Workers, slots and settings."""
    workers = list_workers(instance, settings, everybody=True)
    queue = queue_name(settings.queue_url)
    serving = [one for one in workers if one.state == ALIVE and one.queue in (None, queue)]
    routes = {route: _slots_of([one for one in serving if route in one.routes]) for route in _served(serving)}
    monitored = instance.run_monitoring_enabled
    hold = read_hold(instance)
    common = Surroundings(
        now=time.time(),
        hold=hold.described() if hold is not None else None,
        routes=routes,
        can_resume=monitored and instance.run_monitoring_max_resume_run_attempts > 0,
        visibility_timeout_s=settings.visibility_timeout_seconds,
        status_poll_s=settings.status_poll_seconds,
        reconcile_every_s=settings.reconcile_every_s,
        start_timeout_s=float(instance.run_monitoring_start_timeout_seconds) if monitored else None,
    )
    return Around({worker.worker_id: worker for worker in workers}, common.of_route(DEFAULT_ROUTE))


def _served(workers: Iterable[WorkerInfo]) -> set[str]:
    return {route for worker in workers for route in worker.routes}


def _slots_of(serving: Sequence[WorkerInfo]) -> RouteFacts:
    """Of the workers of one route; what they have at work may be of another one."""
    slots, step_slots = sum(one.runs or 0 for one in serving), sum(one.steps or 0 for one in serving)
    at_runs = [one for one in serving if one.runs]
    busy = sum(work.step_key is None for one in at_runs for work in one.work)
    busy_steps = sum(work.step_key is not None for one in serving for work in one.work)
    return RouteFacts(len(at_runs), slots, slots - busy, step_slots, step_slots - busy_steps)


def places_in_queue(
    instance: DagsterInstance, runs: Sequence[DagsterRun], order: Sequence[str] | None = None
) -> dict[str, QueuePlace]:
    """By run, where it is in Dagster's queue. `runs`: QUEUED. `order`: as `queue_order` gives it, if it is known."""
    if not runs:
        return {}
    order = queue_order(instance) if order is None else order
    in_progress, heard = runs_in_progress(instance), daemon_heard(instance)
    room, configured = _room(instance), _configured(instance)
    before = _taken_before(instance, order, by_route=room is not None and room.in_use)
    hits = limits_that_hold(instance, runs)
    return {
        run.run_id: replace(
            _place(route_of_run(run), room, configured, in_progress),
            daemon_heard=heard,
            ahead=before.get(run.run_id, 0),
            priority=priority_of(run.tags),
            blocking=tuple(f"the limit {hit.limit} of {hit.kind} {hit.name}" for hit in hits.get(run.run_id, ())),
        )
        for run in runs
    }


def _taken_before(instance: DagsterInstance, order: Sequence[str], *, by_route: bool) -> dict[str, int]:
    """How many runs are taken before each: where routes are in use, of its own one."""
    routes = tag_values(instance, ROUTE_TAG, order) if by_route else {}
    counts: Counter[str] = Counter()
    found = {}
    for run_id in order:
        route = routes.get(run_id, DEFAULT_ROUTE)
        found[run_id] = counts[route]
        counts[route] += 1
    return found


def _room(instance: DagsterInstance) -> Room | None:
    """None where another coordinator counts, or ours is configured wrongly."""
    coordinator = instance.run_coordinator
    try:
        return coordinator.look_at_room() if isinstance(coordinator, TaskiqRunCoordinator) else None
    except SettingsError:
        return None


def _configured(instance: DagsterInstance) -> int | None:
    config = run_queue_config(instance)
    return config.max_concurrent_runs if config is not None and config.max_concurrent_runs >= 0 else None


def _place(route: str, room: Room | None, configured: int | None, in_progress: int) -> QueuePlace:
    """What holds back the runs of a route: how many may be in progress, and whether the configuration says so."""
    if room is None or (configured is not None and configured <= in_progress):
        return QueuePlace(in_progress=in_progress, limit=configured, limit_is_configured=True)
    of_route = room.routes.get(route)
    if room.in_use and of_route is not None:
        return QueuePlace(
            in_progress=of_route.runs.in_progress,
            limit=of_route.limit,
            limit_is_configured=of_route.is_configured,
            limit_of_route=True,
        )
    if configured is not None and configured <= room.total:
        return QueuePlace(in_progress=in_progress, limit=configured, limit_is_configured=True)
    return QueuePlace(in_progress=in_progress, limit=room.total)


def waits_for_pools(instance: DagsterInstance, run_ids: Iterable[str]) -> dict[str, list[PoolWait]]:
    """By run, what its steps wait for."""
    return {
        run_id: [
            PoolWait(one.step_key, one.pool, one.since, one.limit, tuple(holder[:8] for holder in one.holders))
            for one in pending
        ]
        for run_id, pending in pool_waits(instance, run_ids).items()
    }
