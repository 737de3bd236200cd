"""Dagster copies a run's tags to its re-executions; what was said about one run is not said about the next."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from dagster import DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.execution.plan.resume_retry import ReexecutionStrategy
from dagster._core.workspace.context import WorkspaceProcessContext, WorkspaceRequestContext
from dagster._core.workspace.load_target import PythonFileTarget
from tests.support.platform import CLEANUP_JOBS, Platform

from dagster_taskiq import cancel_run
from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR
from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.dagster_compat.api import SubmitRunContext
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, TASK_ID_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

STATUS = DagsterRunStatus


@contextmanager
def workspace(platform: Platform) -> Iterator[WorkspaceRequestContext]:
    """As a webserver has it: the code in a process of its own."""
    target = PythonFileTarget(str(platform.jobs), attribute=None, working_directory=None, location_name="here")
    with WorkspaceProcessContext(platform.instance, target) as context:
        yield context.create_request_context()


def reexecuted(platform: Platform, request: WorkspaceRequestContext, parent: DagsterRun) -> DagsterRun:
    """By what the UI, the API and Dagster's own retries call."""
    location = request.get_code_location("here")
    (repository,) = location.get_repositories().values()
    return platform.instance.create_reexecuted_run(
        request_context=request,
        parent_run=parent,
        code_location=location,
        remote_job=repository.get_full_job(parent.job_name),
        strategy=ReexecutionStrategy.ALL_STEPS,
        use_parent_run_tags=True,
    )


def test_a_reexecuted_run_knows_nothing_of_why_its_parent_was_cancelled(working: Platform) -> None:
    platform = replace(working, jobs=CLEANUP_JOBS)
    instance = platform.instance
    parent_id = platform.launch("uploads_job")
    platform.wait_started(parent_id, 1)
    assert cancel_run(parent_id, reason="wrong vintage", requested_by="adele", instance=instance)
    assert platform.finished(parent_id) is STATUS.CANCELED
    parent = platform.run(parent_id)
    began = platform.mark_counts(parent_id)["started"]
    with workspace(platform) as request:
        waits = reexecuted(platform, request, parent)
        assert waits.tags[TASK_ID_TAG] == parent.tags[TASK_ID_TAG], "as Dagster does it"
        assert platform.launcher.terminate(waits.run_id) is False
        assert platform.status(waits.run_id) is STATUS.CANCELED, "no worker of ours can have it"
        assert TASK_ID_TAG not in platform.run(waits.run_id).tags
        coordinator = TaskiqRunCoordinator()
        coordinator.register_instance(instance)
        queued = coordinator.submit_run(SubmitRunContext(reexecuted(platform, request, parent), request))
        assert queued.status is STATUS.QUEUED
        assert queued.tags.keys() & {TASK_ID_TAG, CANCEL_REASON_TAG, CANCELLED_BY_TAG} == set(), "also while it waits"
        assert coordinator.cancel_run(queued.run_id)
        run = reexecuted(platform, request, parent)
        instance.launch_run(run.run_id, request)
    platform.wait_started(run.run_id, began + 1)
    tags = platform.run(run.run_id).tags
    assert tags[TASK_ID_TAG] != parent.tags[TASK_ID_TAG]
    assert tags.keys() & {CANCEL_REASON_TAG, CANCELLED_BY_TAG} == set()
    assert list(instance.get_run_ids(RunsFilter(tags={CANCELLED_BY_TAG: "adele"}))) == [parent_id]
    assert platform.launcher.terminate(run.run_id)
    assert platform.finished(run.run_id) is STATUS.CANCELED
    tags = platform.run(run.run_id).tags
    assert (CANCEL_REASON_TAG in tags, tags[CANCELLED_BY_TAG]) == (False, UNKNOWN_AUTHOR)
    interrupted = [mark for mark in platform.marks(run.run_id) if mark.startswith("interrupted")]
    assert interrupted == [
        "interrupted True REQUESTED wrong vintage adele",
        "interrupted True REQUESTED None ui",
    ]
    assert "wrong vintage" not in platform.wait_for_stage(run.run_id, Stage.REACHED)
    told = [mark for mark in platform.marks(run.run_id) if mark.startswith("told")]
    assert told[-1] == "told reason=None by=Dagster_UI_or_API", told
