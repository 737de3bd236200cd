"""`dagster-taskiq dev` starts everything, and stops everything on one Ctrl-C or when a part of it dies."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from tests.support.browser import Dagster
from tests.support.environment import clean_environment, processes_of
from tests.support.waiting import wait_until

from dagster_taskiq.local.dev import COMMAND_LINE
from dagster_taskiq.local.process_manager import answers

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(480)]


class Dev:
    """A `dagster-taskiq dev` of the test's own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []

    def say(self) -> str:
        return "\n".join(self.lines[-40:])

    def told(self, pattern: str) -> str:
        """Wait for a line; returns the first group of the pattern."""

        def look() -> str | None:
            found = re.search(pattern, "\n".join(self.lines))
            assert found or self.process.poll() is None, self.say()
            return found[1] if found else None

        return wait_until(look, pattern, within=240, seen=self.say) or ""


@contextmanager
def dev(
    home: Path, *arguments: str, here: Path | None = None, program: Sequence[str] = COMMAND_LINE, **environ: str
) -> Iterator[Dev]:
    """`here`: the current folder."""
    process = subprocess.Popen(
        [*program, "dev", *arguments],
        env=clean_environment(home) | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=here,
    )
    running = Dev(process)
    assert process.stdout is not None
    pump = Thread(target=lambda out: running.lines.extend(map(str.rstrip, out)), args=(process.stdout,), daemon=True)
    pump.start()
    try:
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        pump.join(10)
        process.stdout.close()


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[-1])


@pytest.mark.nightly  # the browser's tests end it like this, too
def test_one_ctrl_c_stops_everything(tmp_path: Path) -> None:
    with dev(tmp_path) as running:
        port = port_of(running.told(r"Dagster's UI: (\S+)"))
        assert answers(port, "/server_info")
        assert any("worker" in line and " ready" in line for line in running.lines), running.say()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(50) == 0, running.say()
        assert not answers(port, "/server_info")
    wait_until(lambda: not processes_of(tmp_path), "everything is gone", seen=lambda: processes_of(tmp_path))
    assert list(tmp_path.glob("dagster-taskiq-*")) == [], "the temporary home stays behind"


MINE = """
import os
import dagster as dg

@dg.op
def tells(context):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "DAGSTER_MINE", "IN_THE_FILE"):
        context.log.info(f"{name} is {os.environ.get(name)}")

@dg.job
def tells_job():
    tells()

defs = dg.Definitions(jobs=[tells_job])
"""

RULE = """
run_launcher:
  module: dagster_taskiq.launcher
  class: TaskiqRunLauncher
  config: {config_source: {wait_time_seconds: 2, routes: [{route: gpu, job: 'tells_*'}]}}
"""


@pytest.mark.long
def test_runs_have_the_users_own_environment_and_storage(tmp_path: Path) -> None:
    here, home = tmp_path / "project", tmp_path / "my-home"
    here.mkdir()
    home.mkdir()
    (here / "mine.py").write_text(MINE)
    (here / ".env").write_text("IN_THE_FILE=yes\nAWS_REGION=eu-north-1\n")
    own = f"storage: {{sqlite: {{base_dir: {tmp_path / 'my-database'}}}}}\nrun_retries: {{enabled: true}}\n" + RULE
    (home / "dagster.yaml").write_text(own)
    environ = {"AWS_ACCESS_KEY_ID": "my-own", "DAGSTER_MINE": "1", "DAGSTER_HOME": str(home), "AWS_REGION": "us-west-2"}
    with dev(tmp_path, "-f", "mine.py", "-q", "large", here=here, **environ) as running:
        queues = running.told(r"is ready: it listens to (.*)")
        assert [name.split()[0] for name in queues.split(", then ")] == [
            "dagster-tasks",
            "dagster-tasks-gpu",
            "dagster-tasks-large",
        ]
        dagster = Dagster(running.told(r"Dagster's UI: (\S+)"))
        run_id = dagster.launch("mine.py", "tells_job")
        dagster.wait_for_status(run_id, "SUCCESS")
        told = [event.message for event in dagster.events(run_id) if " is " in event.message and event.kind == "LOG"]
        assert told == [
            "AWS_ACCESS_KEY_ID is my-own",
            "AWS_PROFILE is None",
            "AWS_REGION is eu-north-1",
            "DAGSTER_MINE is 1",
            "IN_THE_FILE is yes",
        ]
        assert any("Submitted to queue dagster-tasks-gpu " in event.message for event in dagster.events(run_id))
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(50) == 0, running.say()
    assert (home / "dagster.yaml").read_text() == own
    assert list((tmp_path / "my-database").rglob(f"{run_id}.db")), "the run is in the user's own storage"
    assert list((home / "storage").rglob("*tells*")), "and so is what it wrote to stdout"


def test_when_one_part_dies_it_says_which_and_stops_the_rest(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with dev(tmp_path, "--dagster-home", str(home)) as running:
        running.told(r"(Dagster's UI)")
        assert not [line for line in running.lines if "Warning: " in line], "all is as it should be"
        (worker,) = [pid for pid, command in processes_of(tmp_path).items() if "worker start" in command]
        os.kill(worker, signal.SIGKILL)
        assert running.process.wait(60) == 1, running.say()
    assert "Error: the worker process ended (killed by SIGKILL)" in running.say()
    assert (home / "dagster.yaml").exists(), "a folder that was asked for is kept"
    wait_until(lambda: not processes_of(tmp_path), "everything is gone", seen=lambda: processes_of(tmp_path))


@pytest.mark.nightly  # the browser's tests start it without a worker, too
def test_ones_own_definitions_without_a_worker(tmp_path: Path) -> None:
    definitions = tmp_path / "mine.py"
    definitions.write_text("import dagster as dg\n@dg.asset\ndef mine(): ...\n")
    with dev(tmp_path, "-f", str(definitions), "--no-worker") as running:
        running.told(r"(another worker: DAGSTER_HOME=\S+ dagster-taskiq worker start)")
        running.told(r"(Dagster's UI)")
        assert not [command for command in processes_of(tmp_path).values() if "worker start" in command]
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(50) == 0, running.say()
