"""Rows of ours in Dagster's database that are damaged: a worker starts, and runs are launched, end and are stopped."""

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform

from dagster_taskiq.dagster_compat.storage import put_value
from dagster_taskiq.storage.fleet import HOLD_KEY

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

DAMAGED = '{"of": "another version'


def test_a_worker_starts_and_works_among_them(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        for name in ("fences", "heartbeat/other-00000001", "claim/of-a-deleted-run", "stop/other-00000001"):
            put_value(platform.instance, f"dagster-taskiq/{name}", DAMAGED)
        put_value(platform.instance, HOLD_KEY, DAMAGED)
        quick, claimed, sleeps = (platform.launch(job) for job in ("quick_job", "quick_job", "sleepy_job"))
        put_value(platform.instance, f"dagster-taskiq/claim/{claimed}", DAMAGED)
        with platform.worker("-n", "w") as worker:
            assert platform.finished(quick) is DagsterRunStatus.SUCCESS
            assert platform.finished(claimed) is DagsterRunStatus.SUCCESS, "taken over, as from a dead worker"
            platform.marked(sleeps, "started")
            assert platform.launcher.terminate(sleeps)
            assert platform.finished(sleeps) is DagsterRunStatus.CANCELED
            assert worker.log().count("the hold on the fleet cannot be read") == 1
        assert platform.command("worker", "list", "--all").returncode == 1
        assert platform.command("fleet", "release").returncode == 0
