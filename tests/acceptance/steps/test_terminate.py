"""Terminate a run whose steps are at work on several workers: all stop, and only then is the run CANCELED."""

from contextlib import ExitStack
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, steps_platform
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

MONITORING: dict[str, Any] = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 2}}


def assert_canceled_after_its_steps(platform: Platform, run_id: str, *, within: float = 40) -> None:
    assert platform.finished(run_id, within=within) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    log = [entry.dagster_event for entry in platform.instance.all_logs(run_id)]
    events = [event for event in log if event is not None]
    kinds = [event.event_type for event in events]
    assert kinds.count(DagsterEventType.RUN_CANCELED) == 1
    assert DagsterEventType.RUN_FAILURE not in kinds
    assert DagsterEventType.RUN_SUCCESS not in kinds
    late = [event for event in events[kinds.index(DagsterEventType.RUN_CANCELED) :] if event.step_key is not None]
    assert not late, f"written about steps after RUN_CANCELED: {late}"
    ended = {event.step_key for event in events if event.is_step_failure or event.is_step_success}
    begun = {event.step_key for event in events if event.is_step_start}
    waiting_for_a_retry = {event.step_key for event in events if event.is_step_up_for_retry}
    assert begun <= ended | waiting_for_a_retry


@pytest.mark.xdist_group("crowds")  # one at a time: each fills a machine
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "extra", [pytest.param({}, id="unmonitored", marks=pytest.mark.nightly), pytest.param(MONITORING, id="monitored")]
)
def test_forty_steps_on_four_workers_stop_and_what_is_queued_never_starts(endpoint: str, extra: dict[str, Any]) -> None:
    source = {**UNHURRIED, "max_concurrent_steps": 10}
    with steps_platform(endpoint, extra=extra, source=source) as platform, ExitStack() as stack:
        workers = [stack.enter_context(platform.worker("-n", f"w{number}", ready=False)) for number in range(4)]
        for worker in workers:
            worker.wait_ready()
        run_id = platform.launch("fifty_steps", grace=30)
        platform.wait_started(run_id, 40)
        assert platform.launcher.terminate(run_id) is True
        assert_canceled_after_its_steps(platform, run_id)
        marks = platform.mark_counts(run_id)
        assert marks["started"] == marks["cleanup-begin"] == marks["cleanup-end"] == 40, marks
        assert not marks["slept"]
        assert not marks["afterwards"]
        assert Stage.KILLED not in platform.stages(run_id)
        assert len({facts["dagster-taskiq/worker"] for facts in platform.step_notes(run_id, Stage.TREE_GONE)}) == 4
        assert len(platform.step_notes(run_id, Stage.TREE_GONE)) == 40
        told = "\n".join(platform.story(run_id))
        # How many is up to chance: a worker's status watch may have been quicker than the run's message.
        assert "forwarding the interrupt to" in told, told
        assert "steps stopped after" in told, told


def test_while_the_executor_is_submitting(working_steps: Platform) -> None:
    platform = working_steps
    run_id = platform.launch("two_hundred_steps")
    wait_until(
        lambda: DagsterEventType.STEP_WORKER_STARTING in platform.events(run_id),
        "the first steps are sent",
        within=60,
        every=0,
    )
    assert platform.launcher.terminate(run_id) is True
    assert_canceled_after_its_steps(platform, run_id)
    sent = platform.events(run_id).count(DagsterEventType.STEP_WORKER_STARTING)
    assert sent < 200, "came too late to be a test of this"
    marks = platform.mark_counts(run_id)
    assert marks["cleanup-begin"] == marks["cleanup-end"] == marks["started"], marks


def test_while_a_step_waits_for_its_retry(working_steps: Platform) -> None:
    platform = working_steps
    run_id = platform.launch("fails_and_waits_steps")
    wait_until(
        lambda: DagsterEventType.STEP_UP_FOR_RETRY in platform.events(run_id),
        "the step waits for its retry",
        within=60,
        seen=lambda: platform.story(run_id),
    )
    assert platform.launcher.terminate(run_id) is True
    assert_canceled_after_its_steps(platform, run_id)
    assert platform.mark_counts(run_id)["started"] == 1


def test_during_a_dynamic_fan_out(working_steps: Platform) -> None:
    platform = working_steps
    run_id = platform.launch("dynamic_steps", count=12)
    platform.wait_started(run_id, 2)
    assert platform.launcher.terminate(run_id) is True
    assert_canceled_after_its_steps(platform, run_id)
    marks = platform.mark_counts(run_id)
    assert marks["cleanup-end"] == marks["started"] - 1, marks  # the fan-out itself has none
    assert not [mark for mark in marks if mark.startswith("collected")]


def test_twice(working_steps: Platform) -> None:
    platform = working_steps
    run_id = platform.launch("two_steps")
    platform.wait_started(run_id, 2)
    assert platform.launcher.terminate(run_id) is True
    assert platform.launcher.terminate(run_id) in (True, False)
    assert_canceled_after_its_steps(platform, run_id)
    marks = platform.mark_counts(run_id)
    assert marks["cleanup-begin"] == marks["cleanup-end"] == 2, marks


def test_steps_that_do_not_obey_are_killed_and_give_their_pool_slots_back(working_steps: Platform) -> None:
    platform = working_steps
    storage = platform.instance.event_log_storage
    storage.set_concurrency_slots("scarce_steps", 1)
    run_id = platform.launch("stubborn_steps", grace=1)
    platform.wait_started(run_id, 1)
    assert storage.get_concurrency_info("scarce_steps").active_run_ids == {run_id}
    assert platform.launcher.terminate(run_id) is True
    assert_canceled_after_its_steps(platform, run_id)
    assert platform.step_notes(run_id, Stage.KILLED)
    assert Stage.KILLED not in platform.stages(run_id), "the run itself waited for its steps, and was not killed"
    assert not storage.get_concurrency_info("scarce_steps").active_run_ids


def test_by_force_mark_alone(working_steps: Platform) -> None:
    """What the UI does on "Force termination immediately": the status is all that the workers hear of it."""
    platform = working_steps
    run_id = platform.launch("two_steps")
    platform.wait_started(run_id, 2)
    platform.instance.report_run_canceled(platform.run(run_id))
    wait_until(
        lambda: platform.mark_counts(run_id)["cleanup-end"] == 2,
        "both steps have stopped",
        seen=lambda: platform.story(run_id),
    )
    wait_until(lambda: not platform.processes(run_id), "the run's process is gone")
    assert platform.status(run_id) is DagsterRunStatus.CANCELED


def test_when_no_cancel_message_arrives(endpoint: str) -> None:
    """The status watch of each worker is enough."""
    with steps_platform(endpoint) as platform, platform.worker("-n", "w"):
        run_id = platform.launch("two_steps")
        platform.wait_started(run_id, 2)
        platform.instance.report_run_canceling(platform.run(run_id))
        assert_canceled_after_its_steps(platform, run_id)
        assert platform.mark_counts(run_id)["cleanup-end"] == 2


def test_one_step_alone_by_its_cancel_message(working_steps: Platform) -> None:
    """The run goes on as after any failed step, and the step is not tried again."""
    platform = working_steps
    run_id = platform.launch("tried_again_steps")
    platform.wait_started(run_id, 1)
    (task_id,) = platform.step_tasks(run_id)
    platform.cancel_by_message(task_id)
    assert platform.finished(run_id) is DagsterRunStatus.FAILURE, platform.story(run_id)
    assert platform.mark_counts(run_id)["started"] == 1
