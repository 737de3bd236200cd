"""A message that is received again: what becomes of it, row by row, and Dagster's own monitoring beside it."""

import signal
from typing import Any

import psutil
import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.freezing import frozen
from tests.support.monitoring import monitoring_daemon
from tests.support.moto import sqs_client
from tests.support.platform import Platform, WorkerProcess
from tests.support.waiting import wait_until

from dagster_taskiq.dagster_compat.api import RESUME_RUN_LOG_MESSAGE, WorkerStatus
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def monitored(attempts: int) -> dict[str, Any]:
    return {"run_monitoring": {"enabled": True, "max_resume_run_attempts": attempts, "poll_interval_seconds": 1}}


def kill(worker: WorkerProcess) -> None:
    """SIGKILL, to the worker alone."""
    worker.process.kill()
    worker.process.wait(10)


def body_of_the_message(platform: Platform) -> str:
    """The body of the one message in the queue, which stays there."""
    client = sqs_client(platform.endpoint_url)
    (message,) = client.receive_message(QueueUrl=platform.queue_url, VisibilityTimeout=0)["Messages"]
    return str(message["Body"])


def send(platform: Platform, body: str) -> None:
    sqs_client(platform.endpoint_url).send_message(QueueUrl=platform.queue_url, MessageBody=body)


def resumptions(platform: Platform, run_id: str) -> int:
    entries = platform.instance.all_logs(run_id)
    messages = [entry.dagster_event.message or "" for entry in entries if entry.dagster_event]
    return sum(text == RESUME_RUN_LOG_MESSAGE or "the run was interrupted" in text for text in messages)


def test_what_is_not_to_be_started_is_dropped(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        deleted, failed, superseded = runs = [platform.launch("quick_job", seconds=0) for _ in range(3)]
        platform.instance.delete_run(deleted)
        platform.instance.report_run_failed(platform.run(failed))
        platform.instance.add_run_tags(superseded, {TASK_ID_TAG: "another"})
        stories = [platform.story(run_id) for run_id in runs]
        with platform.worker() as worker:
            wait_until(lambda: platform.waiting() == 0, "the messages are deleted", within=60, seen=worker.log)
            reasons = {"does not exist", "is FAILURE already", "superseded"}
            wait_until(lambda: all(why in worker.log() for why in reasons), "the worker says why", seen=worker.log)
        assert [platform.story(run_id) for run_id in runs] == stories, "no trace in the log"


def test_a_message_that_comes_many_times_is_worked_on_once(endpoint: str) -> None:
    """Its copies go to the worker that is at work and to another one, while it is, and after it has ended."""
    with open_platform(endpoint) as platform:
        run_id = platform.launch("sleepy_job", seconds=4)
        body = body_of_the_message(platform)
        with platform.worker("-n", "one"), platform.worker("-n", "other") as other:
            platform.marked(run_id, "started")
            for _ in range(4):
                send(platform, body)
            assert platform.finished(run_id, within=60) is DagsterRunStatus.SUCCESS, platform.story(run_id)
            send(platform, body)
            wait_until(lambda: platform.waiting() == 0, "all are deleted", within=90, seen=other.log)
        assert platform.mark_counts(run_id)["started"] == 1
        assert platform.stages(run_id).count(Stage.PICKED_UP) == 1


def test_canceling_when_its_worker_died_is_finished_by_who_receives_it(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        with platform.worker("-n", "dies") as dies:
            runs = polite, stubborn = platform.launch("sleepy_job"), platform.launch("carries_on_job", grace=3)
            for run_id in runs:
                platform.marked(run_id, "started")
            with frozen(dies.pid):  # so that it hears of nothing
                for run_id in runs:
                    assert platform.launcher.terminate(run_id)
                kill(dies)
        # No child outlives its worker: interrupted, and killed when it does not obey.
        wait_until(lambda: not platform.processes(polite) + platform.processes(stubborn), "the children are gone")
        for run_id in runs:
            assert platform.status(run_id) is DagsterRunStatus.CANCELING, "no more before the next worker looks"
        with platform.worker("-n", "heir"):
            for run_id in runs:
                assert platform.finished(run_id, within=90) is DagsterRunStatus.CANCELED, platform.story(run_id)
            wait_until(lambda: platform.waiting() == 0, "their messages are deleted", within=60)
        for run_id in runs:
            platform.assert_nothing_left(run_id)
            assert platform.mark_counts(run_id)["started"] == 1


@pytest.mark.parametrize(
    ("draining", "attempts"),
    [
        pytest.param(False, 0, id="at_work-failed"),
        pytest.param(True, 1, id="draining-resumed"),
        pytest.param(False, 1, id="at_work-resumed", marks=pytest.mark.nightly),
        pytest.param(True, 0, id="draining-failed", marks=pytest.mark.nightly),
    ],
)
def test_a_run_whose_worker_was_killed_is_a_failure_or_resumed(endpoint: str, draining: bool, attempts: int) -> None:
    extra = monitored(attempts) if attempts else {}
    source = {"drain_seconds": 60, "stop_timeout_seconds": 80}
    with open_platform(endpoint, source=source, extra=extra) as platform:
        with platform.worker("-n", "dies") as dies:
            run_id = platform.launch("sleepy_job", seconds=6)
            platform.marked(run_id, "started")
            if draining:
                dies.process.send_signal(signal.SIGTERM)
                wait_until(lambda: "stopping" in dies.log(), "the worker drains", seen=dies.log)
            kill(dies)
        wait_until(lambda: platform.processes(run_id) == [], "its children end with it")
        with platform.worker("-n", "heir"):
            expected = DagsterRunStatus.SUCCESS if attempts else DagsterRunStatus.FAILURE
            assert platform.finished(run_id, within=90) is expected, platform.story(run_id)
        assert platform.mark_counts(run_id)["slept"] == attempts
        assert platform.mark_counts(run_id)["started"] == 1 + attempts
        assert resumptions(platform, run_id) == attempts
        assert platform.instance.count_resume_run_attempts(run_id) == 0, "an interruption is none of monitoring's"
        named = any("worker dies-" in line and "is gone" in line for line in platform.story(run_id))
        assert attempts or named, platform.story(run_id)


@pytest.mark.parametrize("attempts", [0, 1], ids=["failed", "resumed"])
def test_beside_dagsters_monitoring_a_dead_worker_counts_once(endpoint: str, attempts: int) -> None:
    """The daemon finds the worker dead, and the message comes again: one of them does it."""
    with open_platform(endpoint, extra=monitored(attempts)) as platform, monitoring_daemon(platform):
        with platform.worker("-n", "dies") as dies:
            run_id = platform.launch("sleepy_job", seconds=5)
            platform.marked(run_id, "started")
            kill(dies)
        with platform.worker("-n", "heir") as heir:
            expected = DagsterRunStatus.SUCCESS if attempts else DagsterRunStatus.FAILURE
            assert platform.finished(run_id, within=120) is expected, "\n".join(platform.story(run_id))
            wait_until(lambda: platform.waiting() == 0, "no message is left", within=60, seen=heir.log)
        kinds = platform.events(run_id)
        assert resumptions(platform, run_id) == attempts, platform.story(run_id)
        assert platform.mark_counts(run_id)["started"] == 1 + attempts, platform.story(run_id)
        assert kinds.count(DagsterEventType.RUN_FAILURE) == 1 - attempts, platform.story(run_id)
        assert kinds.count(DagsterEventType.RUN_SUCCESS) == attempts, platform.story(run_id)
        platform.assert_nothing_left(run_id)


def test_dagsters_monitoring_leaves_a_healthy_run_alone(endpoint: str) -> None:
    """Longer than a heartbeat is good for, and while a worker's process stands still for a moment."""
    with (
        open_platform(endpoint, extra=monitored(1)) as platform,
        monitoring_daemon(platform),
        platform.worker() as worker,
    ):
        run_id = platform.launch("sleepy_job", seconds=10)
        platform.marked(run_id, "started")
        process = psutil.Process(worker.pid)
        process.suspend()
        try:
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "it stands still")
        finally:
            process.resume()
        assert platform.finished(run_id, within=60) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert resumptions(platform, run_id) == 0
        assert platform.mark_counts(run_id)["started"] == 1


def test_a_run_that_was_resumed_waits_and_is_not_given_up_once_more(endpoint: str) -> None:
    """Of a dead worker's run it is told once that it is lost, for each time that a worker had it."""
    with open_platform(endpoint) as platform:
        run = platform.create("quick_job")
        platform.report(run, DagsterEventType.RUN_STARTING, DagsterEventType.RUN_START)
        claims = Claims(platform.instance, Heartbeats(platform.instance, 60, 5))
        claims.heartbeats.gone("gone-1")
        look = platform.launcher.check_run_worker_health
        for task_id, epoch in (("task-1", 1), ("task-2", 3)):
            platform.instance.add_run_tags(run.run_id, {TASK_ID_TAG: task_id})
            as_monitoring_has_read_it = platform.run(run.run_id)
            assert look(as_monitoring_has_read_it).status is WorkerStatus.RUNNING, "waiting"
            taken = claims.take(run, "gone-1", task_id, "nowhere", claims.read([run.run_id]).get(run.run_id))
            assert taken is not None
            assert taken.epoch == epoch
            assert look(as_monitoring_has_read_it).status is WorkerStatus.NOT_FOUND
            assert not claims.holds(run.run_id), "whoever was given up has lost it, also if it lives"
        platform.instance.add_run_tags(run.run_id, {TASK_ID_TAG: "task-3"})
        assert look(as_monitoring_has_read_it).status is WorkerStatus.RUNNING, "resumed meanwhile"
