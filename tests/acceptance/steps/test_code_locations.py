"""A worker knows which code it has: what it cannot load goes to one that can, and waits a minute when there is none."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRun, DagsterRunStatus, in_process_executor, job, op
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from tests.acceptance.conftest import steps_platform
from tests.support.platform import REAL_WORKER, Platform, WorkerProcess
from tests.support.waiting import wait_until

from dagster_taskiq.executor import taskiq_executor
from dagster_taskiq.storage.engine_events import UNTIL_KEY, WORKER_KEY, Stage
from dagster_taskiq.storage.event_log import read_engine_events
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

MODULE = "far_away_code"
SOURCE = """
import os
from pathlib import Path
from typing import Any
from dagster import in_process_executor, job, op
from dagster_taskiq import taskiq_executor
with (Path(__file__).parent / "imported").open("a") as file:
    print(os.getpid(), file=file)
@op
def work(): ...
@job(executor_def=in_process_executor)
def whole(): work()
@job(executor_def=taskiq_executor)
def in_steps(): work()
"""


@op
def work() -> None: ...


@job(executor_def=in_process_executor)
def whole() -> None:
    work()


@job(executor_def=taskiq_executor)
def in_steps() -> None:
    work()


def plain(text: str) -> str:
    """Without the breaks and the colours of a terminal."""
    return " ".join(text.split())


class Code:
    """A folder with the module of a code location, which notes who imports it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / f"{MODULE}.py").write_text(SOURCE)

    @property
    def importers(self) -> int:
        """How many processes have imported it."""
        note = self.folder / "imported"
        return len(set(note.read_text().splitlines())) if note.exists() else 0


@pytest.fixture
def code(tmp_path: Path) -> Code:
    return Code(tmp_path / "code")


@contextmanager
def worker(platform: Platform, name: str, *arguments: str, path: Path | None = None) -> Iterator[WorkerProcess]:
    """A worker with an interpreter of its own, which reads PYTHONPATH."""
    env = {"PYTHONPATH": str(path)} if path is not None else {}
    with platform.worker("-n", name, *arguments, env=env, program=REAL_WORKER) as one:
        yield one


def launch(platform: Platform, job_name: str = "whole", module: str = MODULE) -> str:
    definition = {"whole": whole, "in_steps": in_steps}[job_name]
    pointer = ModuleCodePointer(module, job_name)
    origin = JobPythonOrigin(job_name, RepositoryPythonOrigin("python", pointer))
    tags = {"marks": str(platform.home / "none")}
    run: DagsterRun = platform.instance.create_run_for_job(definition, job_code_origin=origin, tags=tags)
    platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    return run.run_id


def failure(platform: Platform, run_id: str) -> str:
    """The last line of a run's log, as people read it."""
    (entry,) = platform.instance.all_logs(run_id, of_type=DagsterEventType.RUN_FAILURE)
    return entry.dagster_event.message or "" if entry.dagster_event else ""


def test_a_run_goes_to_the_worker_that_has_its_code(endpoint: str, code: Code) -> None:
    """The other one has received it first; then it ends, because which of two receives a message is chance."""
    with steps_platform(endpoint) as platform:
        with worker(platform, "without") as without:
            run_id = handed_on(platform, without, "whole")
        with worker(platform, "with", path=code.folder):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        # The one without it leaves no trace in the log of the run.
        (picked_up,) = [line for line in platform.story(run_id) if "picked up by" in line]
        assert "by worker with-" in picked_up
        assert code.importers == 1, "the process of the run"


@contextmanager
def another_one_begins(platform: Platform) -> Iterator[None]:
    """The heartbeat of a worker that has only just begun, and has said nothing yet of the code that it has."""
    heartbeats, over = Heartbeats.of_runs(platform.instance, platform.launcher.settings), threading.Event()

    def beat() -> None:
        while not over.wait(0.5):
            heartbeats.beat("new-1")

    heartbeats.beat("new-1")
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        heartbeats.gone("new-1")


def handed_on(platform: Platform, without: WorkerProcess, job_name: str) -> str:
    """The id of a run that this worker has handed on."""
    with another_one_begins(platform):
        run_id = launch(platform, job_name)
        wait_until(
            lambda: "worker new-1 may have the code" in without.log(),
            "the worker without the code hands it on",
            seen=lambda: (without.log(), platform.story(run_id)),
        )
        without.stop()
    return run_id


def waits_for_it(platform: Platform, run_id: str) -> float:
    """Until when, by the only note of it in the run's log."""
    platform.wait_for_stage(run_id, Stage.WAITING_FOR_CODE)
    (until,) = [facts[UNTIL_KEY] for facts in notes_of_waiting(platform, run_id)]
    return float(until)


def notes_of_waiting(platform: Platform, run_id: str) -> list[dict[str, Any]]:
    notes = read_engine_events(platform.instance, run_id)
    return [facts for stage, facts in notes if stage is Stage.WAITING_FOR_CODE]


def ended_at(platform: Platform, run_id: str) -> float:
    record = platform.instance.get_run_record_by_id(run_id)
    assert record is not None
    assert record.end_time is not None
    return record.end_time


def test_nobody_has_the_code(endpoint: str, code: Code) -> None:
    """A run waits a minute for a worker that has it, whichever worker looks, and can be cancelled meanwhile."""
    with steps_platform(endpoint) as platform, worker(platform, "two"):
        why = rf"no module named '{MODULE}'"
        with worker(platform, "first"):
            runs = {run_id: waits_for_it(platform, run_id) for run_id in (launch(platform), launch(platform))}
        cancelled = launch(platform)
        waits_for_it(platform, cancelled)
        explained = plain(platform.command("run", "explain", cancelled).stdout)
        assert re.search(rf"a worker that has the code of {MODULE}; .* until \d\d:\d\d:\d\d UTC", explained), explained
        assert platform.launcher.terminate(cancelled)
        assert platform.finished(cancelled, within=20) is DagsterRunStatus.CANCELED
        with worker(platform, "one"):
            for run_id, until in runs.items():
                assert platform.finished(run_id, within=90) is DagsterRunStatus.FAILURE
                assert until <= ended_at(platform, run_id)
                assert len(notes_of_waiting(platform, run_id)) == 1, platform.story(run_id)
                assert re.fullmatch(
                    rf".*no living worker can load code location '{MODULE}': (one|two)-\w+: {why}; "
                    rf"(one|two)-\w+: {why}; a worker must have the code of what it serves: .*",
                    failure(platform, run_id),
                ), failure(platform, run_id)
            wait_until(lambda: platform.waiting() == 0, "its message is gone", seen=platform.waiting)
            listed = platform.command("worker", "list")
            assert re.search(rf"code location {MODULE}: on no worker: \w+-\w+ \({why}\)", plain(listed.stdout)), listed
            workers = json.loads(platform.command("worker", "list", "--json").stdout)
            alive = [one["code"] for one in workers if one["state"] == "alive"]
            assert alive == [{MODULE: f"no module named '{MODULE}'"}] * 2
            examined = plain(platform.command("doctor").stdout)
        assert f"no living worker can load code location '{MODULE}': " in examined
        assert f"no living worker can load code location '{MODULE}': " in plain(
            platform.command("run", "explain", run_id).stdout
        )


@pytest.mark.parametrize("job_name", ["whole", "in_steps"])
def test_a_deployment_whose_workers_come_last(endpoint: str, code: Code, job_name: str) -> None:
    """The run waits, and begins soon after a worker has come that has the code; so does a step."""
    with steps_platform(endpoint) as platform, worker(platform, "old", *(["--steps-only"] * (job_name == "in_steps"))):
        with worker(platform, "runs", "--runs-only", path=code.folder if job_name == "in_steps" else None):
            run_id = launch(platform, job_name)
            if job_name == "in_steps":
                notes = wait_until(
                    lambda: platform.step_notes(run_id, Stage.WAITING_FOR_CODE),
                    "the step waits",
                    seen=lambda: platform.story(run_id),
                )
                (until,) = [float(note[UNTIL_KEY]) for note in notes]
            else:
                until = waits_for_it(platform, run_id)
            with worker(platform, "new", path=code.folder):
                assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert ended_at(platform, run_id) < until, platform.story(run_id)
        assert sum("waiting until" in line for line in platform.story(run_id)) == 1, platform.story(run_id)


def test_a_step_goes_to_the_worker_that_has_its_code_or_fails(endpoint: str, code: Code) -> None:
    with steps_platform(endpoint) as platform, worker(platform, "runs", "--runs-only", path=code.folder):
        with worker(platform, "without", "--steps-only") as without:
            failed = launch(platform, "in_steps")
            assert platform.finished(failed, within=120) is DagsterRunStatus.FAILURE
            error = platform.failure(failed, "work")
            assert f"no living worker can load code location '{MODULE}': without-" in error
            assert "runs-" not in error, "it takes no steps"
            assert DagsterEventType.STEP_UP_FOR_RETRY not in platform.events(failed)
            run_id = handed_on(platform, without, "in_steps")
        with worker(platform, "with", "--steps-only", path=code.folder) as has_it:
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, (platform.story(run_id), has_it.log())
        (note,) = platform.step_notes(run_id, Stage.PICKED_UP)
        assert note[WORKER_KEY].startswith("with-")


def test_code_that_comes_later_counts(endpoint: str, code: Code) -> None:
    """A volume that was not mounted when the worker began."""
    late = code.folder.parent / "late"
    with steps_platform(endpoint) as platform, worker(platform, "one", path=late):
        run_id = launch(platform)
        until = waits_for_it(platform, run_id)
        late.symlink_to(code.folder)
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS
        assert ended_at(platform, run_id) < until
