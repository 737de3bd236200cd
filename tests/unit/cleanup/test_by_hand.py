"""When may the cleanup of a run be made up for by hand? With Dagster's own SQLite storage."""

import time
from pathlib import Path

import pytest
from dagster import DagsterInstance, job

from dagster_taskiq.errors import CleanupFailed, DagsterTaskiqError
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.runs import clean_up_run
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.cleanup_events import cleanup_handlers
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.heartbeats import Heartbeats

LAUNCHER = {
    "module": "dagster_taskiq.launcher",
    "class": "TaskiqRunLauncher",
    "config": {
        "queue_url": "http://127.0.0.1/1/q",
        "region_name": "us-east-1",
        "config_source": {"visibility_timeout_seconds": 4},
    },
}


@job
def nothing() -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_that_is_dead_is_not_waited_for(tmp_path: Path, alive: bool) -> None:
    """It was killed after the run was marked as CANCELED by force. A program's first look cannot tell that."""
    with DagsterInstance.local_temp(str(tmp_path), overrides={"run_launcher": LAUNCHER}) as instance:
        launcher = instance.run_launcher
        assert isinstance(launcher, TaskiqRunLauncher)
        run = instance.create_run_for_job(nothing)
        age_s = 0.0 if alive else launcher.settings.dead_after_s + 1
        worker = Heartbeats.of_runs(instance, launcher.settings, clock=lambda: time.time() - age_s)
        assert Claims(instance, worker).take(run, "other-1", "task-1", "there", None)
        worker.beat("other-1")
        append_event(instance, run, cleanup_handlers(["abort_upload of upload"]))
        instance.report_run_canceled(run)
        # The job of this test cannot be loaded again: but it was tried.
        error, text = (DagsterTaskiqError, "is cleaning up") if alive else (CleanupFailed, "looked up")
        with pytest.raises(error, match=text):
            clean_up_run(run.run_id, instance=instance)
