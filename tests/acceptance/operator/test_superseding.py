"""Only the newest run of a key stays: which one is newer, once told, and whatever happens at the same moment."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import pytest
from dagster import DagsterEventType, DagsterInstance, DagsterRun
from dagster._core.execution.plan.resume_retry import ReexecutionStrategy
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.storage.tags import RETRY_NUMBER_TAG, RETRY_STRATEGY_TAG, ROOT_RUN_ID_TAG
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import PythonFileTarget
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import consume_new_runs_for_automatic_reexecution
from tests.acceptance.conftest import open_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, Daemon, submit
from tests.acceptance.operator.test_runs_that_wait import KEY, STATUS, STORAGES, WITH_COORDINATOR, storage, superseded
from tests.support.many_runs import insert_runs
from tests.support.platform import Platform

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import QUEUE_TAG, SUPERSEDE_TAG, tag_launched_run
from dagster_taskiq.superseding import Superseding

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

WHERE = "here"
MANY = 250
CANCELED = DagsterEventType.RUN_CANCELED


class Retrying:
    """Runs in Dagster's queue that fail, and are tried again by Dagster's daemon, or by a person."""

    def __init__(self, platform: Platform, context: WorkspaceProcessContext) -> None:
        self._platform = platform
        self._context = context

    def submit(self) -> str:
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(WHERE), "__repository__")
        tags = {**KEY, RETRY_STRATEGY_TAG: "ALL_STEPS"}
        run = self._platform.create("quick_job", tags, remote_job_origin=RemoteJobOrigin(repository, "quick_job"))
        return self._handed_in(run)

    def fail(self, run_id: str) -> None:
        self._platform.instance.report_run_failed(self._platform.run(run_id))

    def retried(self, run_id: str) -> str:
        """The run that Dagster's daemon makes of one that has failed."""
        instance = self._platform.instance
        record = instance.get_run_record_by_id(run_id)
        assert record is not None
        list(consume_new_runs_for_automatic_reexecution(self._context, [record], logging.getLogger()))
        return self._platform.run(run_id).tags["dagster/auto_retry_run_id"]

    def by_a_person(self, run_id: str, **tags: str) -> str:
        """As in the UI."""
        request, parent = self._context.create_request_context(), self._platform.run(run_id)
        location = request.get_code_location(WHERE)
        (repository,) = location.get_repositories().values()
        run = self._platform.instance.create_reexecuted_run(
            request_context=request,
            parent_run=parent,
            code_location=location,
            remote_job=repository.get_full_job(parent.job_name),
            strategy=ReexecutionStrategy.ALL_STEPS,
            use_parent_run_tags=True,
            extra_tags=tags,
        )
        return self._handed_in(run)

    def _handed_in(self, run: DagsterRun) -> str:
        workspace: Any = self._context.create_request_context()
        return self._platform.instance.run_coordinator.submit_run(SubmitRunContext(run, workspace)).run_id


@contextmanager
def retrying(endpoint: str) -> Iterator[tuple[Platform, Retrying]]:
    extra = WITH_COORDINATOR | {"run_retries": {"enabled": True, "max_retries": 9}}
    with open_platform(endpoint, extra=extra) as platform:
        target = PythonFileTarget(str(platform.jobs), attribute=None, working_directory=None, location_name=WHERE)
        with WorkspaceProcessContext(platform.instance, target) as context:
            yield platform, Retrying(platform, context)


def test_an_automatic_retry_is_as_old_as_its_run_and_what_a_person_wants_again_is_new(endpoint: str) -> None:
    with retrying(endpoint) as (platform, runs):
        first = runs.submit()
        runs.fail(first)
        retry = runs.retried(first)
        assert platform.status(retry) is STATUS.QUEUED, "nobody has wanted anything since"

        runs.fail(retry)
        newer = runs.submit()
        late = runs.retried(retry)
        assert platform.status(newer) is STATUS.QUEUED, platform.story(newer)
        superseded(platform, late, newer)

        again = runs.by_a_person(first)
        superseded(platform, newer, again)
        runs.fail(again)
        retry_of_again = runs.retried(again)
        assert platform.run(retry_of_again).tags[ROOT_RUN_ID_TAG] == first, "Dagster's root is not who has asked"
        assert platform.status(retry_of_again) is STATUS.QUEUED

        copied = runs.by_a_person(retry, **{RETRY_NUMBER_TAG: "1"})  # in the launchpad all tags can be copied
        superseded(platform, retry_of_again, copied)
        assert platform.status(copied) is STATUS.QUEUED


def look_at_once(platform: Platform, run_ids: Sequence[str], act: Callable[[DagsterInstance, str], object]) -> None:
    """As processes of their own do: each with its own instance."""
    together = threading.Barrier(len(run_ids))

    def one(run_id: str) -> None:
        with DagsterInstance.from_config(str(platform.home)) as instance:
            instance.get_run_by_id(run_id)  # connected
            together.wait(60)
            act(instance, run_id)

    with ThreadPoolExecutor(len(run_ids)) as pool:
        for acting in [pool.submit(one, run_id) for run_id in run_ids]:
            acting.result(120)


def superseding(instance: DagsterInstance) -> Superseding:
    launcher: Any = instance.run_launcher
    of_launcher: Superseding = launcher.superseding()
    return of_launcher


def look(instance: DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    superseding(instance).look(run)


def launch(instance: DagsterInstance, run_id: str) -> None:
    workspace: Any = None
    instance.launch_run(run_id, workspace)


@STORAGES
def test_one_at_work_is_told_once(endpoint: str, kind: str, request: pytest.FixtureRequest) -> None:
    """By who puts the newer one into the queue, and by who launches it, at the same moment."""
    with open_platform(endpoint, extra=storage(request, kind)) as platform, platform.worker():
        for _ in range(2):
            older = platform.launch("sleepy_job", tags=KEY)
            platform.marked(older, "started")
            newer = platform.create("quick_job", KEY)
            look_at_once(platform, [newer.run_id] * 4, look)
            assert platform.finished(older) is STATUS.CANCELED
            superseded(platform, older, newer.run_id)
            told = Counter(platform.stages(older))[Stage.REQUESTED], Counter(platform.events(older))
            assert (told[0], told[1][DagsterEventType.RUN_CANCELING]) == (1, 1), platform.story(older)


@STORAGES
def test_of_two_that_are_launched_at_once_the_newer_one_survives(
    endpoint: str, kind: str, request: pytest.FixtureRequest
) -> None:
    with open_platform(endpoint, extra=storage(request, kind)) as platform:
        for round_ in range(4):
            key = {SUPERSEDE_TAG: f"of round {round_}"}
            older, newer = (platform.create("sleepy_job", key).run_id for _ in range(2))
            look_at_once(platform, [older, newer] if round_ % 2 else [newer, older], launch)
            seen = [platform.story(run_id) for run_id in (older, newer)]
            assert [platform.status(run_id) for run_id in (older, newer)] == [STATUS.CANCELED, STATUS.STARTING], seen
            assert platform.events(older).count(CANCELED) == 1, seen


def test_of_many_that_come_at_once_one_survives(endpoint: str) -> None:
    with open_platform(endpoint, extra=WITH_COORDINATOR) as platform:
        made = [submit_later(platform) for _ in range(16)]
        look_at_once(platform, made, hand_in)
        statuses = Counter(platform.status(run_id) for run_id in made)
        assert statuses == {STATUS.CANCELED: len(made) - 1, STATUS.QUEUED: 1}, statuses
        assert platform.status(made[-1]) is STATUS.QUEUED
        assert {platform.events(run_id).count(CANCELED) for run_id in made[:-1]} == {1}


def submit_later(platform: Platform) -> str:
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__")
    return platform.create("sleepy_job", KEY, remote_job_origin=RemoteJobOrigin(repository, "sleepy_job")).run_id


def hand_in(instance: DagsterInstance, run_id: str) -> None:
    run, workspace = instance.get_run_by_id(run_id), None
    assert run is not None
    context: Any = SubmitRunContext(run, workspace)  # type: ignore[arg-type]
    instance.run_coordinator.submit_run(context)


@pytest.mark.postgres
def test_hundreds_that_wait_and_one_at_work_are_ended_by_one_that_comes(endpoint: str, postgres: str) -> None:
    """A backfill whose runs share a key, in a queue that does not look when it gets them."""
    extra = {"run_coordinator": PLAIN, "storage": {"postgres": {"postgres_url": postgres}}}
    with open_platform(endpoint, extra=extra) as platform:
        at_work = platform.create("sleepy_job", KEY)
        tag_launched_run(platform.instance, at_work, "task-1")
        platform.report(platform.run(at_work.run_id), DagsterEventType.RUN_START)
        many = put_many(platform, submit(platform, KEY))
        newest = platform.launch("quick_job", tags=KEY)
        statuses = Counter(platform.status(run_id) for run_id in many)
        assert statuses == {STATUS.CANCELED: MANY}, statuses
        assert platform.status(at_work.run_id) is STATUS.CANCELING, platform.story(at_work.run_id)
        assert platform.status(newest) is STATUS.STARTING
        assert {platform.events(run_id).count(CANCELED) for run_id in many[::50]} == {1}


PLAIN = {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"}


def put_many(platform: Platform, like: str) -> list[str]:
    model = platform.run(like)
    runs = [model._replace(run_id=str(uuid4())) for _ in range(MANY)]
    insert_runs(platform.instance, runs)
    return [run.run_id for run in runs]


def test_with_dagsters_own_queue_the_newest_is_started_and_the_others_end(endpoint: str) -> None:
    with open_platform(endpoint, extra={"run_coordinator": PLAIN}) as platform:
        first, second, third = (submit(platform, KEY) for _ in range(3))
        assert Daemon(platform.instance).iterate() == {"CANCELED": 2, "STARTING": 1}
        assert platform.status(third) is STATUS.STARTING
        assert {platform.events(run_id).count(CANCELED) for run_id in (first, second)} == {1}
        assert platform.waiting() == 1


def test_one_that_ends_at_that_moment_stays_as_it_has_ended(endpoint: str) -> None:
    with open_platform(endpoint, extra={"run_coordinator": COORDINATOR}) as platform:
        for round_ in range(8):
            key = {SUPERSEDE_TAG: f"of round {round_}"}
            older, newer = (platform.create("quick_job", key) for _ in range(2))
            tag_launched_run(platform.instance, older, f"task-{round_}")
            platform.report(older, DagsterEventType.RUN_START)

            def act(instance: DagsterInstance, run_id: str, older: DagsterRun = older) -> None:
                if run_id == older.run_id:
                    platform.report(older, DagsterEventType.RUN_SUCCESS)
                else:
                    look(instance, run_id)

            look_at_once(platform, [older.run_id, newer.run_id], act)
            assert platform.status(older.run_id) is STATUS.SUCCESS, platform.story(older.run_id)


def test_one_at_work_on_another_route_is_terminated(endpoint: str) -> None:
    with ExitStack() as stack:
        platform = stack.enter_context(open_platform(endpoint))
        platform.create_route("gpu")
        stack.enter_context(platform.worker("-n", "w", "-q", "gpu", "-q", "default"))
        older = platform.launch("sleepy_job", tags={**KEY, QUEUE_TAG: "gpu"})
        platform.marked(older, "started")
        newer = platform.launch("quick_job", tags=KEY, seconds=0)
        assert platform.finished(older) is STATUS.CANCELED
        superseded(platform, older, newer)
        assert platform.finished(newer) is STATUS.SUCCESS
        platform.assert_nothing_left(older)
