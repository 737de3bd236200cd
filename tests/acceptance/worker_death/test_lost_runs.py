"""Runs whose worker was killed and whose messages are gone: another worker finishes them all the same."""

from dataclasses import replace
from typing import Any

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.acceptance.worker_death.test_redelivery import kill
from tests.support.moto import sqs_client
from tests.support.platform import CLEANUP_JOBS, JOBS, STEP_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.leadership import Leadership
from dagster_taskiq.storage.tags import QUEUE_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

WITHIN_S = 150
"""With these settings a death is known after seven seconds, its message is waited for for another eleven, and somebody
looks every 16."""
GOES_ON_WITHIN_S = 260
"""A run that goes on is left to its worker for another eighty seconds: that may only lack the database."""


def purge(platform: Platform) -> None:
    """Nothing is left of the work: neither what waits nor what is in flight."""
    client = sqs_client(platform.endpoint_url)
    client.purge_queue(QueueUrl=platform.queue_url)
    client.close()
    wait_until(lambda: platform.waiting() == 0, "no message is left", seen=platform.waiting)


def lose_the_message(platform: Platform) -> None:
    """The one that waits; a queue can be purged only once a minute."""
    client = sqs_client(platform.endpoint_url)

    def receive() -> Any:
        """The emulator may have given it to the last poll of the worker that was killed."""
        return client.receive_message(QueueUrl=platform.queue_url, WaitTimeSeconds=2).get("Messages")

    (message,) = wait_until(receive, "the message is there")
    client.delete_message(QueueUrl=platform.queue_url, ReceiptHandle=message["ReceiptHandle"])
    client.close()


@pytest.mark.parametrize(
    "led_by_the_dead", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["", "led_by_a_dead_worker"]
)
def test_they_come_to_their_end(endpoint: str, led_by_the_dead: bool) -> None:
    with open_platform(endpoint, source={"visibility_timeout_seconds": 8}) as platform:
        cleans, steps, plain = (replace(platform, jobs=jobs) for jobs in (CLEANUP_JOBS, STEP_JOBS, JOBS))
        if led_by_the_dead:
            task = f"reconcile {queue_name(platform.queue_url)}"
            assert Leadership(platform.instance, task, "dead-1", 60).take()
        with platform.worker("-n", "dies", "--runs-only") as dies, platform.worker("-n", "steps", "--steps-only"):
            stopped = cleans.launch("uploads_job")
            with_steps = steps.launch("sleepy_steps")
            begun = [(cleans, stopped), (steps, with_steps)]
            if led_by_the_dead:
                begun.append((plain, plain.launch("sleepy_job")))
            for one, run_id in begun:
                one.wait_started(run_id, 1)
            kill(dies)
            purge(platform)
            for run_id in (stopped, with_steps):
                assert platform.launcher.terminate(run_id)
            # What Dagster's UI does with a run that is still STARTING: it marks it, and calls nobody.
            marked = plain.launch("quick_job")
            lose_the_message(platform)
            platform.instance.report_run_canceling(platform.run(marked))
            with platform.worker("-n", "heir") as heir:
                expected: dict[str, Any] = {
                    stopped: DagsterRunStatus.CANCELED,
                    with_steps: DagsterRunStatus.CANCELED,
                    marked: DagsterRunStatus.CANCELED,
                }
                expected |= {run_id: DagsterRunStatus.FAILURE for one, run_id in begun if one is plain}
                for run_id, status in expected.items():
                    within_s = WITHIN_S if status is DagsterRunStatus.CANCELED else GOES_ON_WITHIN_S
                    assert platform.finished(run_id, within=within_s) is status, (platform.story(run_id), heir.log())
                    platform.assert_nothing_left(run_id)
        assert cleans.mark_counts(stopped)["undo"] == 1, cleans.marks(stopped)
        claims = Claims(platform.instance, Heartbeats.of_runs(platform.instance, platform.launcher.settings))
        assert claims.unfinished() == ({}, set(), False), "nothing is left of them"
        for one, run_id in begun:
            named = any("worker dies-" in line and "is gone" in line for line in platform.story(run_id))
            assert named or one is not plain, platform.story(run_id)
        assert plain.mark_counts(marked)["started"] == 0


def test_a_worker_of_another_route_ends_what_takes_no_code_and_leaves_the_rest(endpoint: str) -> None:
    with open_platform(endpoint, source={"visibility_timeout_seconds": 8}) as platform:
        cleans, gpu = replace(platform, jobs=CLEANUP_JOBS), {QUEUE_TAG: "gpu"}
        queue_url = platform.create_route("gpu")
        with platform.worker("-n", "dies", "-q", "gpu") as dies, platform.worker("-n", "default") as default:
            plain, cleaned = platform.launch("sleepy_job", tags=gpu), cleans.launch("uploads_job", tags=gpu)
            for one, run_id in ((platform, plain), (cleans, cleaned)):
                one.wait_started(run_id, 1)
            kill(dies)
            purge(replace(platform, queue_url=queue_url))
            for run_id in (plain, cleaned):
                assert platform.launcher.terminate(run_id)
            assert platform.finished(plain, within=WITHIN_S) is DagsterRunStatus.CANCELED, default.log()
            platform.assert_nothing_left(plain)
            why = "no worker that takes runs of route 'gpu' is alive, to run its cleanup handlers"
            wait_until(
                lambda: any(why in line for line in platform.story(cleaned)),
                "it says what it waits for",
                within=WITHIN_S,
                seen=lambda: (platform.story(cleaned), default.log()),
            )
            assert platform.status(cleaned) is DagsterRunStatus.CANCELING
            with platform.worker("-n", "heir", "-q", "gpu") as heir:
                assert platform.finished(cleaned, within=WITHIN_S) is DagsterRunStatus.CANCELED, heir.log()
            platform.assert_nothing_left(cleaned)
        assert cleans.mark_counts(cleaned)["undo"] == 1, cleans.marks(cleaned)
        assert "going on with it here" not in default.log()
        assert sum(why in line for line in platform.story(cleaned)) == 1
