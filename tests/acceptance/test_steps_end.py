"""A step's last event is not the end of its process: hooks come after it, and resources that are given back."""

import os
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(120)]


def launched(platform: Platform, job: str, seconds: float) -> tuple[str, Path]:
    """The run, and the file that its resource writes into."""
    marks = platform.home / f"cluster-{os.urandom(6).hex()}"
    resources = {"resources": {"cluster": {"config": {"marks": str(marks), "seconds": seconds}}}}
    return platform.launch(job, resources=resources), marks


def what_was_written(marks: Path) -> list[str]:
    return [line.split()[0] for line in marks.read_text().splitlines()] if marks.exists() else []


@pytest.mark.parametrize(
    ("job", "ends"),
    [("cluster_steps", DagsterRunStatus.SUCCESS), ("failing_cluster_steps", DagsterRunStatus.FAILURE)],
)
def test_a_run_ends_after_its_steps_have_given_back_what_they_had(
    working_steps: Platform, job: str, ends: DagsterRunStatus
) -> None:
    """For longer than the workers' status watch needs to find the steps of a run that is over, and to stop them."""
    platform = working_steps
    run_id, marks = launched(platform, job, 6)
    assert platform.finished(run_id) is ends, platform.story(run_id)
    assert what_was_written(marks) == ["leaving", "left"], platform.story(run_id)
    platform.assert_no_step_left(run_id)
    assert Stage.WAITING_FOR_STEPS in platform.stages(run_id), platform.story(run_id)
    assert not {Stage.INTERRUPTING, Stage.STEPS_STOPPED} & {
        stage for stage in Stage if platform.step_notes(run_id, stage)
    }


def test_a_run_that_is_terminated_then_is_canceled_after_it(working_steps: Platform) -> None:
    platform = working_steps
    run_id, marks = launched(platform, "cluster_steps", 60)
    wait_until(lambda: what_was_written(marks), "the cluster is given back", within=60)
    assert DagsterEventType.STEP_SUCCESS in platform.events(run_id)
    assert platform.launcher.terminate(run_id) is True
    assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    assert what_was_written(marks) == ["leaving"]
    assert platform.step_notes(run_id, Stage.INTERRUPTING), platform.story(run_id)
