"""Steps whose worker is stopped or dies: with `interrupted_steps: retry` they begin again, which nobody counts."""

from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import steps_platform
from tests.support.platform import STORM_JOBS, Platform, WorkerProcess
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

AGAIN: dict[str, Any] = {"interrupted_steps": "retry", "drain_seconds": 0, "stop_timeout_seconds": 10}
COUNTED = {DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY}


def end(worker: WorkerProcess, how: str) -> None:
    if how == "killed":
        worker.process.kill()
        worker.process.wait(10)
    else:
        assert worker.stop() == 0


def begun(platform: Platform, run_id: str) -> list[str]:
    """`began-<retry number>-<parts that its state knew>` of each process of a step's."""
    return [mark.split()[0] for mark in platform.marks(run_id) if mark.startswith("began-")]


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("job", ["one", "with_policy"])
def test_a_step_begins_again_elsewhere_under_the_same_attempt(endpoint: str, job: str, how: str) -> None:
    with steps_platform(endpoint, source=AGAIN) as platform, platform.worker("-n", "runs", "--runs-only"):
        platform.jobs = STORM_JOBS
        with platform.worker("-n", "first", "--steps-only") as first:
            run_id = platform.launch(job, count=3, seconds=3)
            platform.marked(run_id, "part")
            end(first, how)
        with platform.worker("-n", "second", "--steps-only"):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        platform.assert_nothing_left(run_id)
        before, after = begun(platform, run_id)
        assert before == "began-0-0"
        assert after in ("began-0-1", "began-0-2"), "the same attempt, with the state of the first try"
        assert platform.mark_counts(run_id)["overlap"] == 0
        assert not COUNTED & set(platform.events(run_id)), platform.story(run_id)
        (note,) = platform.step_notes(run_id, Stage.STEP_INTERRUPTED)
        assert (note["interruption"], note["interruptions at most"]) == (1, 10)
        assert "worker first-" in note["why"]
        first_task, second_task = platform.step_tasks(run_id)
        assert second_task == f"{first_task}.1"


def test_an_op_that_says_so_fails(endpoint: str) -> None:
    """The tag on the op counts before the setting; and as before, its failure is one."""
    with steps_platform(endpoint, source=AGAIN) as platform, platform.worker("-n", "runs", "--runs-only"):
        platform.jobs = STORM_JOBS
        with platform.worker("-n", "first", "--steps-only") as first:
            run_id = platform.launch("once", count=3, seconds=60)
            platform.marked(run_id, "started")
            assert first.stop() == 0
        assert platform.finished(run_id) is DagsterRunStatus.FAILURE, platform.story(run_id)
        assert len(begun(platform, run_id)) == 1
        assert platform.step_notes(run_id, Stage.STEP_INTERRUPTED) == []


def test_too_many_interruptions_are_a_failure_of_which_the_policy_decides(endpoint: str) -> None:
    source = {**AGAIN, "max_interruptions": 1}
    with steps_platform(endpoint, source=source) as platform, platform.worker("-n", "runs", "--runs-only"):
        platform.jobs = STORM_JOBS
        with platform.worker("-n", "first", "--steps-only") as first:
            failing = platform.launch("one", count=2, seconds=60)
            retried = platform.launch("with_policy", count=2, seconds=60)
            platform.wait_started(failing, 1)
            platform.wait_started(retried, 1)
            assert first.stop() == 0
        with platform.worker("-n", "second", "--steps-only") as second:
            platform.wait_started(failing, 2)
            platform.wait_started(retried, 2)
            assert second.stop() == 0
        assert platform.finished(failing) is DagsterRunStatus.FAILURE, platform.story(failing)
        assert "interrupted 2 times, and max_interruptions is 1: raise it" in platform.failure(failing, "parts")
        with platform.worker("-n", "third", "--steps-only"):
            platform.wait_started(retried, 3)
            assert begun(platform, retried)[-1] == "began-1-0", "its own policy has it tried again"
            assert platform.launcher.terminate(retried)
            assert platform.finished(retried) is DagsterRunStatus.CANCELED, platform.story(retried)


def test_a_run_that_is_terminated_while_its_step_waits_to_begin_again_is_canceled(endpoint: str) -> None:
    with steps_platform(endpoint, source=AGAIN) as platform, platform.worker("-n", "runs", "--runs-only"):
        platform.jobs = STORM_JOBS
        with platform.worker("-n", "first", "--steps-only") as first:
            run_id = platform.launch("one", count=2, seconds=60)
            platform.marked(run_id, "started")
            assert first.stop() == 0
        platform_waits(platform, run_id)
        assert platform.launcher.terminate(run_id)
        assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
        with platform.worker("-n", "second", "--steps-only") as second:
            wait_until(lambda: platform.waiting("-steps") == 0, "its message is dropped", within=60, seen=second.log)
        assert len(begun(platform, run_id)) == 1


def platform_waits(platform: Platform, run_id: str) -> None:
    wait_until(
        lambda: platform.step_notes(run_id, Stage.STEP_INTERRUPTED) and platform.waiting("-steps"),
        "the step waits for a worker again",
        within=60,
        seen=lambda: platform.story(run_id),
    )


def test_outputs_of_an_interrupted_try_are_not_counted_twice(endpoint: str) -> None:
    with steps_platform(endpoint, source=AGAIN) as platform, platform.worker("-n", "runs", "--runs-only"):
        platform.jobs = STORM_JOBS
        with platform.worker("-n", "first", "--steps-only") as first:
            run_id = platform.launch("fan", count=2, seconds=2)
            platform.marked(run_id, "started")
            assert first.stop() == 0
        with platform.worker("-n", "second", "--steps-only"):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert platform.mark_counts(run_id)["collected-1-of-2"] == 1, platform.marks(run_id)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_run_and_its_step_lose_their_worker_together(endpoint: str, how: str) -> None:
    """Without run monitoring: the run goes on elsewhere, and so does its step, and nobody has counted it."""
    with steps_platform(endpoint, source=AGAIN) as platform:
        platform.jobs = STORM_JOBS
        with platform.worker("-n", "first") as first:
            run_id = platform.launch("one", count=3, seconds=3)
            platform.marked(run_id, "part")
            end(first, how)
        with platform.worker("-n", "second"):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        platform.assert_nothing_left(run_id)
        assert begun(platform, run_id)[-1] != "began-0-0"
        assert platform.mark_counts(run_id)["overlap"] == 0
        assert platform.instance.count_resume_run_attempts(run_id) == 0
        assert platform.stages(run_id).count(Stage.RUN_INTERRUPTED) == 1, platform.story(run_id)
        assert not COUNTED & set(platform.events(run_id)), platform.story(run_id)
