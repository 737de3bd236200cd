"""Runs that no worker has picked up yet, and messages that come again."""

import signal

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform
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


def test_a_second_message_for_a_running_run_does_not_disturb_it(endpoint: str) -> None:
    """A duplicate delivery; Dagster itself would fail the healthy run."""
    with open_platform(endpoint) as platform, platform.worker("-n", "a"), platform.worker("-n", "b"):
        run_id = platform.launch("sleepy_job", seconds=3)
        platform.marked(run_id, "started")
        duplicate(platform, run_id)
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS
        work_is_drained(platform)
        assert platform.status(run_id) is DagsterRunStatus.SUCCESS
        assert len([mark for mark in platform.marks(run_id) if mark.startswith("started")]) == 1


def duplicate(platform: Platform, run_id: str) -> None:
    """Send the run's message again, as a plain producer would."""
    import asyncio

    from taskiq.kicker import AsyncKicker

    from dagster_taskiq.cancellable_broker import CancellableSQSBroker
    from dagster_taskiq.messages import EXECUTE_RUN

    async def send() -> None:
        broker = CancellableSQSBroker(platform.queue_url, "us-east-1", endpoint_url=platform.endpoint_url)
        kicker: AsyncKicker[..., object] = AsyncKicker(EXECUTE_RUN, broker, {})
        await kicker.with_task_id(platform.task_id(run_id)).kiq(run_id=run_id)
        await broker.shutdown()

    asyncio.run(send())


def test_a_run_whose_worker_was_killed_while_canceling_is_finished_by_the_next(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        with platform.worker("-n", "first") as first:
            run_id = platform.launch("carries_on_job")
            pid = int(platform.marked(run_id, "started"))
            platform.kill(first.pid)
            first.stop(signal.SIGKILL)
        assert platform.launcher.terminate(run_id)
        # No child outlives its worker: interrupted, and killed when it does not obey.
        wait_until(lambda: not platform.processes(run_id), "the child is gone", seen=lambda: platform.processes(run_id))
        assert platform.status(run_id) is DagsterRunStatus.CANCELING, "nobody may say more before the next worker looks"
        with platform.worker("-n", "second"):
            assert platform.finished(run_id, within=40) is DagsterRunStatus.CANCELED
        assert pid not in platform.processes(run_id)


def test_a_run_whose_worker_was_killed_is_a_failure_that_names_it(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        with platform.worker("-n", "first") as first:
            run_id = platform.launch("sleepy_job")
            platform.marked(run_id, "started")
            platform.kill(first.pid)
            first.stop(signal.SIGKILL)
        platform.marked(run_id, "cleanup-end")
        with platform.worker("-n", "second"):
            assert platform.finished(run_id, within=40) is DagsterRunStatus.FAILURE
        assert any("worker first-" in line and "is gone" in line for line in platform.story(run_id))


def test_a_run_whose_worker_was_killed_is_resumed_where_monitoring_allows_it(endpoint: str) -> None:
    monitoring = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 1}}
    with open_platform(endpoint, extra=monitoring) as platform:
        with platform.worker("-n", "first") as first:
            run_id = platform.launch("sleepy_job", seconds=5)
            platform.marked(run_id, "started")
            platform.kill(first.pid)
            first.stop(signal.SIGKILL)
        with platform.worker("-n", "second"):
            assert platform.finished(run_id, within=40) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert platform.instance.count_resume_run_attempts(run_id) == 1
