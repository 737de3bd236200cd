"""What may happen around a step's limit: a cancellation, the end of the step, hooks, shields, senseless tags."""

from dataclasses import replace

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.support.late_jobs import NUMBERS
from tests.support.platform import FOREIGN_JOBS, LATE_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import TIMEOUT_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


@pytest.fixture(scope="module")
def late(working_steps: Platform) -> Platform:
    return replace(working_steps, jobs=LATE_JOBS)


def test_a_terminate_that_comes_while_a_late_op_tidies_up_wins_and_does_not_tear_it(late: Platform) -> None:
    run_id = late.launch("tidies_up_job")
    assert late.marked(run_id, "late") == "DEADLINE"
    assert late.launcher.terminate(run_id)
    assert late.finished(run_id) is DagsterRunStatus.CANCELED, late.story(run_id)
    assert late.marks(run_id) == ["late DEADLINE", "finally REQUESTED"]
    assert Stage.KILLED not in late.stages(run_id)


def test_a_terminate_that_comes_while_handlers_run_ends_the_run_when_they_have(late: Platform) -> None:
    run_id = late.launch("with_slow_handler_job")
    late.marked(run_id, "undoing")
    assert late.launcher.terminate(run_id)
    assert late.finished(run_id) is DagsterRunStatus.CANCELED, late.story(run_id)
    said = "undoing step timed out: longer than its limit of 1 s (dagster-taskiq/timeout_seconds)"
    assert late.marks(run_id) == [said, "undone"]


@pytest.mark.parametrize("job", ["with_hook_job", "with_hook_in_process_job"])
def test_the_hooks_of_a_late_step_run_without_its_limit(late: Platform, job: str) -> None:
    run_id = late.launch(job, grace=0.5)
    assert late.finished(run_id) is DagsterRunStatus.FAILURE, late.story(run_id)
    assert late.marks(run_id) == ["hook"]
    assert Stage.KILLED not in late.stages(run_id)
    assert not late.step_notes(run_id, Stage.KILLED)


def test_a_step_that_ends_when_its_limit_does_harms_no_other_step(late: Platform) -> None:
    run_id = late.launch("at_the_limit_job")
    late.finished(run_id)
    assert late.marks(run_id) == ["after"], late.story(run_id)
    ends = [
        kind for kind in late.events(run_id) if kind in {DagsterEventType.STEP_SUCCESS, DagsterEventType.STEP_FAILURE}
    ]
    assert len(ends) == len(NUMBERS) + 1
    assert Stage.KILLED not in late.stages(run_id)


def test_a_limit_that_makes_no_sense_is_ignored_and_the_log_says_so_once(late: Platform) -> None:
    run_id = late.launch("invalid_limits_job")
    assert late.finished(run_id) is DagsterRunStatus.SUCCESS, late.story(run_id)
    told = [entry.user_message for entry in late.instance.all_logs(run_id) if "Without effect" in entry.user_message]
    assert told == [
        f"Without effect: the tag dagster-taskiq/timeout_seconds must be a number of seconds greater than 0, not {what}"
        for what in ("'soon'", "'0'")
    ]


@pytest.mark.parametrize("by", ["terminate", "time limit"])
def test_a_run_that_waits_for_the_retry_of_a_step_ends_at_once_and_closes_its_resources(
    late: Platform, by: str
) -> None:
    run_id = late.launch("waits_for_its_retry_job", tags={TIMEOUT_TAG: "5"} if by == "time limit" else {})
    wait_until(lambda: DagsterEventType.STEP_UP_FOR_RETRY in late.events(run_id), "it waits", within=60)
    if by == "terminate":
        assert late.launcher.terminate(run_id)
    ends = DagsterRunStatus.CANCELED if by == "terminate" else DagsterRunStatus.FAILURE
    assert late.finished(run_id) is ends, late.story(run_id)
    assert late.marks(run_id) == ["started", "closed"], late.story(run_id)
    assert Stage.KILLED not in late.stages(run_id)


def test_a_late_step_that_is_killed_in_a_shield_names_it(late: Platform) -> None:
    run_id = late.launch("in_a_shield_job", grace=0.5)
    assert late.finished(run_id) is DagsterRunStatus.FAILURE, late.story(run_id)
    (note,) = late.step_notes(run_id, Stage.KILLED)
    assert note["shield"] == "writing the table"


def test_a_limit_counts_in_code_that_knows_nothing_of_this_package(late: Platform) -> None:
    platform = replace(late, jobs=FOREIGN_JOBS)
    run_id = platform.launch("takes_too_long_job")
    assert platform.finished(run_id) is DagsterRunStatus.FAILURE, platform.story(run_id)
    said = "step timed out: longer than its limit of 1 s (dagster-taskiq/timeout_seconds)"
    assert said in platform.failure(run_id, "takes_too_long")
