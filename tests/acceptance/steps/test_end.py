"""A step's last event is not the end of its process: hooks come after it, and resources that are given back."""

import os
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def launched(platform: Platform, job: str, seconds: float, works: float = 0) -> tuple[str, Path]:
    """The run, and the file that its resource writes into. `works`: the seconds that its step takes."""
    marks = platform.home / f"cluster-{os.urandom(6).hex()}"
    resources = {"resources": {"cluster": {"config": {"marks": str(marks), "seconds": seconds}}}}
    return platform.launch(job, resources=resources, seconds=works), marks


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


@pytest.mark.parametrize("works", [0.0, 8.0], ids=["which_the_run_has_seen", "which_the_run_has_not_seen"])
def test_a_run_that_is_terminated_then_is_canceled_after_it(working_steps: Platform, works: float) -> None:
    """After a long step the run's process looks at the log less often: the interrupt comes before the step's end."""
    platform = working_steps
    run_id, marks = launched(platform, "cluster_steps", 60, works)
    wait_until(lambda: what_was_written(marks), "the cluster is given back", within=60)
    assert DagsterEventType.STEP_SUCCESS in platform.events(run_id)
    assert platform.launcher.terminate(run_id) is True
    assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    assert what_was_written(marks) == ["leaving"]
    assert platform.step_notes(run_id, Stage.INTERRUPTING), platform.story(run_id)


def test_a_run_is_canceled_also_if_its_step_hears_of_it_first(working_steps: Platform) -> None:
    """As a step does whose worker looks at the status of runs just then."""
    platform = working_steps
    run_id, marks = launched(platform, "cluster_steps", 60)
    wait_until(lambda: what_was_written(marks), "the cluster is given back", within=60)
    platform.instance.report_run_canceling(platform.run(run_id))
    platform.cancel_by_message(*platform.step_tasks(run_id))
    assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
