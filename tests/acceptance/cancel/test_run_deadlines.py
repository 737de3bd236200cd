"""A run that takes longer than it may is stopped as by Terminate, and is a FAILURE that names the limit."""

import logging
import time
from collections import Counter
from dataclasses import replace

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG
from dagster._daemon.monitoring.run_monitoring import check_run_timeout
from tests.acceptance.conftest import open_platform
from tests.support.platform import CLEANUP_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import TIMED_OUT_TAG, TIMEOUT_TAG
from dagster_taskiq.story.gather import story_of

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def why(seconds: str, where: str = TIMEOUT_TAG) -> str:
    return f"run timed out: longer than its limit of {seconds} s ({where})"


def timed_out(platform: Platform, run_id: str, text: str) -> None:
    """Wait until it is so, and nothing of the run is left."""
    story = platform.story
    assert platform.finished(run_id, within=90) is DagsterRunStatus.FAILURE, story(run_id)
    platform.assert_nothing_left(run_id)
    events = Counter(platform.events(run_id))
    assert events[DagsterEventType.RUN_FAILURE] == 1, story(run_id)
    assert not events[DagsterEventType.RUN_CANCELED], story(run_id)
    assert text in story(run_id)[-1], story(run_id)
    assert platform.run(run_id).tags[TIMED_OUT_TAG] == text


def is_being_stopped(platform: Platform, run_id: str) -> None:
    wait_until(
        lambda: platform.status(run_id) is DagsterRunStatus.CANCELING and Stage.INTERRUPTING in platform.stages(run_id),
        "its time is over, and it is being stopped",
        seen=lambda: platform.story(run_id),
    )


@pytest.mark.parametrize("job", ["sleepy_job", "carries_on_job"])
def test_a_run_that_takes_too_long_is_stopped(working: Platform, job: str) -> None:
    run_id = working.launch(job, grace=2, tags={TIMEOUT_TAG: "1"})
    timed_out(working, run_id, why("1"))
    story = [Stage.REACHED, Stage.INTERRUPTING, Stage.TREE_GONE]
    assert [stage for stage in working.stages(run_id) if stage in story] == story
    assert any("run timed out after 1." in line and "interrupting" in line for line in working.story(run_id))
    assert (Stage.KILLED in working.stages(run_id)) is (job == "carries_on_job")
    said = working.command("run", "explain", run_id).stdout
    assert "Run timed out after 1." in said, said
    assert "after its time was over" in said, said
    assert "Cancelled by" not in said, said
    if job == "sleepy_job":
        marks = Counter(working.marks(run_id))
        assert marks["cleanup-begin"] == marks["cleanup-end"] == 1, marks


@pytest.mark.parametrize("job", ["uploads_job", "processes_job", "steps_job"])
def test_ops_learn_what_it_is_and_are_cleaned_up(working: Platform, working_steps: Platform, job: str) -> None:
    """Whatever the executor, and on whichever worker."""
    platform = replace(working_steps if job == "steps_job" else working, jobs=CLEANUP_JOBS)
    for limit in ("5", "15", "45"):  # on a busy machine it takes a while until its ops are at work
        run_id = platform.launch(job, seconds=120, tags={TIMEOUT_TAG: limit})
        timed_out(platform, run_id, why(limit))
        if any(mark.startswith("interrupted") for mark in platform.marks(run_id)):
            break
    marks, story = platform.marks(run_id), platform.story(run_id)
    interrupted = [mark for mark in marks if mark.startswith("interrupted")]
    assert interrupted, marks
    assert set(interrupted) == {f"interrupted True DEADLINE {why(limit)} nobody"}, marks
    names = Counter(mark.split()[0] for mark in marks)
    assert names["job-undone"] == (job != "uploads_job"), marks
    assert all(f"reason={why(limit)}".replace(" ", "_") in mark for mark in marks if mark.startswith("told")), marks
    failures = [line for line in story if line.startswith("STEP_FAILURE")]
    assert len(failures) == names["undo"] > 0, story
    assert all(f"was stopped: {why(limit)}" in line for line in failures), story


def test_what_a_person_wants_is_stronger(working: Platform) -> None:
    run_id = working.launch("carries_on_job", grace=6, tags={TIMEOUT_TAG: "1"})
    is_being_stopped(working, run_id)
    assert working.run(run_id).tags[TIMED_OUT_TAG] == why("1")
    assert working.launcher.terminate(run_id)
    assert working.finished(run_id) is DagsterRunStatus.CANCELED, working.story(run_id)
    assert TIMED_OUT_TAG not in working.run(run_id).tags
    working.assert_nothing_left(run_id)


def test_so_it_is_in_the_moment_in_which_its_time_is_over_and_when_its_worker_dies_then(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        with platform.worker("-n", "dies") as dies:
            run_id = platform.launch("carries_on_job", grace=20, tags={TIMEOUT_TAG: "5"})
            platform.marked(run_id, "started")
            before = platform.run(run_id)
            is_being_stopped(platform, run_id)
            dies.process.kill()
            dies.process.wait(10)
        # As Dagster's page does it, which has read the run a moment before.
        assert before.status is DagsterRunStatus.STARTED
        platform.launcher._termination().cancel(before, None, UNKNOWN_AUTHOR)
        with platform.worker("-n", "heir"):
            assert platform.finished(run_id, within=90) is DagsterRunStatus.CANCELED, platform.story(run_id)
            platform.assert_nothing_left(run_id)


def test_a_message_alone_makes_no_run_time_out(working: Platform) -> None:
    """Anybody may have written it, and Dagster tries again what has failed."""
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    working.cancel_by_message(working.task_id(run_id), timed_out=True, reason="run timed out: so it says")
    assert working.finished(run_id) is DagsterRunStatus.CANCELED, working.story(run_id)
    working.assert_nothing_left(run_id)


def test_dagsters_own_limit_counts_when_it_is_shorter(working: Platform) -> None:
    run_id = working.launch("sleepy_job", tags={TIMEOUT_TAG: "300", MAX_RUNTIME_SECONDS_TAG: "0.5"})
    timed_out(working, run_id, why("0.5", MAX_RUNTIME_SECONDS_TAG))


def test_a_limit_that_is_no_number_is_a_warning(working: Platform) -> None:
    run_id = working.launch("quick_job", seconds=0, tags={TIMEOUT_TAG: "5 minutes"})
    assert working.finished(run_id) is DagsterRunStatus.SUCCESS
    (warning,) = [entry for entry in working.instance.all_logs(run_id) if TIMEOUT_TAG in entry.message]
    assert "must be a number of seconds greater than 0, not '5 minutes'" in warning.message
    assert warning.level == logging.WARNING


def test_a_run_that_is_quick_enough_is_not_touched(working: Platform) -> None:
    run_id = working.launch("sleepy_job", seconds=3, tags={TIMEOUT_TAG: "60"})
    working.marked(run_id, "started")
    said = story_of(working.instance, run_id).summary
    assert any(line.startswith("If it has not ended by") for line in said), said
    assert working.finished(run_id) is DagsterRunStatus.SUCCESS
    assert TIMED_OUT_TAG not in working.run(run_id).tags


@pytest.mark.parametrize("job", ["uploads_job", "ignores_everything_job"])
def test_where_its_worker_dies_meanwhile_another_one_ends_it_so(endpoint: str, job: str) -> None:
    with open_platform(endpoint) as platform:
        platform.jobs = CLEANUP_JOBS
        with platform.worker("-n", "dies") as dies:
            run_id = platform.launch(job, seconds=60, grace=5, tags={TIMEOUT_TAG: "2"})
            if job == "uploads_job":  # before it knows of it, so that it is late when somebody looks
                platform.marked(run_id, "started")
                platform.instance.add_run_tags(run_id, {TIMED_OUT_TAG: why("2")})
                platform.instance.report_run_canceling(platform.run(run_id))
            else:
                is_being_stopped(platform, run_id)
            dies.process.kill()
            dies.process.wait(10)
        with platform.worker("-n", "heir"):
            timed_out(platform, run_id, why("2"))
        assert platform.mark_counts(run_id)["undo"] == 1, platform.marks(run_id)


def test_a_run_that_is_late_when_it_is_resumed_does_not_begin_again(endpoint: str) -> None:
    extra = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 3}}
    with open_platform(endpoint, extra=extra) as platform:
        with platform.worker("-n", "dies") as dies:
            run_id = platform.launch("sleepy_job", tags={TIMEOUT_TAG: "4"})
            platform.marked(run_id, "started")
            dies.process.kill()
            dies.process.wait(10)
        record = platform.instance.get_run_record_by_id(run_id)
        assert record is not None
        assert record.start_time is not None
        began = record.start_time
        wait_until(lambda: time.time() > began + 4, "its time is over")
        with platform.worker("-n", "heir"):
            timed_out(platform, run_id, why("4"))
        assert any("the run was interrupted" in line for line in platform.story(run_id)), platform.story(run_id)
        assert platform.mark_counts(run_id)["started"] == 1


def test_dagsters_run_monitoring_may_be_first(endpoint: str) -> None:
    """It makes the run a FAILURE while its processes still run; they are stopped, and cleaned up after."""
    with open_platform(endpoint, extra={"run_monitoring": {"enabled": True}}) as platform:
        platform.jobs = CLEANUP_JOBS
        with platform.worker():
            run_id = platform.launch("uploads_job", seconds=60)
            platform.marked(run_id, "started")
            platform.instance.add_run_tags(run_id, {MAX_RUNTIME_SECONDS_TAG: "0.001"})
            record = platform.instance.get_run_record_by_id(run_id)
            assert record is not None
            check_run_timeout(platform.instance, record, logging.getLogger(__name__), 0)
            platform.marked(run_id, "undo")
            text = why("0.001", MAX_RUNTIME_SECONDS_TAG)
            wait_until(lambda: platform.waiting() == 0, "its message is deleted", within=60)
            assert platform.status(run_id) is DagsterRunStatus.FAILURE
            platform.assert_nothing_left(run_id)
        marks = platform.marks(run_id)
        assert [mark for mark in marks if mark.startswith("interrupted")] == [
            f"interrupted True DEADLINE {text} Dagster's run monitoring"
        ], marks
        assert not Counter(platform.events(run_id))[DagsterEventType.RUN_CANCELED], platform.story(run_id)


@pytest.mark.parametrize("job", ["quick_job", pytest.param("multiprocess_job", marks=pytest.mark.nightly)])
def test_at_whatever_moment_its_time_is_over_it_has_one_end(working: Platform, job: str) -> None:
    """Before it begins, in the middle, while it ends."""
    limits = [0.01 + 0.12 * number for number in range(12)]
    runs = {working.launch(job, seconds=0.4, tags={TIMEOUT_TAG: f"{limit:.2f}"}): limit for limit in limits}
    ends = Counter[DagsterRunStatus]()
    for run_id in runs:
        ends[status := working.finished(run_id)] += 1
        story, events = working.story(run_id), Counter(working.events(run_id))
        assert status in {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE}, story
        assert events[DagsterEventType.RUN_SUCCESS] + events[DagsterEventType.RUN_FAILURE] == 1, story
        assert not events[DagsterEventType.RUN_CANCELED], story
        working.assert_nothing_left(run_id)
        if status is DagsterRunStatus.FAILURE:
            (end,) = [line for line in story if line.startswith(DagsterEventType.RUN_FAILURE.value)]
            assert "run timed out: longer than its limit of" in end, story
    print(ends)
