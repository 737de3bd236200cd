"""Threads that still run when their op has ended: waited for, named, cancelled, and not for ever."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support.platform import Platform

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.step_state import state_of

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.xdist_group("threads")]

PATIENCE = {"exit_patience_seconds": 15, "cancelled_exit_patience_seconds": 1}
LAUNCHES = {
    "success": ("uploads_in_a_thread_job", 6.0, 1.0),
    "failure": ("uploads_in_a_thread_and_fails_job", 6.0, 1.0),
    "step": ("step_uploads_in_a_thread_job", 6.0, 1.0),
    "endless": ("uploads_in_a_thread_job", 3_000.0, 300.0),
    "awaited": ("awaits_a_thread_job", 3_000.0, 300.0),
}
"""Job, seconds of its thread, grace. Those that are to end by themselves take longer than their grace."""


@pytest.fixture(scope="module")
def platform(endpoint: str) -> Iterator[Platform]:
    with ExitStack() as stack:
        opened = stack.enter_context(open_platform(endpoint, source={**UNHURRIED, **PATIENCE}))
        stack.enter_context(opened.worker("-n", "w"))
        yield opened


@pytest.fixture(scope="module")
def runs(platform: Platform) -> dict[str, str]:
    """All at once: most of their time is sleep."""
    return {
        name: platform.launch(job, grace=grace, seconds=seconds) for name, (job, seconds, grace) in LAUNCHES.items()
    }


def step_key(platform: Platform, run_id: str) -> str:
    plan_id = platform.run(run_id).execution_plan_snapshot_id
    assert plan_id is not None
    (only,) = platform.instance.get_execution_plan_snapshot(plan_id).step_keys_to_execute
    return only


def told(platform: Platform, run_id: str, stage: Stage) -> str:
    """The messages of that stage."""
    notes = [entry.dagster_event for entry in platform.instance.all_logs(run_id) if entry.dagster_event is not None]
    return "\n".join(str(event.message) for event in notes if f"'{stage.value}'" in str(event.event_specific_data))


@pytest.mark.parametrize("name", ["success", "failure", "step"])
def test_the_end_of_a_run_waits_for_them_and_says_so(platform: Platform, runs: dict[str, str], name: str) -> None:
    run_id = runs[name]
    status = DagsterRunStatus.FAILURE if name == "failure" else DagsterRunStatus.SUCCESS
    assert platform.finished(run_id) is status, platform.story(run_id)
    assert "uploaded" in platform.marks(run_id), "when the run is final, its threads have ended"

    assert not told(platform, run_id, Stage.KILLED)
    story = "\n".join(platform.story(run_id))
    assert story.count("waits for threads that still run: upload-1; at most 15 s (exit_patience_seconds)") == 1, story
    final = "PIPELINE_FAILURE" if name == "failure" else "PIPELINE_SUCCESS"
    assert story.index("waits for threads") < story.index(final)
    assert story.count(final) == 1
    kept = {"upload": "1"} if name == "failure" else {}
    assert dict(state_of(platform.instance, run_id, step_key(platform, run_id))) == kept, "that of a success is deleted"


def test_one_that_never_ends_is_killed_after_the_patience_and_named(platform: Platform, runs: dict[str, str]) -> None:
    run_id = runs["endless"]
    assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    assert "threads that still run: upload-1: SIGKILL to its whole process tree" in told(platform, run_id, Stage.KILLED)


def test_a_run_that_waits_for_them_can_be_terminated(platform: Platform) -> None:
    run_id = platform.launch("uploads_in_a_thread_job", grace=300, seconds=3_000)
    platform.wait_for_stage(run_id, Stage.WAITING_FOR_THREADS)
    assert platform.status(run_id) is DagsterRunStatus.STARTED
    assert run_id[:8] in platform.command("worker", "list").stdout, "also before its worker's next heartbeat"
    assert platform.launcher.terminate(run_id)
    assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    assert platform.events(run_id).count(DagsterEventType.RUN_CANCELED) == 1
    assert "threads that still run: upload-1" in told(platform, run_id, Stage.KILLED)


def test_of_a_worker_that_stops_they_have_the_grace_and_the_run_is_a_success(endpoint: str) -> None:
    with open_platform(endpoint, source=UNHURRIED) as platform, platform.worker("-n", "w") as worker:
        run_id = platform.launch("uploads_in_a_thread_job", grace=1, seconds=3_000)
        platform.wait_for_stage(run_id, Stage.WAITING_FOR_THREADS)
        assert worker.stop() == 0, worker.log()
        assert platform.status(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert "threads that still run: upload-1" in told(platform, run_id, Stage.KILLED)
        platform.assert_nothing_left(run_id)


def test_what_was_cancelled_is_not_kept_by_them_for_its_grace(platform: Platform, runs: dict[str, str]) -> None:
    run_id = runs["awaited"]
    platform.marked(run_id, "started")
    assert platform.launcher.terminate(run_id)
    assert platform.finished(run_id) is DagsterRunStatus.CANCELED, "long before its grace of 300 s"
    assert platform.mark_counts(run_id)["cleanup-end"] == 1
    assert "threads that still run: asyncio_0" in told(platform, run_id, Stage.KILLED)
    platform.assert_nothing_left(run_id)
