"""What a worker and the processes of its runs write to stdout and stderr."""

import re
import signal

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
            run_id = platform.launch("sleepy_job", seconds=5)
            platform.marked(run_id, "started")
            worker.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "stopping" in worker.log(), "it drains", seen=worker.log)
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(30) == 0
            assert 'outcome="handed back"' in ended(worker, run_id)
        with platform.worker("-n", "second") as heir:
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS
            assert "outcome=SUCCESS" in ended(heir, run_id)
            assert f"run resumed job=sleepy_job run={run_id[:8]}" in heir.log(), heir.log()


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
