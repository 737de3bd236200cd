"""Two channels, either of which is enough: each is tested with the other one cut."""

from collections.abc import Iterator

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.moto import sqs_client
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import parse_event

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


@pytest.fixture(scope="module")
def deaf(endpoint: str) -> Iterator[Platform]:
    """The workers do not hear the cancel queue; the launcher still sends."""
    with (
        open_platform(endpoint) as platform,
        platform.worker("-n", "deaf", env={"DAGSTER_TASKIQ_ENABLE_CANCELLATION": "0"}),
    ):
        yield platform


@pytest.fixture(scope="module")
def blind(endpoint: str) -> Iterator[Platform]:
    """The workers look at the database every five minutes only."""
    rarely = {"status_poll_seconds": 300, "cancel_ttl": 600}
    with (
        open_platform(endpoint, source=rarely) as platform,
        platform.worker("-n", "blind-1"),
        platform.worker("-n", "blind-2"),
    ):
        yield platform


def test_without_the_cancel_queue_the_status_watch_stops_the_run(deaf: Platform) -> None:
    run_id = deaf.launch("sleepy_job")
    deaf.marked(run_id, "started")
    assert deaf.launcher.terminate(run_id)
    assert deaf.finished(run_id) is DagsterRunStatus.CANCELED
    deaf.assert_nothing_left(run_id)
    assert any("(by status watch)" in line for line in deaf.story(run_id))


def test_without_the_status_watch_the_cancel_queue_stops_the_run(blind: Platform) -> None:
    for _ in range(4):
        run_id = blind.launch("sleepy_job")
        blind.marked(run_id, "started")
        assert blind.launcher.terminate(run_id)
        assert blind.finished(run_id) is DagsterRunStatus.CANCELED
        blind.assert_nothing_left(run_id)
        assert any("cancellation reached worker blind-" in line for line in blind.story(run_id))
    nothing_waits(blind)


def test_a_cancel_by_hand_does_not_wait_for_a_status_that_nobody_writes(blind: Platform) -> None:
    run_id = blind.launch("sleepy_job")
    blind.marked(run_id, "started")
    blind.cancel_by_message(blind.task_id(run_id), reason="wrong partition", requested_by="ada")
    assert blind.finished(run_id) is DagsterRunStatus.CANCELED
    events = [
        (entry.timestamp, entry.dagster_event) for entry in blind.instance.all_logs(run_id) if entry.dagster_event
    ]
    (gone_at,) = [at for at, event in events if (note := parse_event(event)) and note[0] is Stage.TREE_GONE]
    (canceled_at,) = [at for at, event in events if event.event_type is DagsterEventType.RUN_CANCELED]
    assert canceled_at - gone_at < 2  # 0.1 s on a machine that has nothing else to do
    assert DagsterEventType.RUN_CANCELING not in blind.events(run_id)


def nothing_waits(platform: Platform) -> None:
    client = sqs_client(platform.endpoint_url)

    def depth() -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = client.get_queue_attributes(QueueUrl=platform.queue_url + "-cancels", AttributeNames=names)
        return sum(int(answer["Attributes"][name]) for name in names)

    wait_until(lambda: depth() == 0, "the cancel queue is empty", seen=depth)
    client.close()


def test_a_run_marked_canceled_is_really_stopped_and_stays_canceled(working: Platform) -> None:
    """What "Force termination immediately" does: it marks the run, and never calls the launcher."""
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    working.instance.report_run_canceled(working.run(run_id))
    working.wait_for_stage(run_id, Stage.TREE_GONE)
    working.assert_nothing_left(run_id)
    assert "cleanup-end" in working.marks(run_id)
    assert working.status(run_id) is DagsterRunStatus.CANCELED


def test_a_run_marked_canceled_whose_op_carries_on_stays_canceled(working: Platform) -> None:
    run_id = working.launch("swallows_once_job")
    working.marked(run_id, "started")
    working.instance.report_run_canceled(working.run(run_id))
    working.wait_for_stage(run_id, Stage.TREE_GONE)
    working.assert_nothing_left(run_id)
    assert "afterwards" not in working.marks(run_id)
    assert working.status(run_id) is DagsterRunStatus.CANCELED


def test_a_run_that_is_marked_failed_is_stopped_and_stays_failed(working: Platform) -> None:
    """What run monitoring does at a start timeout, or at the maximum runtime."""
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    working.instance.report_run_failed(working.run(run_id))
    working.wait_for_stage(run_id, Stage.TREE_GONE)
    working.assert_nothing_left(run_id)
    assert working.status(run_id) is DagsterRunStatus.FAILURE


def test_a_run_that_is_deleted_is_stopped(working: Platform) -> None:
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    task_id = working.task_id(run_id)
    from dagster_taskiq.process.child_handle import find_processes

    assert find_processes(task_id)
    working.instance.delete_run(run_id)
    wait_until(lambda: not find_processes(task_id), "the process tree is gone", seen=lambda: find_processes(task_id))


def test_any_program_can_cancel_with_a_message(working: Platform) -> None:
    """Nothing but the task id is needed: the run becomes CANCELED although nobody called `terminate`."""
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    client = sqs_client(working.endpoint_url)
    client.send_message(
        QueueUrl=working.queue_url + "-cancels", MessageBody=f'{{"task_id": "{working.task_id(run_id)}"}}'
    )
    client.close()
    assert working.finished(run_id) is DagsterRunStatus.CANCELED
    working.assert_nothing_left(run_id)
