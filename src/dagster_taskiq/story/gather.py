"""Read all that a run's story is made of. All calls block on the database; nothing is changed."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from dagster import DagsterInstance, DagsterRunStatus, RunRecord

from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.errors import DagsterTaskiqError, RunNotFound
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.code_locations import why_it_waits
from dagster_taskiq.storage.code_waits import waits_until
from dagster_taskiq.storage.event_log import run_will_resume
from dagster_taskiq.storage.queue_ttl import ttl_of
from dagster_taskiq.storage.routing import route_of_run
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, TASK_ID_TAG, own_tags
from dagster_taskiq.storage.time_limits import limit_of_run
from dagster_taskiq.storage.workers import describe_assets
from dagster_taskiq.story.around import Around, look_around, places_in_queue, waits_for_pools
from dagster_taskiq.story.log import Log, read_log
from dagster_taskiq.story.model import Story
from dagster_taskiq.story.steps import most_important
from dagster_taskiq.story.surroundings import Messages, StepOwner, Surroundings
from dagster_taskiq.story.tell import MOST_STEPS, RunFacts, tell

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
    return tell(_facts(instance, record), log, _surroundings(instance, settings, record, ask_queue))


def _settings(instance: DagsterInstance) -> Settings:
    launcher = instance.run_launcher
    if not isinstance(launcher, TaskiqRunLauncher):
        raise DagsterTaskiqError(
            f"the run launcher of this instance is {type(launcher).__name__}; this is for runs of TaskiqRunLauncher;"
            " is DAGSTER_HOME the right one?"
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


def _facts(instance: DagsterInstance, record: RunRecord) -> RunFacts:
    run, created = record.dagster_run, record.create_timestamp.timestamp()
    tags, (limit, _), ttl_s = own_tags(run), limit_of_run(instance, run), ttl_of(run.tags)
    return RunFacts(
        run_id=run.run_id,
        job=describe_assets(run) or run.job_name,
        status=run.status.value,
        created=created,
        started=record.start_time,
        ended=record.end_time,
        task_id=tags.get(TASK_ID_TAG),
        route=route_of_run(run),
        reason=tags.get(CANCEL_REASON_TAG),
        cancelled_by=tags.get(CANCELLED_BY_TAG),
        begins_until=created + ttl_s if ttl_s is not None else None,
        may_take_until=record.start_time + limit.seconds if record.start_time and limit is not None else None,
    )


def _surroundings(
    instance: DagsterInstance,
    settings: Settings,
    record: RunRecord,
    ask_queue: Callable[[Settings], Messages] | None,
) -> Surroundings:
    run = record.dagster_run
    route = route_of_run(run)
    if run.status in FINISHED_STATUSES:
        return Surroundings(time.time())
    around = look_around(instance, settings)
    owner = around.owner(Claims.of(instance, settings).read([run.run_id]).get(run.run_id))
    is_queued = run.status is DagsterRunStatus.QUEUED
    is_started = run.status is DagsterRunStatus.STARTED
    pools = waits_for_pools(instance, [run.run_id]) if is_started else {}
    code = why_it_waits(instance, settings, run) if owner is None and not is_queued else None
    task_id = own_tags(run).get(TASK_ID_TAG, "")
    return replace(
        around.common.of_route(route),
        owner=owner,
        can_resume=is_started and owner is not None and run_will_resume(instance, run.run_id),
        steps=_steps(instance, run.run_id, around),
        pools=pools.get(run.run_id, ()),
        queue=places_in_queue(instance, [run])[run.run_id] if is_queued else None,
        code=code,
        code_until=waits_until(instance, run.run_id, task_id) if code is not None else None,
        messages=ask_queue(settings.of_route(route_of_run(run)))
        if owner is None and not is_queued and ask_queue is not None
        else None,
    )


def _steps(instance: DagsterInstance, run_id: str, around: Around) -> list[StepOwner]:
    found = []
    for claim in StepClaims(instance).running(run_id).values():
        worker = around.workers.get(claim.worker_id)
        state, where = (worker.state, worker.where) if worker is not None else ("unknown", "")
        found.append(StepOwner(claim.step_key, claim.worker_id, state, where))
    return sorted(found, key=lambda step: step.step_key)
