"""A worker process: its stop, its drain, and what strangers put into its queues."""

import asyncio
import base64
import json
import os
import signal
import time
from typing import Any

import pytest
import taskiq_aws
from dagster import DagsterRunStatus
from taskiq import AsyncBroker
from taskiq.kicker import AsyncKicker
from tests.acceptance.conftest import open_platform
from tests.support.moto import sqs_client
from tests.support.platform import REAL_WORKER, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.messages import EXECUTE_RUN
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.fleet import StopRequest, ask_to_stop
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.storage.workers import list_workers

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


def test_an_idle_worker_stops_at_once_and_leaves_no_process(platform: Platform) -> None:
    with platform.worker(program=REAL_WORKER) as worker:
        children = descendants(worker.pid)
        assert children, "the fork server"
        assert worker.stop() == 0
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]  # noqa: PTH110 - a pid, not a file


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_a_draining_worker_finishes_what_is_short_and_takes_nothing_new(endpoint: str) -> None:
    with open_platform(endpoint, source={"drain_seconds": 30, "stop_timeout_seconds": 60}) as platform:
        with platform.worker() as worker:
            short = platform.launch("quick_job", seconds=1)
            platform.marked(short, "started")
            asked_at = time.monotonic()
            worker.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in worker.log(), "the worker drains", seen=worker.log)
            late = platform.launch("quick_job", seconds=0)
            assert worker.stop(signal.SIGCONT) == 0
            assert time.monotonic() - asked_at < 15, "it ends with its last run, and does not wait for the drain's end"
            assert platform.status(short) is DagsterRunStatus.SUCCESS
            assert platform.status(late) is DagsterRunStatus.STARTING
        with platform.worker():
            assert platform.finished(late) is DagsterRunStatus.SUCCESS


def test_a_cancel_is_heard_while_the_worker_drains(endpoint: str) -> None:
    patient = {"drain_seconds": 60, "stop_timeout_seconds": 90}
    with open_platform(endpoint, source=patient) as platform, platform.worker() as worker:
        run_id = platform.launch("sleepy_job")
        platform.marked(run_id, "started")
        worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in worker.log(), "the worker drains", seen=worker.log)
        assert platform.launcher.terminate(run_id)
        assert platform.finished(run_id) is DagsterRunStatus.CANCELED
        assert worker.stop(signal.SIGCONT) == 0


def test_a_run_that_outlasts_the_drain_is_a_failure_that_names_the_shutdown(endpoint: str) -> None:
    with open_platform(endpoint, source={"drain_seconds": 0.5}) as platform:
        with platform.worker("-n", "w") as worker:
            run_id = platform.launch("sleepy_job")
            platform.marked(run_id, "started")
            assert worker.stop() == 0
        assert platform.status(run_id) is DagsterRunStatus.FAILURE
        assert any("worker shut down" in line for line in platform.story(run_id))
        assert "cleanup-end" in platform.marks(run_id)
        platform.assert_nothing_left(run_id)


def test_a_run_that_outlasts_the_drain_goes_on_elsewhere_where_monitoring_allows_it(endpoint: str) -> None:
    monitoring = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 1}}
    with open_platform(endpoint, source={"drain_seconds": 0.5}, extra=monitoring) as platform:
        with platform.worker("-n", "first") as worker:
            run_id = platform.launch("sleepy_job", seconds=5)
            platform.marked(run_id, "started")
            assert worker.stop() == 0
        assert platform.status(run_id) is DagsterRunStatus.STARTED
        with platform.worker("-n", "second"):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)


def test_a_second_signal_skips_the_drain(endpoint: str) -> None:
    with open_platform(endpoint, source={"drain_seconds": 100, "stop_timeout_seconds": 120}) as platform:
        with platform.worker() as worker:
            run_id = platform.launch("sleepy_job")
            platform.marked(run_id, "started")
            worker.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in worker.log(), "the worker drains", seen=worker.log)
            assert worker.stop() == 0
        assert platform.status(run_id) is DagsterRunStatus.FAILURE


def test_a_signal_after_a_request_from_afar_is_the_first_one(endpoint: str) -> None:
    """Who sends it, such as ECS, does not know of the request."""
    with open_platform(endpoint, source={"drain_seconds": 60, "stop_timeout_seconds": 90}) as platform:
        with platform.worker("-n", "w") as worker:
            run_id = platform.launch("sleepy_job", seconds=3)
            platform.marked(run_id, "started")
            (living,) = list_workers(platform.instance, platform.launcher.settings)
            ask_to_stop(platform.instance, living.worker_id, StopRequest(time.time(), "ada"))
            wait_until(lambda: "stopping" in worker.log(), "the worker drains", seen=worker.log)
            assert worker.stop() == 0
        assert platform.status(run_id) is DagsterRunStatus.SUCCESS


def test_a_worker_that_is_stopped_while_it_picks_runs_up_loses_none(endpoint: str) -> None:
    with open_platform(endpoint, source={"drain_seconds": 0, "stop_timeout_seconds": 10}) as platform:
        with platform.worker("-n", "first") as worker:
            runs = [platform.launch("quick_job", seconds=0.5) for _ in range(6)]
            wait_until(
                lambda: any(Stage.PICKED_UP in platform.stages(run_id) for run_id in runs), "one is picked up", every=0
            )
            assert worker.stop() == 0
        for run_id in runs:
            platform.assert_nothing_left(run_id)
            assert platform.status(run_id) is not DagsterRunStatus.STARTED, platform.story(run_id)
        with platform.worker("-n", "second"):
            for run_id in runs:
                interrupted = any("worker shut down" in line for line in platform.story(run_id))
                expected = DagsterRunStatus.FAILURE if interrupted else DagsterRunStatus.SUCCESS
                assert platform.finished(run_id) is expected, platform.story(run_id)


def test_a_person_is_stronger_than_a_shutdown(endpoint: str) -> None:
    """Terminated while the shutdown's grace runs: CANCELED, not "worker shut down"."""
    with open_platform(endpoint, source={"drain_seconds": 0, "stop_timeout_seconds": 12}) as platform:
        with platform.worker() as worker:
            run_id = platform.launch("carries_on_job")
            platform.marked(run_id, "started")
            worker.process.send_signal(signal.SIGTERM)
            platform.marked(run_id, "swallowed")
            assert platform.launcher.terminate(run_id)
            assert worker.stop(signal.SIGCONT) == 0
        assert platform.status(run_id) is DagsterRunStatus.CANCELED
        assert platform.marks(run_id).count("swallowed") == 1


def test_a_plain_producer_feeds_our_worker(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any `taskiq_aws` program can start existing work, and the run can be terminated all the same."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with open_platform(endpoint) as platform, platform.worker():
        run = platform.create("sleepy_job")

        async def send() -> str:
            broker: AsyncBroker = taskiq_aws.SQSBroker(platform.queue_url, "us-east-1")
            kicker: AsyncKicker[..., object] = AsyncKicker(EXECUTE_RUN, broker, {})
            return (await kicker.kiq(run_id=run.run_id)).task_id

        task_id = asyncio.run(send())
        platform.marked(run.run_id, "started")
        assert platform.run(run.run_id).tags[TASK_ID_TAG] == task_id
        assert platform.launcher.terminate(run.run_id)
        assert platform.finished(run.run_id) is DagsterRunStatus.CANCELED


def test_our_messages_are_read_by_a_plain_worker(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", platform.endpoint_url)
    run_id = platform.launch("quick_job")

    async def receive() -> bytes:
        broker = taskiq_aws.SQSBroker(platform.queue_url, "us-east-1", wait_time=1)
        listener = broker.listen()
        async for message in listener:
            body = broker.formatter.loads(message.data)
            await message.ack()
            if body.kwargs["run_id"] == run_id:
                return bytes(message.data)
        raise AssertionError("unreachable")

    body = json.loads(asyncio.run(asyncio.wait_for(receive(), 20)))
    assert body["task_name"] == EXECUTE_RUN
    assert body["task_id"] == platform.task_id(run_id)
    # A message names a run. It names no code, no instance and no command.
    assert body["args"] == []
    assert body["kwargs"] == {"run_id": run_id}


def envelope(message: bytes) -> str:
    body = {"message": base64.b64encode(message).decode(), "task_id": "x", "task_name": "y", "labels": {}}
    return json.dumps(body)


def task(task_name: str, *args: object, **kwargs: object) -> str:
    task_id = f"garbage-{task_name}-{len(args)}-{len(kwargs)}-{kwargs.get('run_id')}"
    named = {"task_id": task_id.replace(" ", "-"), "task_name": task_name, "labels": {}}
    return envelope(json.dumps({**named, "args": args, "kwargs": kwargs}).encode())


GARBAGE = [
    "",
    "{",
    "[]",
    '{"task_id": 1}',
    '{"message": "!"}',
    envelope(b"\x80garbage"),
    task("os:system", "id"),
    task(EXECUTE_RUN),
    task(EXECUTE_RUN, run_id=5),
    task(EXECUTE_RUN, run_id="../../etc"),
    task(EXECUTE_RUN, "not a run", "and", "more", code="import os"),
]


def test_garbage_is_logged_once_not_lost_and_stops_nobody(endpoint: str) -> None:
    with open_platform(endpoint, source={"visibility_timeout_seconds": 4}) as platform:
        client = sqs_client(endpoint)
        for body in GARBAGE:
            client.send_message(QueueUrl=platform.queue_url, MessageBody=body or " ")
            client.send_message(QueueUrl=platform.queue_url + "-cancels", MessageBody=body or " ")
        with platform.worker() as worker:
            run_id = platform.launch("sleepy_job")
            platform.marked(run_id, "started")
            assert platform.launcher.terminate(run_id)
            assert platform.finished(run_id) is DagsterRunStatus.CANCELED
            # Once for each message, however often it comes again.
            wait_until(
                lambda: len([one for one in reported(platform) if one["received"] > 1]) == min(len(GARBAGE), 10),
                "the garbage has come again",
                within=50,
                seen=lambda: reported(platform),
            )
            said = platform.command("queue", "status").stdout
            assert said.count("is of no use to any worker: received ") == min(len(GARBAGE), 10), said
        left = client.get_queue_attributes(QueueUrl=platform.queue_url, AttributeNames=["All"])["Attributes"]
        names = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")
        assert sum(int(left[name]) for name in names) == len(GARBAGE)
        complaints = [line for line in worker.lines if "left to expire" in line]
        assert len([line for line in complaints if "-cancels: " not in line]) == len(GARBAGE), worker.log()
        assert "Traceback" not in worker.log()
        client.close()


def reported(platform: Platform) -> list[dict[str, Any]]:
    """The messages of no use that the worker tells of, with its heartbeat."""
    heartbeats = Heartbeats.of_runs(platform.instance, platform.launcher.settings)
    return [message for last in heartbeats.last() for message in last.facts.get("unusable", ())]


def test_the_worker_says_who_it_is_in_the_log_of_the_run(working: Platform) -> None:
    run_id = working.launch("quick_job", seconds=0)
    assert working.finished(run_id) is DagsterRunStatus.SUCCESS
    assert Stage.PICKED_UP in working.stages(run_id)
