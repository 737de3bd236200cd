"""A run that takes longer than it may is stopped as by Terminate, and is a FAILURE that names the limit."""

from collections import Counter

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.support.platform import Platform

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import TIMED_OUT_TAG, TIMEOUT_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

WHY = "run timed out: longer than its limit of 1 s (dagster-taskiq/timeout_seconds)"


def timed_out(platform: Platform, run_id: str, why: str = WHY) -> None:
    """Wait until it is so, and nothing of the run is left."""
    story = platform.story
    assert platform.finished(run_id) is DagsterRunStatus.FAILURE, story(run_id)
    platform.assert_nothing_left(run_id)
    events = Counter(platform.events(run_id))
    assert events[DagsterEventType.RUN_FAILURE] == 1, story(run_id)
    assert not events[DagsterEventType.RUN_CANCELED], story(run_id)
    assert why in story(run_id)[-1], story(run_id)
    assert platform.run(run_id).tags[TIMED_OUT_TAG] == why


@pytest.mark.parametrize("job", ["sleepy_job", "carries_on_job"])
def test_a_run_that_takes_too_long_is_stopped(working: Platform, job: str) -> None:
    run_id = working.launch(job, grace=2, tags={TIMEOUT_TAG: "1"})
    timed_out(working, run_id)
    story = [Stage.REACHED, Stage.INTERRUPTING, Stage.TREE_GONE]
    assert [stage for stage in working.stages(run_id) if stage in story] == story
    assert any("run timed out after 1." in line and "interrupting" in line for line in working.story(run_id))
    assert (Stage.KILLED in working.stages(run_id)) is (job == "carries_on_job")
    if job == "sleepy_job":
        marks = Counter(working.marks(run_id))
        assert marks["cleanup-begin"] == marks["cleanup-end"] == 1, marks
