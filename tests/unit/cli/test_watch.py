"""`--watch` on a terminal: what changes is shown in place, an outage is a line, and the terminal is left as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from tests.support.terminal import CLI, ENTER_SCREEN, LEAVE_SCREEN, on_terminal

from dagster_taskiq.cli import main
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LOOKS = """
import json, sys
from pathlib import Path
from dagster_taskiq.cli.watch import show
seen = Path(sys.argv[1])
show(lambda: seen.read_text(), str, lambda text: {"seen": text}, as_json="--json" in sys.argv, every_s=0.1)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    config = {"queue_url": "http://127.0.0.1:1/1/tasks", "region_name": "us-east-1"}
    launcher = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher", "config": config}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"run_launcher": launcher}))
    return tmp_path


def test_what_changes_is_shown_in_place_until_ctrl_c(home: Path) -> None:
    environ = {**os.environ, "DAGSTER_HOME": str(home)}
    command = (*CLI, "worker", "list", "--watch", "--interval", "0.5")
    with DagsterInstance.from_config(str(home)) as instance, on_terminal(command, environ, columns=60) as terminal:
        terminal.shows("every 0.5 s; Ctrl-C ends", "no worker is alive")
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, job_name="loads")
        facts = {"slots": [2, 4], "work": [[run.run_id, None, time.time()]], "queue": "tasks"}
        Heartbeats(instance, 3_000, 10).beat("loader-1", facts)
        terminal.shows("loader-1", "runs 1/2", f"loads {run.run_id[:8]}")
        assert terminal.interrupt() == 0
        before, _, after = terminal.written.partition(LEAVE_SCREEN)
        assert before.count(ENTER_SCREEN) == 1
        assert f"loads {run.run_id[:8]}" in after, "the last picture stays, to copy an id from it"
        assert "Traceback" not in terminal.written


def test_an_outage_is_a_line_and_what_was_seen_stays(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.write_text("the first picture\n" + "\n".join(f"line {number}" for number in range(2, 30)))
    with on_terminal((sys.executable, "-c", LOOKS, str(seen)), os.environ, columns=80, rows=12) as terminal:
        terminal.shows("the first picture", "line 10", "… and 19 more lines")
        seen.unlink()
        terminal.shows("no news. [Errno 2] No such file or directory", "the first picture")
        seen.write_text("good weather")
        terminal.shows("good weather")
        assert "no news" not in terminal.screen
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.ended() == 128 + signal.SIGTERM
        assert terminal.written.index(LEAVE_SCREEN) > terminal.written.index(ENTER_SCREEN)


def test_for_programs_it_is_one_line_for_each_look(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.write_text("one")
    command = (sys.executable, "-c", LOOKS, str(seen), "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline()) == {"seen": "one"}
        seen.unlink()
        assert "No such file" in process.stderr.readline()
        seen.write_text("two")
        for line in process.stdout:
            if json.loads(line) == {"seen": "two"}:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--watch"], "--watch draws on a terminal"), (["--interval", "3"], "--interval goes with --watch")],
)
def test_what_it_does_not_do(home: Path, options: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["worker", "list", *options], env={"DAGSTER_HOME": str(home)})
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_what_is_wrong_from_the_beginning_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOOKS, str(tmp_path / "missing"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "No such file" in ended.stderr
