"""One run, one child: a run is taken from a worker that lives, because another one, or monitoring, took it for dead."""

from pathlib import Path

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.dagster_compat.api import ResumeRunContext, WorkerStatus
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def children_of(platform: Platform, run_id: str) -> list[int]:
    processes = platform.processes(run_id)
    assert processes
    return processes


def wait_gone(platform: Platform, processes: list[int]) -> None:
    wait_until(lambda: not [pid for pid in processes if Path(f"/proc/{pid}").exists()], "the child is gone", within=30)


def test_a_worker_whose_run_was_taken_over_stops_its_child_and_writes_nothing(endpoint: str) -> None:
    with open_platform(endpoint) as platform, platform.worker("-n", "first") as first:
        run_id = platform.launch("sleepy_job")
        platform.marked(run_id, "started")
        processes, before = children_of(platform, run_id), platform.story(run_id)
        other = Claims(platform.instance, Heartbeats(platform.instance, 60, 5))
        other.heartbeats.beat("other")
        seen = other.read([run_id])[run_id]
        assert other.take(platform.run(run_id), "other", platform.task_id(run_id), "elsewhere", seen)
        after = platform.story(run_id)
        assert len(after) == len(before) + 2, "released in its name, picked up"
        wait_gone(platform, processes)
        wait_until(lambda: not first_is_busy(platform), "the worker is done with it", within=30, seen=first.log)
        assert platform.story(run_id) == after
        assert platform.status(run_id) is DagsterRunStatus.STARTED
        assert other.holds(run_id)
        assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
        platform.instance.report_run_canceled(platform.run(run_id))


def first_is_busy(platform: Platform) -> bool:
    beats = Heartbeats(platform.instance, 60, 5).last()
    return any(beat.facts.get("work") for beat in beats if beat.worker_id.startswith("first"))


def test_a_run_that_is_resumed_on_the_worker_that_still_has_it_has_one_child_at_a_time(endpoint: str) -> None:
    """Monitoring took the worker for dead, gave it up, and resumed the run: the same worker gets the message."""
    with open_platform(endpoint) as platform, platform.worker("-n", "only") as only:
        run_id = platform.launch("sleepy_job", seconds=6)
        platform.marked(run_id, "started")
        old = children_of(platform, run_id)
        run = platform.run(run_id)
        platform.launcher.resume_run(ResumeRunContext(run, workspace=None, resume_attempt_number=1))
        wait_until(lambda: platform.mark_counts(run_id)["started"] == 2, "it begins anew", within=60, seen=only.log)
        assert not [pid for pid in old if Path(f"/proc/{pid}").exists()]
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, "\n".join(platform.story(run_id))
        assert platform.mark_counts(run_id)["slept"] == 1
        marks = [mark.split()[0] for mark in platform.marks(run_id)]
        assert marks.index("cleanup-end") < marks.index("started", 1), "the old one had time to clean up"
        claims = Claims(platform.instance, Heartbeats(platform.instance, 60, 5))
        wait_until(lambda: not claims.read([run_id]), "its claim is deleted", within=20, seen=only.log)


def test_a_healthy_worker_is_not_given_up_because_of_an_old_heartbeat_alone(endpoint: str) -> None:
    """It may lack nothing but the database: it still renews the lease of its message."""
    with open_platform(endpoint) as platform:
        run_id = platform.launch("quick_job", seconds=0)
        claims = Claims.of(platform.instance, platform.launcher.settings)
        long_ago = Heartbeats(platform.instance, 60, 5, clock=lambda: 0.0)
        long_ago.beat("silent")
        assert claims.take(platform.run(run_id), "silent", platform.task_id(run_id), "elsewhere", None)
        health = platform.launcher.check_run_worker_health(platform.run(run_id))
        assert health.status is WorkerStatus.RUNNING
        assert "cannot tell yet" in str(health.msg)
