"""The fork server is a fork of its worker, and nothing of the worker's is in it but what it has imported."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.platform import Platform, write_home
from tests.support.waiting import wait_until
from tests.support.warm import CLI

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

TITLE = "dagster-taskiq fork server"


def program(case: str) -> tuple[dict[str, Any], str]:
    """What `tests.support.early` says in such a case; and its stderr."""
    command = [sys.executable, "-m", "tests.support.early", case]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    before, brace, said = ended.stdout.partition("{")
    assert before == "not flushed ", "written once, by the program"
    return json.loads(brace + said), ended.stderr


def test_a_child_of_an_early_fork_finds_what_it_finds_below_a_fresh_interpreter() -> None:
    said, errors = program("killed")
    first, second = said["first"], said["second"]
    assert first["command"].rstrip("\0") == TITLE
    assert first["server"] == said["program"]["early"] != second["server"]
    assert "serve_from_argv" in second["command"], "a fork server that was killed is executed anew"
    assert errors.count("the fork server is gone; starting another") == 1
    for child in (first, second):
        assert child.pop("session") == child.pop("server")  # Ctrl-C does not reach it
        assert child.pop("arguments")[0] == "-c"
        assert {name.partition(":")[0] for name in child.pop("own_files")} == {"anon_inode", "socket"}
        del child["command"]
    assert first == second
    assert first == {
        "code": 0,
        "stdin": "/dev/null",
        "main": None,
        "path": "",
        "handlers": 0,
        "levels": [30, 0],
        "sigterm": True,
        "collects": True,
        "threads": 1,
    }


def test_what_the_program_does_at_its_exit_is_done_once_and_by_the_program() -> None:
    said, errors = program("plain")
    assert said["program"]["folder_exists"], "a child has removed the program's temporary folder"
    assert errors.count("the program ends") == 1
    assert not Path(said["program"]["folder"]).exists()


@pytest.mark.parametrize(("case", "reason"), [("thread", "has 2 threads"), ("socket", "has 2 open sockets")])
def test_a_program_with_threads_or_connections_is_not_forked(case: str, reason: str) -> None:
    said, errors = program(case)
    assert said["program"]["early"] is None
    assert said["code"] == 0
    assert "serve_from_argv" in said["command"]
    assert f"the fork server is executed, which takes longer than a fork: this process {reason}" in errors


def test_a_module_that_starts_a_thread_is_refused_as_ever() -> None:
    said, _ = program("thread in warm-up")
    assert said["program"]["early"] is not None
    assert said["error"].startswith("importing preload_modules started 1 threads, which do not survive a fork")


def fork_server_of(worker: int) -> psutil.Process:
    children = psutil.Process(worker).children()
    assert len(children) == 1, children
    return children[0]


def test_the_fork_server_of_a_worker_has_one_thread_and_one_socket(platform: Platform) -> None:
    with platform.worker("-n", "w") as worker:
        server = fork_server_of(worker.pid)
        assert "".join(server.cmdline()) == TITLE
        assert server.num_threads() == 1
        files = {int(fd.name): str(fd.readlink()) for fd in Path(f"/proc/{server.pid}/fd").iterdir()}
        assert files[0] == os.devnull
        assert sum(name.startswith("socket:") for name in files.values()) == 1, files
        assert {name for fd, name in files.items() if fd > 2 and not name.startswith("socket:")} <= {os.devnull}, files
        assert os.getsid(server.pid) == server.pid != os.getsid(worker.pid)
        run_id = platform.launch("quick_job")
        assert platform.finished(run_id).value == "SUCCESS"


def test_a_worker_whose_fork_server_is_killed_has_another_one(platform: Platform) -> None:
    with platform.worker("-n", "w") as worker:
        first = fork_server_of(worker.pid)
        first.send_signal(signal.SIGKILL)
        wait_until(lambda: first.status() == psutil.STATUS_ZOMBIE, "it is dead")
        run_id = platform.launch("quick_job")
        assert platform.finished(run_id).value == "SUCCESS"
        second = fork_server_of(worker.pid)
        assert second.pid != first.pid
        assert "serve_from_argv" in " ".join(second.cmdline())
    wait_until(lambda: not second.is_running(), "it ends with its worker")


def test_a_worker_that_cannot_start_leaves_no_fork_server(platform: Platform, tmp_path: Path) -> None:
    write_home(tmp_path, f"{platform.queue_url}-missing", platform.endpoint_url, source={}, extra={})
    environ = {**platform.environ(), "DAGSTER_HOME": str(tmp_path)}
    command = [*CLI, "worker", "start"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, "no such queue" in ended.stderr) == (1, True), ended.stderr
    assert [one for one in psutil.process_iter() if home_of(one) == str(tmp_path)] == []


def home_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("DAGSTER_HOME")
    except psutil.Error:
        return None
