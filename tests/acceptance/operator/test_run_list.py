"""`run list` and `queue status` of real runs: without a worker, cancelled before they had one, and at work."""

import json
from typing import Any

import pytest
from tests.acceptance.conftest import steps_platform
from tests.support.platform import Platform
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def listed(platform: Platform) -> dict[str, Any]:
    """What `run list` says, by run."""
    return {row["run_id"]: row for row in json.loads(platform.command("run", "list", "--json").stdout)}


def work_queue(platform: Platform) -> dict[str, Any]:
    """What `queue status` says of it."""
    said: dict[str, Any] = json.loads(platform.command("queue", "status", "--json").stdout)[0]
    return said


def test_where_runs_are_and_which_messages_are_of_no_run_any_more(endpoint: str) -> None:
    with steps_platform(endpoint) as platform:
        goes_on, cancelled, cancelled_too = (platform.launch("two_steps") for _ in range(3))
        rows = listed(platform)
        assert {(row["status"], row["waits_for"]) for row in rows.values()} == {("STARTING", "no worker")}
        assert all(row["queue"] for row in rows.values()), "SQS has their messages"
        for run_id in (cancelled, cancelled_too):
            assert platform.launcher.terminate(run_id)
        status = work_queue(platform)
        assert (status["visible"], status["cancelled"]["messages"], status["runs_waiting"]["count"]) == (3, 2, 1)
        with platform.worker("-n", "w"):
            platform.wait_started(goes_on, 2)
            (row,) = listed(platform).values()
            assert (row["run_id"], row["status"], row["waits_for"]) == (goes_on, "STARTED", "")
            assert row["worker"].startswith("w-")
            wait_until(
                lambda: work_queue(platform)["visible"] == 0,
                "the worker deletes them",
                seen=lambda: work_queue(platform),
            )
            assert work_queue(platform)["cancelled"] == {"canceling": 0, "without_worker": 0, "messages": 0}
            assert platform.launcher.terminate(goes_on)
            platform.finished(goes_on)
