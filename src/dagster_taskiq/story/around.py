"""What is around runs that are not over, read once for all of them: workers, slots, Dagster's queue, its limits.

All calls block on the database, and nothing is changed. How many queries it takes does not depend on how many runs
there are.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.dagster_compat.run_queue import (
    daemon_heard,
    limits_that_hold,
    pool_waits,
    priority_of,
    queue_order,
    run_queue_config,
)
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claim, ClaimState
from dagster_taskiq.storage.fleet import read_hold
from dagster_taskiq.storage.slots import RunSlots
from dagster_taskiq.storage.waiting import runs_in_progress
from dagster_taskiq.storage.workers import ALIVE, WorkerInfo, list_workers
from dagster_taskiq.story.surroundings import OwnerFacts, PoolWait, QueuePlace, Surroundings


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
    slots, step_slots = sum(one.runs or 0 for one in serving), sum(one.steps or 0 for one in serving)
    at_runs = [one for one in serving if one.runs]
    busy = sum(work.step_key is None for one in at_runs for work in one.work)
    busy_steps = sum(work.step_key is not None for one in serving for work in one.work)
    monitored = instance.run_monitoring_enabled
    hold = read_hold(instance)
    common = Surroundings(
        now=time.time(),
        hold=hold.described() if hold is not None else None,
        workers_alive=len(at_runs),
        slots=slots,
        free_slots=slots - busy,
        step_slots=step_slots,
        free_step_slots=step_slots - busy_steps,
        can_resume=monitored and instance.run_monitoring_max_resume_run_attempts > 0,
        visibility_timeout_s=settings.visibility_timeout_seconds,
        status_poll_s=settings.status_poll_seconds,
        reconcile_every_s=settings.reconcile_every_s,
        start_timeout_s=float(instance.run_monitoring_start_timeout_seconds) if monitored else None,
    )
    return Around({worker.worker_id: worker for worker in workers}, common)


def places_in_queue(
    instance: DagsterInstance, settings: Settings, runs: Sequence[DagsterRun], order: Sequence[str] | None = None
) -> dict[str, QueuePlace]:
    """By run, where it is in Dagster's queue. `runs`: QUEUED. `order`: as `queue_order` gives it, if it is known."""
    if not runs:
        return {}
    taken_before = {run_id: number for number, run_id in enumerate(queue_order(instance) if order is None else order)}
    limit, is_configured = _limit(instance, settings)
    common = QueuePlace(
        in_progress=runs_in_progress(instance),
        limit=limit,
        limit_is_configured=is_configured,
        daemon_heard=daemon_heard(instance),
    )
    hits = limits_that_hold(instance, runs)
    return {
        run.run_id: replace(
            common,
            ahead=taken_before.get(run.run_id, 0),
            priority=priority_of(run.tags),
            blocking=tuple(f"the limit {hit.limit} of {hit.kind} {hit.name}" for hit in hits.get(run.run_id, ())),
        )
        for run in runs
    }


def _limit(instance: DagsterInstance, settings: Settings) -> tuple[int | None, bool]:
    """How many runs may be in progress, and whether the configuration says so, or the slots of the workers."""
    config = run_queue_config(instance)
    configured = config.max_concurrent_runs if config is not None and config.max_concurrent_runs >= 0 else None
    coordinator = instance.run_coordinator
    if isinstance(coordinator, TaskiqRunCoordinator):
        room = RunSlots(instance, settings).count() + coordinator.look_ahead
        if configured is None or room < configured:
            return room, False
    return configured, True


def waits_for_pools(instance: DagsterInstance, run_ids: Iterable[str]) -> dict[str, list[PoolWait]]:
    """By run, what its steps wait for."""
    return {
        run_id: [
            PoolWait(one.step_key, one.pool, one.since, one.limit, tuple(holder[:8] for holder in one.holders))
            for one in pending
        ]
        for run_id, pending in pool_waits(instance, run_ids).items()
    }
