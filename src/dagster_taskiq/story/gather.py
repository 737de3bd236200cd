"""Read all that a run's story is made of. All calls block on the database; nothing is changed."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from dagster import DagsterInstance, DagsterRunStatus, RunRecord

from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.run_queue import (
    daemon_heard,
    limits_that_hold,
    pool_waits,
    priority_of,
    queued_tags,
    run_queue_config,
)
from dagster_taskiq.errors import DagsterTaskiqError, RunNotFound
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claim, Claims, ClaimState
from dagster_taskiq.storage.fleet import read_hold
from dagster_taskiq.storage.slots import RunSlots
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, TASK_ID_TAG, own_tags
from dagster_taskiq.storage.waiting import runs_in_progress
from dagster_taskiq.storage.workers import ALIVE, WorkerInfo, describe_assets, list_workers
from dagster_taskiq.story.log import Log, read_log
from dagster_taskiq.story.model import Story
from dagster_taskiq.story.steps import most_important
from dagster_taskiq.story.surroundings import Messages, OwnerFacts, PoolWait, QueuePlace, StepOwner, Surroundings
from dagster_taskiq.story.tell import MOST_STEPS, RunFacts, tell

_MOST_QUEUED: Final = 1_000
_NEVER_HAD_A_PROCESS: Final = {DagsterRunStatus.NOT_STARTED, DagsterRunStatus.QUEUED}


def story_of(instance: DagsterInstance, run_id: str, ask_queue: Callable[[Settings], Messages] | None = None) -> Story:
    """The story of a run until now. `ask_queue`: asked only about a run whose message should be in the queue.

    Raises `RunNotFound`, and `DagsterTaskiqError` for a run that another run launcher has launched.
    """
    settings = _settings(instance)
    record = instance.get_run_record_by_id(run_id)
    if record is None:
        raise RunNotFound(_deleted(Claims.of(instance, settings), run_id))
    log = read_log(instance, run_id, partial(most_important, most=MOST_STEPS))
    _check_that_it_is_ours(record, log)
    return tell(_facts(record), log, _surroundings(instance, settings, record, ask_queue))


def _settings(instance: DagsterInstance) -> Settings:
    launcher = instance.run_launcher
    if not isinstance(launcher, TaskiqRunLauncher):
        raise DagsterTaskiqError(
            f"the run launcher of this instance is {type(launcher).__name__}; this is for runs of TaskiqRunLauncher"
        )
    return launcher.settings


def _deleted(claims: Claims, run_id: str) -> str:
    claim = claims.read([run_id]).get(run_id)
    if claim is None:
        return f"there is no run {run_id} in this Dagster instance; is DAGSTER_HOME the right one?"
    return f"run {run_id} was deleted; worker {claim.worker_id} has had it, and stops what is left of it"


def _check_that_it_is_ours(record: RunRecord, log: Log) -> None:
    run = record.dagster_run
    ours = TASK_ID_TAG in own_tags(run) or any(event.stage is not None for event in log.events)
    if not ours and run.status not in _NEVER_HAD_A_PROCESS and record.start_time is not None:
        raise DagsterTaskiqError(
            f"run {run.run_id} was not launched by TaskiqRunLauncher (it has no tag {TASK_ID_TAG});"
            " its log is in Dagster's UI"
        )


def _facts(record: RunRecord) -> RunFacts:
    run = record.dagster_run
    tags = own_tags(run)
    return RunFacts(
        run_id=run.run_id,
        job=describe_assets(run) or run.job_name,
        status=run.status.value,
        created=record.create_timestamp.timestamp(),
        started=record.start_time,
        ended=record.end_time,
        task_id=tags.get(TASK_ID_TAG),
        reason=tags.get(CANCEL_REASON_TAG),
        cancelled_by=tags.get(CANCELLED_BY_TAG),
    )


def _surroundings(
    instance: DagsterInstance,
    settings: Settings,
    record: RunRecord,
    ask_queue: Callable[[Settings], Messages] | None,
) -> Surroundings:
    run, now = record.dagster_run, time.time()
    if run.status in FINISHED_STATUSES:
        return Surroundings(now)
    workers = list_workers(instance, settings, everybody=True)
    queue = queue_name(settings.queue_url)
    serving = [one for one in workers if one.state == ALIVE and one.queue in (None, queue)]
    at_runs = [one for one in serving if one.runs]
    slots, step_slots = sum(one.runs or 0 for one in serving), sum(one.steps or 0 for one in serving)
    busy = sum(work.step_key is None for one in at_runs for work in one.work)
    busy_steps = sum(work.step_key is not None for one in serving for work in one.work)
    claim = Claims.of(instance, settings).read([run.run_id]).get(run.run_id)
    owner = _owner(claim, workers) if claim is not None and claim.state is not ClaimState.RELEASED else None
    waits = owner is None and run.status is not DagsterRunStatus.QUEUED
    monitored = instance.run_monitoring_enabled
    return Surroundings(
        now=now,
        hold=hold.described() if (hold := read_hold(instance)) is not None else None,
        owner=owner,
        workers_alive=len(at_runs),
        slots=slots,
        free_slots=slots - busy,
        step_slots=step_slots,
        free_step_slots=step_slots - busy_steps,
        steps=_steps(instance, run.run_id, workers),
        pools=_pools(instance, run.run_id) if run.status is DagsterRunStatus.STARTED else (),
        queue=_place(instance, settings, record) if run.status is DagsterRunStatus.QUEUED else None,
        messages=ask_queue(settings) if waits and ask_queue is not None else None,
        can_resume=monitored and instance.run_monitoring_max_resume_run_attempts > 0,
        visibility_timeout_s=settings.visibility_timeout_seconds,
        status_poll_s=settings.status_poll_seconds,
        reconcile_every_s=settings.reconcile_every_s,
        start_timeout_s=float(instance.run_monitoring_start_timeout_seconds) if monitored else None,
    )


def _owner(claim: Claim, workers: Sequence[WorkerInfo]) -> OwnerFacts:
    worker = _named(workers, claim.worker_id)
    return OwnerFacts(
        claim.worker_id,
        state=worker.state if worker is not None else "unknown",
        heard=worker.heard if worker is not None else None,
        given_up=claim.state is ClaimState.GIVEN_UP,
    )


def _named(workers: Sequence[WorkerInfo], worker_id: str) -> WorkerInfo | None:
    return next((worker for worker in workers if worker.worker_id == worker_id), None)


def _steps(instance: DagsterInstance, run_id: str, workers: Sequence[WorkerInfo]) -> list[StepOwner]:
    found = []
    for claim in StepClaims(instance).running(run_id).values():
        worker = _named(workers, claim.worker_id)
        state, where = (worker.state, worker.where) if worker is not None else ("unknown", "")
        found.append(StepOwner(claim.step_key, claim.worker_id, state, where))
    return sorted(found, key=lambda step: step.step_key)


def _pools(instance: DagsterInstance, run_id: str) -> list[PoolWait]:
    return [
        PoolWait(one.step_key, one.pool, one.since, one.limit, tuple(run_id[:8] for run_id in one.holders))
        for one in pool_waits(instance, run_id)
    ]


def _place(instance: DagsterInstance, settings: Settings, record: RunRecord) -> QueuePlace:
    run = record.dagster_run
    mine = priority_of(run.tags)
    queued = queued_tags(instance, _MOST_QUEUED)
    mine_at = next((number for number, (run_id, _) in enumerate(queued) if run_id == run.run_id), len(queued))
    ahead = sum(
        priority_of(tags) > mine or (priority_of(tags) == mine and number < mine_at)
        for number, (_, tags) in enumerate(queued)
    )
    config = run_queue_config(instance)
    configured = config.max_concurrent_runs if config is not None and config.max_concurrent_runs >= 0 else None
    limit, by_configuration = configured, True
    coordinator = instance.run_coordinator
    if isinstance(coordinator, TaskiqRunCoordinator):
        room = RunSlots(instance, settings).count() + coordinator.look_ahead
        if limit is None or room < limit:
            limit, by_configuration = room, False
    hits = limits_that_hold(instance, run.run_id)
    return QueuePlace(
        ahead=ahead,
        more_ahead=len(queued) == _MOST_QUEUED,
        priority=mine,
        in_progress=runs_in_progress(instance),
        limit=limit,
        limit_is_configured=by_configuration,
        blocking=tuple(f"the limit {hit.limit} of {hit.kind} {hit.name}" for hit in hits),
        daemon_heard=daemon_heard(instance),
    )
