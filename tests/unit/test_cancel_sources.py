"""A cancelled backfill stays cancelled, although Dagster's daemon writes back what it has read before."""

import logging
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq import cancel_backfill
from dagster_taskiq.cancel_many import CancelReport
from dagster_taskiq.cancel_sources import stay_cancelled
from dagster_taskiq.run_query import RunQuery

ID = "kzuxgbsf"
STATUS = BulkActionStatus


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    config = {"queue_url": "http://127.0.0.1:1/1/q", "region_name": "us-east-1"}
    launcher = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher", "config": config}
    with DagsterInstance.local_temp(str(tmp_path), overrides={"run_launcher": launcher}) as instance:
        instance.add_backfill(
            PartitionBackfill(ID, STATUS.REQUESTED, from_failure=False, tags={}, backfill_timestamp=1e9)
        )
        yield instance


def launched(instance: DagsterInstance) -> str:
    origin = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__"), "job")
    queued, tags = DagsterRunStatus.QUEUED, {"dagster/backfill": ID}
    return str(create_run_for_test(instance, status=queued, tags=tags, remote_job_origin=origin).run_id)


def status(instance: DagsterInstance) -> BulkActionStatus:
    backfill = instance.get_backfill(ID)
    assert backfill is not None
    return backfill.status


class Daemon(Event):
    """Dagster's daemon, at work on the backfill. It goes on whenever somebody waits.

    The order of its calls is that of Dagster's `execute_job_backfill_iteration`: it reads, launches, and writes what it
    has read. In its last turn it sees that the backfill is cancelled, and ends it.
    """

    def __init__(self, instance: DagsterInstance, turns: int) -> None:
        super().__init__()
        self.instance = instance
        self.read = instance.get_backfill(ID)
        self.turns = turns
        self.launched: list[str] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert self.read is not None
        if self.turns > 0:
            self.launched.append(launched(self.instance))
            self.instance.update_backfill(self.read)
        elif status(self.instance) is STATUS.CANCELING:
            self.instance.update_backfill(self.read.with_status(STATUS.CANCELED))  # type: ignore[no-untyped-call]
        self.turns -= 1
        return super().wait(timeout)


def test_it_is_cancelled_again_with_what_it_has_launched(instance: DagsterInstance) -> None:
    first, daemon = launched(instance), Daemon(instance, turns=2)
    report = cancel_backfill(instance, ID, stop=daemon, reason="wrong file")
    assert status(instance) is STATUS.CANCELED, "and not REQUESTED, as the daemon has written it"
    assert report.cancelled == (first, *daemon.launched)
    assert len(daemon.launched) == 2
    assert {run.status for run in instance.get_runs()} == {DagsterRunStatus.CANCELED}
    assert {run.tags["dagster-taskiq/cancel_reason"] for run in instance.get_runs()} == {"wrong file"}


def test_one_that_never_stays_cancelled_is_told_of(instance: DagsterInstance, caplog: pytest.LogCaptureFixture) -> None:
    nothing = CancelReport((), (), (), {})
    with caplog.at_level(logging.WARNING):
        stay_cancelled(instance, RunQuery(backfill=ID), nothing, stop=Daemon(instance, turns=1000), at_most_s=0.3)
    assert "does not stay cancelled" in caplog.text
    assert status(instance) is STATUS.CANCELING
    assert {run.status for run in instance.get_runs()} == {DagsterRunStatus.CANCELED}


def test_one_at_rest_is_looked_at_for_a_while_only(instance: DagsterInstance) -> None:
    nothing = CancelReport((), (), (), {})
    assert stay_cancelled(instance, RunQuery(backfill=ID), nothing, quiet_s=0.1) == nothing
    assert status(instance) is STATUS.CANCELING
