"""FIFO queues of two routes, one of them made by hand and one by our command.

Nothing may wait for a message that is in flight, and nothing that is sent again may be taken for a duplicate, which SQS
drops without a word for five minutes.
"""

import signal
from collections.abc import Iterator

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, steps_platform
from tests.support.moto import sqs_client
from tests.support.platform import STEP_JOBS, STORM_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.process.child_handle import find_processes
from dagster_taskiq.queue_names import queue_name, sibling_queue
from dagster_taskiq.storage.engine_events import WORKER_KEY, Stage
from dagster_taskiq.storage.tags import QUEUE_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

BOTH = ("-q", "gpu", "-q", "default")
GPU = {QUEUE_TAG: "gpu"}
SETTINGS = {"interrupted_steps": "retry", "drain_seconds": 0, "stop_timeout_seconds": 10}
SUFFIXES = [f"{route}{kind}" for route in ("", "-gpu") for kind in ("", "-steps", "-cancels")]


@pytest.fixture(
    scope="module",
    params=[
        "moto",
        # It remembers deduplication ids, as SQS does, but is slow: beside other tests a launch has taken over 10 s.
        pytest.param("localstack", marks=[pytest.mark.nightly, pytest.mark.xdist_group("localstack")]),
    ],
)
def endpoint(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def routes(endpoint: str) -> Iterator[Platform]:
    """Queues, and no worker."""
    with steps_platform(endpoint, fifo=True, source={**UNHURRIED, **SETTINGS}) as platform:
        made = platform.command("queue", "create", "--route", "gpu")
        assert made.returncode == 0, made.stderr
        yield platform


def messages(platform: Platform) -> dict[str, int]:
    return {suffix: platform.waiting(suffix) for suffix in SUFFIXES}


def has_no_message_left(platform: Platform) -> None:
    wait_until(
        lambda: not any(messages(platform).values()), "all queues are empty", within=60, seen=lambda: messages(platform)
    )


def workers_of_steps(platform: Platform, run_id: str) -> dict[str, str]:
    """By step, the name of the worker that has picked it up."""
    notes = platform.step_notes(run_id, Stage.PICKED_UP)
    return {note["step_key"].partition("[")[0]: note[WORKER_KEY].partition("-")[0] for note in notes}


def test_the_command_makes_queues_whose_groups_do_not_share_a_limit(routes: Platform) -> None:
    client = sqs_client(routes.endpoint_url)
    url = sibling_queue(routes.queue_url, "-gpu-steps")
    assert queue_name(url).endswith("-gpu-steps.fifo")
    attributes = client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    assert attributes["FifoQueue"] == "true"
    assert attributes["DeduplicationScope"] == "messageGroup"
    assert attributes["FifoThroughputLimit"] == "perMessageGroupId"


@pytest.mark.long
def test_a_run_over_both_routes_works_longer_than_its_messages_are_hidden(endpoint: str) -> None:
    """One worker for both; its steps are at work together, and none of them comes a second time."""
    with steps_platform(endpoint, fifo=True, source={"visibility_timeout_seconds": 12}) as platform:
        platform.create_route("gpu")
        with platform.worker("-n", "both", *BOTH) as worker:
            run_id = platform.launch("routed_dynamic_steps", seconds=16, count=3)
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
            has_no_message_left(platform)
        assert platform.mark_counts(run_id)["started"] == 4, "the fan-out, and three"
        assert "lease" not in worker.log(), worker.log()


def test_terminate_stops_the_steps_of_both_routes(routes: Platform) -> None:
    """Three of one queue at the same time: each is a message group of its own."""
    with routes.worker("-n", "d"), routes.worker("-n", "g", "-q", "gpu"):
        run_id = routes.launch("routed_dynamic_steps", seconds=300, count=3)
        other = routes.launch("two_steps", seconds=300)
        routes.wait_started(run_id, 4)
        routes.wait_started(other, 2)
        assert workers_of_steps(routes, run_id) == {"fan_out": "d", "mapped": "g"}
        for one in (run_id, other):
            assert routes.launcher.terminate(one)
            routes.launcher.terminate(one)  # the second click is a message of its own, unless the run has ended already
        for one in (run_id, other):
            assert routes.finished(one) is DagsterRunStatus.CANCELED, routes.story(one)
            routes.assert_nothing_left(one)
        assert routes.mark_counts(run_id)["cleanup-end"] == 3
        has_no_message_left(routes)


def test_a_step_is_tried_again_and_begins_again_within_five_minutes(routes: Platform) -> None:
    routes.jobs = STORM_JOBS
    try:
        with routes.worker("-n", "runs", "--runs-only", *BOTH):
            with routes.worker("-n", "first", "--steps-only", *BOTH) as first:
                run_id = routes.launch("with_policy", tags=GPU, count=3, seconds=6)
                routes.marked(run_id, "part")
                (task_id,) = routes.step_tasks(run_id)
                for pid in find_processes(task_id):
                    routes.kill(pid, signal.SIGKILL)
                wait_until(
                    lambda: any(mark.startswith("began-1-") for mark in routes.marks(run_id)),
                    "it is tried again",
                    within=60,
                    seen=lambda: routes.story(run_id),
                )
                assert first.stop() == 0
            with routes.worker("-n", "second", "--steps-only", *BOTH):
                assert routes.finished(run_id) is DagsterRunStatus.SUCCESS, routes.story(run_id)
                has_no_message_left(routes)
    finally:
        routes.jobs = STEP_JOBS
    attempt = task_id.removesuffix(".1")
    assert routes.step_tasks(run_id) == [f"{attempt}.1", f"{attempt}.2", f"{attempt}.2.1"], routes.story(run_id)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_run_and_its_step_go_on_on_another_worker(routes: Platform, how: signal.Signals) -> None:
    """The run's message is handed back, or becomes visible again; the step's next task is another message."""
    routes.jobs = STORM_JOBS
    try:
        with routes.worker("-n", "first", *BOTH) as first:
            run_id = routes.launch("one", tags=GPU, count=3, seconds=3)
            routes.marked(run_id, "part")
            first.stop(how)
        with routes.worker("-n", "second", *BOTH):
            assert routes.finished(run_id, within=120) is DagsterRunStatus.SUCCESS, routes.story(run_id)
            has_no_message_left(routes)
    finally:
        routes.jobs = STEP_JOBS
    routes.assert_nothing_left(run_id)
    assert routes.mark_counts(run_id)["overlap"] == 0


def test_what_waits_is_ended_and_never_begins(routes: Platform) -> None:
    """A run that no worker has, and a step of one that is at work."""
    waiting = routes.launch("sleepy_steps", tags=GPU, seconds=300)
    with routes.worker("-n", "runs", "-q", "default"):
        run_id = routes.launch("routed_dynamic_steps", seconds=300, count=2)
        wait_until(lambda: routes.waiting("-gpu-steps") == 2, "its steps wait", within=60)
        for one in (waiting, run_id):
            assert routes.launcher.terminate(one)
            assert routes.finished(one) is DagsterRunStatus.CANCELED, routes.story(one)
        with routes.worker("-n", "late", "-q", "gpu"):
            has_no_message_left(routes)
    assert routes.mark_counts(waiting)["started"] == 0
    assert routes.mark_counts(run_id)["started"] == 1, "the fan-out"
