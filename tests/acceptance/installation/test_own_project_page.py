"""`docs/own-project.md`, block by block, in an empty folder: files are written, commands are given, servers go on."""

import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from tests.support.environment import clean_environment, processes_of
from tests.support.moto import free_port
from tests.support.pages import Block, blocks
from tests.support.shell import Shell
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.timeout(900),
]

PAGE = "docs/own-project.md"
PORTS = ("5566", "3333")
READY = {"moto_server": "Running on", "dagster-taskiq worker start": " is ready", "dagster dev": "Serving"}
PROGRAMS = {"dagster": "dagster", "dagster-taskiq": "dagster_taskiq.cli", "moto_server": "moto.server"}


def lend_libraries(environment: Path) -> None:
    """Let the new environment use what is installed here, so that pip has nothing to fetch but the build system."""
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{Path(__file__).parents[3] / 'src'}\n")
    for name, module in PROGRAMS.items():
        script = environment / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {environment}/bin/python -m {module} "$@"\n')
        script.chmod(0o755)


class Terminals:
    """The first terminal of the page, and those in which something goes on."""

    def __init__(self, shell: Shell, folder: Path) -> None:
        self.shell = shell
        self._folder = folder
        self._going_on: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, command: str) -> None:
        log = self._folder / f"{len(list(self._folder.glob('*.log')))}.log"
        process = self.shell.start(command, log)
        self._going_on.append((command, process))
        (ready,) = [text for program, text in READY.items() if command.startswith(program)]
        wait_until(
            lambda: ready in log.read_text() or process.poll() is not None, command, within=240, seen=log.read_text
        )
        assert process.poll() is None, log.read_text()

    def end(self) -> None:
        for command, process in self._going_on:
            process.send_signal(signal.SIGINT if "dev" in command else signal.SIGTERM)
        for _, process in self._going_on:
            process.wait(60)


@contextmanager
def terminals(folder: Path, postgres: str) -> Iterator[Terminals]:
    environ = clean_environment(folder) | {
        "PATH": f"/usr/local/bin:/usr/bin:/bin:{Path(sys.executable).resolve().parent}",
        "DAGSTER_POSTGRES_URL": postgres,
        "COLUMNS": "200",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    it = Terminals(Shell(folder, folder, environ, patience_s=150), folder)
    try:
        yield it
    finally:
        it.end()
        wait_until(lambda: not processes_of(folder), "everything is gone", seen=lambda: processes_of(folder))


def with_free_ports(page: list[Block]) -> list[Block]:
    free = {port: str(free_port()) for port in PORTS}

    def moved(text: str) -> str:
        for port, other in free.items():
            text = text.replace(port, other)
        return text

    return [replace(one, text=moved(one.text)) for one in page]


def do(block: Block, it: Terminals, project: Path) -> str:
    """What the reader does with a block. Returns what was printed."""
    if block.title.startswith("terminal"):
        it.start(block.text.strip())
    elif block.title:
        file = project / block.title
        file.write_text((file.read_text() if file.exists() else "") + block.text)
    else:
        return it.shell.run(block.text)
    return ""


def test_who_follows_the_page_cancels_a_run_of_his_own(
    index: None, tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", postgres)
    project = tmp_path / "orders"
    printed = ""
    with terminals(tmp_path, postgres) as it:
        for block in with_free_ports(blocks(PAGE)):
            if "python3 -m venv" in block.text:
                before, after = block.text.split("pip install", 1)
                it.shell.run(before)
                lend_libraries(project / ".venv")
                it.shell.run(f"pip install {after}")
            else:
                printed += do(block, it, project)
        for name in ("DAGSTER_TASKIQ_SQS_QUEUE_URL", "DAGSTER_TASKIQ_SQS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID"):
            monkeypatch.setenv(name, it.shell.variable(name))
        assert_each_ended_as_the_page_says(project / "home")
    assert "wrong input file" in printed


def assert_each_ended_as_the_page_says(home: Path) -> None:
    with DagsterInstance.from_config(str(home)) as instance:

        def statuses() -> dict[str, DagsterRunStatus]:
            return {run.job_name: run.status for run in instance.get_runs()}

        wanted = {
            "count_stock": DagsterRunStatus.SUCCESS,
            "daily_report": DagsterRunStatus.CANCELED,
            "in_steps": DagsterRunStatus.CANCELED,
        }
        wait_until(lambda: statuses() == wanted, "all runs have ended", within=60, seen=statuses)
        (run,) = [run for run in instance.get_runs() if run.job_name == "daily_report"]
        told = [entry.message for entry in instance.all_logs(run.run_id)]
        assert any("is dropped, because: wrong input file" in message for message in told), told
