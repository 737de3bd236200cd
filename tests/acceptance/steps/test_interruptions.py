"""Steps whose worker is stopped or dies: with `interrupted_steps: retry` they begin again, which nobody counts."""

from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import steps_platform
from tests.support.platform import STORM_JOBS, Platform, WorkerProcess

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
