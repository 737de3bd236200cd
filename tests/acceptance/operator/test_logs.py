"""What a worker and the processes of its runs write to stdout and stderr."""

import json
import re
import signal
from typing import Any

import psutil
import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform, steps_platform
from tests.support.platform import WorkerProcess
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def ended(worker: WorkerProcess, run_id: str) -> str:
    """The line about the end of that run, without its time."""

    def lines() -> list[str]:
        return [line for line in list(worker.lines) if f"run={run_id[:8]}" in line and " ended " in line]

    wait_until(lines, f"the worker says how {run_id} ended", seen=worker.log)
    (line,) = lines()
    return line.partition(" run ended ")[2].strip()


def test_one_line_when_a_run_begins_and_one_when_it_ends(endpoint: str) -> None:
    with open_platform(endpoint) as platform, platform.worker("-n", "w") as worker:
        expected = {
            "quick_job": r"outcome=SUCCESS seconds=[\d.]+",
            "fails_job": r"outcome=FAILURE seconds=[\d.]+ reason=\"Steps failed: \['fails'\]\.\"",
            "dies_job": r"outcome=FAILURE seconds=[\d.]+ reason=\"the run's process \d+ ended with exit code 17.*\"",
            "multiprocess_job": r"outcome=SUCCESS seconds=[\d.]+",
            "sleepy_job": r"outcome=CANCELED seconds=[\d.]+ reason=\"by ada: wrong file\"",
        }
        runs = {job: platform.launch(job, seconds=300 if job == "sleepy_job" else 0.1) for job in expected}
        platform.marked(runs["sleepy_job"], "started")
        assert platform.launcher.cancel(runs["sleepy_job"], reason="wrong file", requested_by="ada")
        for job, pattern in expected.items():
            about = rf"job={job} run={runs[job][:8]} worker=w-\w+ "
            assert re.fullmatch(about + pattern, ended(worker, runs[job])), ended(worker, runs[job])
        assert worker.stop() == 0
        for job, run_id in runs.items():
            begins = [line for line in worker.lines if run_id[:8] in line and " started " in line]
            assert [line.split(" INFO    ")[1].split(" worker=")[0] for line in begins] == [
                f"run started job={job} run={run_id[:8]}"
            ]
        log = worker.log()
        assert log.count(f"Cancelling task {platform.task_id(runs['sleepy_job'])} run={runs['sleepy_job'][:8]}\n") == 1
        # An error of an op is there once (or not at all: Dagster's `tail`, which brings it here, may be too late for
        # its last lines), and nothing of what is logged as DEBUG.
        assert log.count('raise RuntimeError("as it should")') <= 1, log
        assert "DEBUG" not in log
        assert "Executing task" not in log


def test_a_run_that_is_interrupted_by_its_workers_end_is_handed_back(endpoint: str) -> None:
    extra = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 3, "cancel_timeout_seconds": 600}}
    with open_platform(endpoint, extra=extra) as platform:
        with platform.worker("-n", "first") as worker:
            run_id = platform.launch("sleepy_job")
            platform.marked(run_id, "started")
            worker.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in worker.log(), "it drains", seen=worker.log)
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(30) == 0
            assert 'outcome="handed back"' in ended(worker, run_id)
        with platform.worker("-n", "second") as heir:
            said = f"run resumed job=sleepy_job run={run_id[:8]}"
            wait_until(lambda: said in heir.log(), "it goes on with it", seen=heir.log)
            assert platform.launcher.terminate(run_id)
            assert "outcome=CANCELED" in ended(heir, run_id)


def test_steps_are_a_line_each(endpoint: str) -> None:
    with steps_platform(endpoint) as platform, platform.worker("-n", "w", "--log-level", "DEBUG") as worker:
        run_id = platform.launch("two_steps", seconds=0.1)
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS
        assert worker.stop() == 0
        for name in ("step_0", "step_1", "afterwards"):
            lines = [line for line in worker.lines if f"step={name}" in line and " - dagster - " not in line]
            assert [line.split()[2:5] for line in lines] == [["DEBUG", "step", "started"], ["INFO", "step", "ended"]]
            assert "outcome=SUCCESS" in lines[-1]
        assert "dagster - DEBUG" in worker.log()


NOT_CAPTURED = {
    "compute_logs": {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
}
"""What ops write goes where their process writes to, at once, and not by way of a file."""


def objects(worker: WorkerProcess) -> list[dict[str, Any]]:
    """All that the worker and the processes of its runs have written."""
    found = [json.loads(line) for line in list(worker.lines)]
    assert all(isinstance(one, dict) for one in found), found
    return found


def messages(worker: WorkerProcess, logger: str) -> list[str]:
    return [one["message"] for one in objects(worker) if one.get("logger") == logger]


def test_every_line_is_a_json_object_whoever_has_written_it(endpoint: str) -> None:
    with (
        open_platform(endpoint, extra=NOT_CAPTURED) as platform,
        platform.worker("-n", "w", "--log-format", "json") as worker,
    ):
        runs = {"fails_job": platform.launch("fails_job", seconds=0.1)}
        platform.finished(runs["fails_job"])  # alone: one of the others leaves a line without an end
        runs |= {
            job: platform.launch(job, seconds=0.1) for job in ("talkative_job", "crashes_job", "leaves_a_daemon_job")
        }
        for run_id in runs.values():
            platform.finished(run_id)
        assert worker.stop() == 0
        found = objects(worker)
        assert {"mine": 1} in found, "an object stays what it is"
        found.remove({"mine": 1})
        for one in found:
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", one["time"]), one
            assert one["level"] in {"INFO", "WARNING", "ERROR"}, one
        out, error = messages(worker, "stdout"), messages(worker, "stderr")
        assert {"from print", "[1, 2]", '"text"', '{"half":', "from a process", "from C", "finally 4999"} <= {*out}, out
        assert any("no end of line" in text for text in error)
        assert sum(text.count("x") for text in out if set(text) == {"x"}) == 600_000
        assert max(map(len, out)) <= 1 << 18
        assert "latin \ufffd and \x1b[31mred\x1b[0m" in error
        assert "Traceback (most recent call last):\n  File x\nKeyError: 'y'" in error
        assert "and its stderr" in error
        assert any("UserWarning: from warnings" in text for text in error)
        assert any("Fatal Python error: Aborted" in text for text in error), "of a process that crashed"
        (failure,) = [one for one in found if "STEP_FAILURE" in one["message"] and runs["fails_job"] in one["message"]]
        assert (failure["logger"], failure["level"], failure["run_id"]) == ("dagster", "ERROR", runs["fails_job"])
        assert 'raise RuntimeError("as it should")' in failure["message"]
        endings = {one["run_id"]: one["outcome"] for one in found if one["message"] == "run ended"}
        assert endings == {run_id: platform.status(run_id).value for run_id in runs.values()}


def test_a_run_whose_worker_is_killed_can_print_to_its_end(endpoint: str) -> None:
    with (
        open_platform(endpoint, extra=NOT_CAPTURED) as platform,
        platform.worker("-n", "w", "--log-format", "json") as worker,
    ):
        run_id = platform.launch("talkative_job")
        platform.marked(run_id, "started")
        worker.process.kill()
        platform.marked(run_id, "cleanup-end")
        wait_until(lambda: "finally 4999" in messages(worker, "stdout"), "its last line", seen=worker.log)
        assert sum(text.startswith("finally ") for text in messages(worker, "stdout")) == 5_000


def test_a_collector_that_is_killed_is_replaced_and_nobody_notices(endpoint: str) -> None:
    with (
        open_platform(endpoint, extra=NOT_CAPTURED) as platform,
        platform.worker("-n", "w", "--log-format", "json") as worker,
    ):

        def collectors() -> list[psutil.Process]:
            found = psutil.Process(worker.pid).children()
            return [one for one in found if any("collect" in argument for argument in one.cmdline())]

        (killed,) = collectors()
        killed.kill()
        # A run that begins while there is none.
        run_id = platform.launch("talkative_job", seconds=0.1)
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert [one.pid for one in collectors()] != [killed.pid]
        assert worker.stop() == 0
        assert "finally 4999" in messages(worker, "stdout")
        assert [one["outcome"] for one in objects(worker) if one.get("message") == "run ended"] == ["SUCCESS"]


def test_what_keeps_a_worker_from_its_start_is_an_object_too(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        (platform.home / "dagster.yaml").write_text("run_launcher: {module: dagster_taskiq.launcher, class: Nobody}")
        with platform.worker("--log-format", "json", ready=False) as worker:
            assert worker.process.wait(60) == 1
            wait_until(lambda: worker.lines, "it says why", seen=worker.log)
            (said,) = messages(worker, "stderr")
            assert said.startswith("Error: run_launcher"), said
