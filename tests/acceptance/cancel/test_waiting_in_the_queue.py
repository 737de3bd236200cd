"""Runs that no worker has picked up yet."""

from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.launcher import LaunchRunContext
from tests.support.moto import sqs_client
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


def depth(platform: Platform) -> int:
    """Messages in the work queue, visible or not."""
    client = sqs_client(platform.endpoint_url)
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    answer = client.get_queue_attributes(QueueUrl=platform.queue_url, AttributeNames=names)
    client.close()
    return sum(int(answer["Attributes"][name]) for name in names)


def work_is_drained(platform: Platform) -> None:
    wait_until(lambda: depth(platform) == 0, "the work queue is empty", within=40, seen=lambda: depth(platform))


def test_a_run_terminated_or_marked_in_the_queue_is_never_started(platform: Platform) -> None:
    terminated, marked, good = (platform.launch("quick_job") for _ in range(3))
    assert platform.launcher.terminate(terminated)
    platform.instance.report_run_canceled(platform.run(marked))
    deleted = platform.launch("quick_job")
    platform.instance.delete_run(deleted)
    with platform.worker():
        assert platform.finished(good) is DagsterRunStatus.SUCCESS
        work_is_drained(platform)
    for run_id in (terminated, marked):
        assert platform.status(run_id) is DagsterRunStatus.CANCELED
        assert platform.marks(run_id) == []
        assert Stage.PICKED_UP not in platform.stages(run_id)


def test_a_run_that_is_canceling_in_the_queue_is_finished_by_its_receiver(platform: Platform) -> None:
    run_id = platform.launch("quick_job")
    platform.instance.report_run_canceling(platform.run(run_id))
    with platform.worker():
        assert platform.finished(run_id) is DagsterRunStatus.CANCELED
        work_is_drained(platform)
    assert platform.marks(run_id) == []


def test_a_run_cancelled_while_dagsters_daemon_took_it_from_its_queue_does_nothing(working: Platform) -> None:
    """The webserver saw it QUEUED and cancelled it, the daemon saw it QUEUED and made it STARTING a moment later."""
    run = working.create("quick_job")
    working.report(run, DagsterEventType.RUN_CANCELING, DagsterEventType.RUN_CANCELED, DagsterEventType.RUN_STARTING)
    workspace: Any = None
    working.launcher.launch_run(LaunchRunContext(run, workspace))
    working.wait_for_stage(run.run_id, Stage.PICKED_UP)
    wait_until(
        lambda: working.status(run.run_id) is DagsterRunStatus.CANCELED and depth(working) == 0,
        "it is canceled again, and its message is gone",
        seen=lambda: working.story(run.run_id),
    )
    assert working.marks(run.run_id) == []
