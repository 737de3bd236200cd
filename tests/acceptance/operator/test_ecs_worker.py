"""`worker_entrypoint.py` as an ECS container starts it, beside an agent that behaves like the documented one."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.ecs_agent import FakeAgent, ecs_agent
from tests.support.freezing import frozen
from tests.support.platform import CLEANUP_JOBS, ENTRYPOINT, Platform, WorkerProcess
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def container(
    platform: Platform, agent: FakeAgent, *prefix: str, **environ: str
) -> AbstractContextManager[WorkerProcess]:
    """One container's main process; its lines are what the log driver gets."""
    program = (*prefix, sys.executable, str(ENTRYPOINT))
    return platform.worker(program=program, env=agent.environment | environ)


def objects(worker: WorkerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in list(worker.lines) if line.startswith("{")]


def log_of(worker: WorkerProcess) -> list[dict[str, Any]]:
    return [line for line in objects(worker) if "_aws" not in line]


def metrics_of(worker: WorkerProcess) -> dict[str, list[dict[str, Any]]]:
    """By name of the metric, the lines in CloudWatch's embedded format."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in objects(worker):
        if "_aws" in line:
            (directive,) = line["_aws"]["CloudWatchMetrics"]
            assert directive["Namespace"] == "dagster-taskiq"
            assert all(name in line for names in directive["Dimensions"] for name in names), line
            for metric in directive["Metrics"]:
                found.setdefault(metric["Name"], []).append(line)
    return found


def test_protection_health_logs_and_metrics_from_start_to_drain_and_a_kill(endpoint: str) -> None:
    # As by default, so that the drain is the entry point's to fit.
    source = {"drain_seconds": 15, "stop_timeout_seconds": 30}
    with open_platform(endpoint, source=source) as platform, ecs_agent() as agent:
        platform.jobs = CLEANUP_JOBS
        with container(platform, agent, DAGSTER_TASKIQ_STOP_TIMEOUT="20") as worker:
            assert any("worker loaders-9c1f27aa-" in line for line in worker.lines), worker.lines
            assert not agent.protected
            run_id = platform.launch("uploads_job")
            platform.marked(run_id, "started")
            wait_until(lambda: agent.protected, "it is protected")
            assert "ecs task 9c1f27aa5a5d4a0f8f3a6a4a5b6c7d8e in cluster data" in "\n".join(platform.story(run_id))
            link = platform.wait_for_stage(run_id, Stage.PICKED_UP)
            assert "us-east-1.console.aws.amazon.com/cloudwatch/home" in link, link
            assert f"$2522{run_id}$2522" in link, link
            answer = platform.command("worker", "health", "--pid", str(worker.pid))
            assert answer.returncode == 0, answer
            assert "loaders-9c1f27aa" in answer.stdout, answer
            assert "is ready: 1 runs, 0 steps" in answer.stdout, answer
            assert platform.launcher.terminate(run_id)
            assert platform.finished(run_id) is DagsterRunStatus.CANCELED
            wait_until(lambda: not agent.protected, "idle, it is not", within=40, seen=lambda: agent.asked)

            # Drain: it is protected for as long as the last run goes on, and not an instant longer than it lives.
            last = platform.launch("uploads_job", seconds=6)
            platform.marked(last, "started")
            wait_until(lambda: agent.protected, "it is protected again")
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(60) == 0
            assert platform.status(last) is DagsterRunStatus.SUCCESS, platform.story(last)
            assert not agent.protected
            assert agent.states()[-1] is False

        # Kill: its processes end by themselves; the protection runs out, and the next worker does the rest.
        with container(platform, agent) as killed:
            lost = platform.launch("uploads_job")
            platform.marked(lost, "started")
            wait_until(lambda: agent.protected, "it is protected")
            os.kill(killed.process.pid, signal.SIGKILL)
            killed.process.wait(10)
            wait_until(lambda: not platform.processes(lost), "its processes are gone", within=60)
            assert platform.launcher.terminate(lost)
        with container(platform, agent):
            assert platform.finished(lost, within=90) is DagsterRunStatus.CANCELED, platform.story(lost)
            assert platform.mark_counts(lost)["undo"] == 1

        metrics = metrics_of(worker)
        (delivered,) = metrics["CancellationsDelivered"]
        assert (delivered["Channel"], delivered["CancellationsDelivered"]) == ("cancel queue", 1)
        assert [line["Outcome"] for line in metrics["CancellationsFinished"]] == ["canceled"]
        assert [line["Outcome"] for line in metrics["Cleanups"]] == ["succeeded"]
        assert [line["Outcome"] for line in metrics["CleanupAttempts"]] == ["succeeded"]
        assert 0 <= metrics["SecondsToStopped"][0]["SecondsToStopped"] < 10
        assert metrics["SecondsToFinal"][0]["SecondsToFinal"] >= metrics["SecondsToStopped"][0]["SecondsToStopped"]
        assert {line["Kind"] for line in metrics["SecondsWaited"]} == {"run"}
        assert "WorkRunning" in metrics
        assert "ForcedKills" not in metrics

        task_id = platform.task_id(run_id)
        about = [line for line in log_of(worker) if task_id in json.dumps(line)]
        assert any(line["message"] == f"Cancelling task {task_id}" for line in about), about
        for line in about:
            assert line.get("task_id") == task_id, line
            assert line.get("run_id") == run_id, line
            assert line["worker"].startswith("loaders-9c1f27aa-"), line
            assert {"time", "level", "logger", "message"} <= line.keys()


OFTEN = f"""
import runpy
from dagster_taskiq.worker import ecs
ecs._LOOK_FOR_DEPLOYMENT_EVERY_S = 1.0
runpy.run_path({str(ENTRYPOINT)!r}, run_name="__main__")
"""
"""The entry point, which looks for deployments every second."""


def test_an_outdated_worker_takes_nothing_new_and_ends_after_its_work(endpoint: str) -> None:
    """Although it is protected all the time: or else no deployment would ever replace a worker under steady load."""
    source = {"drain_seconds": 0}
    with open_platform(endpoint, source=source) as platform, ecs_agent() as agent:
        with platform.worker(program=(sys.executable, "-c", OFTEN), env=agent.environment) as worker:
            first = platform.launch("sleepy_job", seconds=12)
            endless = platform.launch("sleepy_job", seconds=600)
            platform.marked(first, "started")
            platform.marked(endless, "started")
            wait_until(lambda: agent.protected, "it is protected")
            agent.deployed = "loaders:8"
            wait_until(lambda: "outdated: no new work" in worker.log(), "it knows", within=60, seen=worker.log)
            second = platform.launch("quick_job", seconds=0)
            assert platform.launcher.terminate(endless)
            assert worker.process.wait(60) == 0, worker.log()
        assert platform.status(first) is DagsterRunStatus.SUCCESS, platform.story(first)
        assert platform.status(endless) is DagsterRunStatus.CANCELED, platform.story(endless)
        assert platform.status(second) is DagsterRunStatus.STARTING, "for a worker of the new version"
        assert not agent.protected


LOOKS_OFTEN = f"""
import runpy
from dagster_taskiq.worker import ecs
ecs._LOOK_FOR_STOP_EVERY_S = 0.5
runpy.run_path({str(ENTRYPOINT)!r}, run_name="__main__")
"""


def test_a_task_that_ecs_stops_drains_although_no_signal_comes(endpoint: str) -> None:
    """Spot, say, and the container's first process is a shell, which keeps SIGTERM to itself."""
    source = {"drain_seconds": 60, "stop_timeout_seconds": 80}
    with open_platform(endpoint, source=source) as platform, ecs_agent() as agent:
        with platform.worker(program=(sys.executable, "-c", LOOKS_OFTEN), env=agent.environment) as worker:
            run_id = platform.launch("sleepy_job", seconds=4)
            platform.marked(run_id, "started")
            agent.desired = "STOPPED"
            assert worker.process.wait(60) == 0, worker.log()
        assert "stopping: no new work" in worker.log()
        assert platform.status(run_id) is DagsterRunStatus.SUCCESS, "it had time to finish"


def told(worker: WorkerProcess) -> list[dict[str, Any]]:
    return [line for line in log_of(worker) if "not protected from scale-in" in line["message"]]


@pytest.mark.parametrize("refuse", [FakeAgent.throttle, FakeAgent.block, FakeAgent.no_service])
def test_no_run_fails_because_the_agent_refuses(endpoint: str, refuse: Any) -> None:
    with open_platform(endpoint) as platform, ecs_agent() as agent:
        refuse(agent)
        with container(platform, agent) as worker:
            run_id = platform.launch("sleepy_job", seconds=3)
            wait_until(lambda: told(worker), "the worker says that it is not protected", seen=worker.log)
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
            assert len(told(worker)) == 1, worker.log()


def test_as_pid_1_it_passes_signals_on_and_reaps(endpoint: str) -> None:
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("may not make a pid namespace (not root?)")
    with open_platform(endpoint) as platform, ecs_agent() as agent, container(platform, agent, *unshare) as worker:
        (init,) = _children(worker.process.pid)
        assert Path(f"/proc/{init}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1] == "1"
        (main,) = _children(init)
        run_id = platform.launch("leaves_a_daemon_job")
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
        zombies = [pid for pid in _children(init) if _state(pid) == "Z"]
        assert zombies == []
        os.kill(init, signal.SIGTERM)
        wait_until(lambda: worker.process.poll() is not None, "it has drained and ended", within=60)
        assert worker.process.returncode == 0
        assert not Path(f"/proc/{main}").exists()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def test_a_worker_that_hangs_is_not_healthy(endpoint: str) -> None:
    with open_platform(endpoint) as platform, platform.worker("-n", "w") as worker, frozen(worker.pid):
        began = time.monotonic()
        answer = platform.command("worker", "health", "--pid", str(worker.pid))
        assert answer.returncode == 1, answer
        assert f"pid {worker.pid} does not answer; it hangs" in answer.stderr
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("stop_timeout", "expected"), [("120", 85), ("30", 15), ("60", 30)], ids=["fargate", "default", "short"]
)
def test_the_drain_is_fitted_to_the_stop_timeout(
    monkeypatch: pytest.MonkeyPatch, stop_timeout: str, expected: float
) -> None:
    import importlib.util

    from dagster_taskiq import Settings

    spec = importlib.util.spec_from_file_location("entrypoint", ENTRYPOINT)
    assert spec is not None
    assert spec.loader is not None
    entrypoint = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entrypoint)
    monkeypatch.setenv("DAGSTER_TASKIQ_STOP_TIMEOUT", stop_timeout)
    monkeypatch.setenv("DAGSTER_TASKIQ_SERVE", "steps")
    settings = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")
    overrides = entrypoint.from_environment(settings)
    assert overrides == {
        "stop_timeout_seconds": stop_timeout,
        "drain_seconds": expected,
        "max_concurrent_runs": 0,
    }
    assert settings.overridden_by({}, **overrides).drain_seconds == expected
