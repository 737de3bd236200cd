"""A worker that hangs (swapping, a debugger, a paused container) and comes to, after others took it for dead."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import SNAPPY, open_platform, steps_platform
from tests.support.freezing import frozen
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

MONITORING: dict[str, Any] = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 1}}


def wait_gone(processes: list[int]) -> None:
    assert processes
    wait_until(
        lambda: not [pid for pid in processes if Path(f"/proc/{pid}").exists()],
        "its children stop without it",
        within=60,
        seen=lambda: processes,
    )


@pytest.mark.parametrize("monitoring", [True, False], ids=["resumed", "failed"])
def test_its_run_stops_before_another_worker_takes_over(endpoint: str, monitoring: bool) -> None:
    extra = MONITORING if monitoring else {}
    with open_platform(endpoint, extra=extra) as platform, platform.worker("-n", "hangs") as hangs:
        run_id = platform.launch("sleepy_job", seconds=6)
        platform.marked(run_id, "started")
        with frozen(hangs.pid):
            wait_gone(platform.processes(run_id))
            assert platform.marks(run_id).count("cleanup-end") == 1
            with platform.worker("-n", "heir"):
                expected = DagsterRunStatus.SUCCESS if monitoring else DagsterRunStatus.FAILURE
                assert platform.finished(run_id, within=90) is expected, platform.story(run_id)
        wait_until(lambda: "this worker hung" in hangs.log(), "it comes to", within=60, seen=hangs.log)
        assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
        assert platform.status(run_id) is expected, platform.story(run_id)
        assert platform.mark_counts(run_id)["slept"] == int(monitoring)
        assert platform.mark_counts(run_id)["started"] == 1 + int(monitoring)
        assert any("it is dead, and heir-" in line for line in platform.story(run_id))
        assert Stage.INTERRUPTING not in platform.stages(run_id)


@pytest.mark.parametrize("monitoring", [True, False], ids=["resumed", "failed"])
def test_nobody_took_over(endpoint: str, monitoring: bool) -> None:
    extra = MONITORING if monitoring else {}
    with open_platform(endpoint, extra=extra) as platform, platform.worker("-n", "hangs") as hangs:
        run_id = platform.launch("sleepy_job", seconds=6)
        platform.marked(run_id, "started")
        with frozen(hangs.pid):
            wait_gone(platform.processes(run_id))
        expected = DagsterRunStatus.SUCCESS if monitoring else DagsterRunStatus.FAILURE
        assert platform.finished(run_id, within=90) is expected, platform.story(run_id)
        assert monitoring or any("hung, and its run was interrupted" in line for line in platform.story(run_id))


def test_it_is_terminated_meanwhile(endpoint: str) -> None:
    with open_platform(endpoint) as platform, platform.worker("-n", "hangs") as hangs:
        run_id = platform.launch("sleepy_job")
        platform.marked(run_id, "started")
        with frozen(hangs.pid):
            assert platform.launcher.terminate(run_id)
            wait_gone(platform.processes(run_id))
            with platform.worker("-n", "heir"):
                assert platform.finished(run_id, within=90) is DagsterRunStatus.CANCELED, platform.story(run_id)
        wait_until(lambda: "this worker hung" in hangs.log(), "it comes to", within=60, seen=hangs.log)
        assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
        assert platform.status(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)


def steps_of(platform: Platform, run_id: str) -> list[int]:
    from dagster_taskiq.process.child_handle import find_processes

    return [pid for task_id in platform.step_tasks(run_id) for pid in find_processes(task_id)]


def test_its_step_stops_before_it_is_tried_again(endpoint: str) -> None:
    with (
        steps_platform(endpoint) as platform,
        platform.worker("-n", "runs", "--runs-only"),
        platform.worker("-n", "hangs", "--steps-only") as hangs,
    ):
        run_id = platform.launch("tried_again_steps")
        platform.wait_started(run_id, 1)
        with frozen(hangs.pid):
            wait_gone(steps_of(platform, run_id))
            with platform.worker("-n", "other", "--steps-only"):
                assert platform.finished(run_id, within=90) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert platform.mark_counts(run_id)["started"] == 2
        assert platform.mark_counts(run_id)["slept"] == 1


def test_a_fork_server_that_hangs_delays_neither_a_cancel_nor_the_end_of_its_worker(platform: Platform) -> None:
    with platform.worker("-n", "w") as worker:
        (server,) = psutil.Process(worker.pid).children()
        server.suspend()
        first, second = platform.launch("sleepy_job", seconds=60), platform.launch("sleepy_job", seconds=60)
        for run_id in (first, second):
            platform.wait_for_stage(run_id, Stage.PICKED_UP)
        platform.launcher.terminate(first)
        assert platform.finished(first, within=10) is DagsterRunStatus.CANCELED
        asked_at = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - asked_at < SNAPPY["drain_seconds"] + 5
        assert not server.is_running()
        assert platform.marks(first) == platform.marks(second) == []
        assert platform.status(second) is DagsterRunStatus.STARTING
    with platform.worker("-n", "heir"):
        platform.marked(second, "started")
        platform.launcher.terminate(second)
        assert platform.finished(second) is DagsterRunStatus.CANCELED
