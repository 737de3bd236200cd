"""`dagster-taskiq worker list`: who is alive, what each is at, and what becomes of that when one dies."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import steps_platform
from tests.support.freezing import frozen
from tests.support.platform import Platform
from tests.support.terminal import CLI, on_terminal
from tests.support.waiting import wait_until

from dagster_taskiq.storage.workers import list_workers

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def ask(platform: Platform, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dagster_taskiq.cli", "worker", "list", *arguments],
        env=os.environ | {"DAGSTER_HOME": str(platform.home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def on_a_terminal(platform: Platform, columns: int) -> list[str]:
    """The lines that a person sees on a terminal of that width."""
    environ = os.environ | {"DAGSTER_HOME": str(platform.home), "NO_COLOR": "1"}
    with on_terminal((*CLI, "worker", "list"), environ, columns=columns) as terminal:
        assert terminal.ended() == 0
        return terminal.lines


def states(platform: Platform, *arguments: str) -> dict[str, Any]:
    """What it says, by the name of the worker."""
    return {
        entry["worker_id"].rpartition("-")[0]: entry for entry in json.loads(ask(platform, "--json", *arguments).stdout)
    }


def test_no_worker(endpoint: str) -> None:
    with steps_platform(endpoint) as platform:
        said = ask(platform)
        assert (said.returncode, said.stdout) == (1, "")
        assert said.stderr == "no worker is alive; start one with `dagster-taskiq worker start`\n"


def test_who_is_alive_and_what_each_is_at(endpoint: str) -> None:
    with (
        steps_platform(endpoint) as platform,
        platform.worker("-n", "runs", "--runs-only") as runs_worker,
        platform.worker("-n", "steps", "--steps-only", "--max-steps", "3") as steps_worker,
    ):
        run_id = platform.launch("two_steps")
        platform.wait_started(run_id, 2)
        wait_until(
            lambda: len(states(platform)["steps"]["work"]) == 2, "both steps are listed", seen=lambda: ask(platform)
        )
        found = states(platform)
        assert {entry["state"] for entry in found.values()} == {"alive"}
        (run,) = found["runs"]["work"]
        assert (run["run_id"], run["job"], run["status"], run["step_key"]) == (run_id, "two_steps", "STARTED", None)
        assert {work["step_key"] for work in found["steps"]["work"]} == {"step_0", "step_1"}
        assert (found["runs"]["runs"], found["runs"]["steps"]) == (4 * 2, 0)
        assert (found["steps"]["runs"], found["steps"]["steps"]) == (0, 3)
        assert found["steps"]["where"].startswith(f"pid {steps_worker.pid} on ")
        table = ask(platform).stdout
        assert f"two_steps {run_id[:8]} step step_0" in table
        assert "2/3" in table
        narrow = on_a_terminal(platform, columns=60)
        assert max(map(len, narrow)) <= 60, narrow
        assert f"  two_steps {run_id[:8]} step step_0" in narrow
        assert platform.launcher.terminate(run_id)
        assert platform.finished(run_id) is DagsterRunStatus.CANCELED
        runs_worker.process.kill()
        assert steps_worker.stop() == 0
        wait_until(lambda: states(platform) == {}, "the killed one is dead", within=60, seen=lambda: ask(platform))
        said = ask(platform, "--all")
        assert said.returncode == 1
        assert {name: entry["state"] for name, entry in states(platform, "--all").items()} == {
            "runs": "dead",
            "steps": "gone",
        }


def wait_for_state(platform: Platform, state: str) -> None:
    """Without a process for each look: the state may last a few seconds only."""

    def look() -> list[str]:
        return [
            presence.state for presence in list_workers(platform.instance, platform.launcher.settings, everybody=True)
        ]

    wait_until(lambda: look() == [state], f"it is {state}", within=60, seen=look)


def test_a_worker_that_hangs_is_silent_then_dead_then_alive_again(endpoint: str) -> None:
    with steps_platform(endpoint) as platform, platform.worker("-n", "w") as worker:
        with frozen(worker.pid):
            for state in ("silent", "dead"):
                wait_for_state(platform, state)
        wait_for_state(platform, "alive")
