"""What launches runs is stopped before the runs that it has launched."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from dagster import DagsterRunStatus
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    ScheduleInstigatorData,
    SensorInstigatorData,
)
from tests.acceptance.conftest import open_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, submit
from tests.support.platform import Platform

from dagster_taskiq import DagsterTaskiqError, cancel_backfill, cancel_schedule, cancel_sensor
from dagster_taskiq.dagster_compat.sources import InstigatorType

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

STATUS = DagsterRunStatus
CancelSource = Callable[..., object]


@pytest.fixture(scope="module")
def queued(endpoint: str) -> Iterator[Platform]:
    with open_platform(endpoint, extra={"run_coordinator": COORDINATOR}) as platform:
        yield platform


def add(platform: Platform, kind: InstigatorType, name: str, location: str = "jobs") -> InstigatorState:
    """As Dagster's daemon stores one that is on because its code says so."""
    origin = RemoteInstigatorOrigin(
        RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(location), "__repository__"), name
    )
    schedule = kind is InstigatorType.SCHEDULE
    data = ScheduleInstigatorData("* * * * *", datetime.now(UTC).timestamp()) if schedule else SensorInstigatorData()
    state = InstigatorState(origin, kind, InstigatorStatus.DECLARED_IN_CODE, data)
    platform.instance.add_instigator_state(state)
    return state


def is_running(platform: Platform, state: InstigatorState) -> bool:
    now = platform.instance.get_instigator_state(state.instigator_origin_id, state.selector_id)
    assert now is not None
    return bool(now.is_running)


@pytest.mark.parametrize(
    ("kind", "cancel", "tag"),
    [
        (InstigatorType.SCHEDULE, cancel_schedule, "dagster/schedule_name"),
        (InstigatorType.SENSOR, cancel_sensor, "dagster/sensor_name"),
    ],
)
def test_it_is_stopped_and_its_runs_with_it(
    queued: Platform, kind: InstigatorType, cancel: Callable[..., object], tag: str
) -> None:
    name = f"nightly_{kind.value.lower()}"
    state = add(queued, kind, name)
    its, other = submit(queued, {tag: name}), submit(queued, {tag: "daily"})
    cancel(queued.instance, name, include_runs=False)
    assert not is_running(queued, state)
    assert queued.status(its) is STATUS.QUEUED
    report = cancel(queued.instance, name, reason="wrong file")
    assert str(report) == "1 cancelled"
    assert (queued.status(its), queued.status(other)) == (STATUS.CANCELED, STATUS.QUEUED)


def test_of_several_names_one_is_chosen(queued: Platform) -> None:
    here, there = (add(queued, InstigatorType.SENSOR, "files", location) for location in ("jobs", "etl"))
    run_id = submit(queued, {"dagster/sensor_name": "files"})  # of the location "jobs"
    with pytest.raises(DagsterTaskiqError, match=r"several code locations have a sensor files \(etl, jobs\)"):
        cancel_sensor(queued.instance, "files")
    assert str(cancel_sensor(queued.instance, "files", location="etl")) == "no runs"
    assert (is_running(queued, here), is_running(queued, there)) == (True, False)
    assert cancel_sensor(queued.instance, "files", location="jobs").cancelled == (run_id,)
    with pytest.raises(DagsterTaskiqError, match=r"knows no schedule files: .* stop it in Dagster's UI"):
        cancel_schedule(queued.instance, "files")


def test_a_backfill_launches_no_more(queued: Platform) -> None:
    backfill = PartitionBackfill(
        "kzuxgbsf",
        BulkActionStatus.REQUESTED,
        from_failure=False,
        tags={},
        backfill_timestamp=datetime.now(UTC).timestamp(),
        partition_names=["a"],
    )
    queued.instance.add_backfill(backfill)
    run_id = submit(queued, {"dagster/backfill": "kzuxgbsf"})
    assert cancel_backfill(queued.instance, "kzuxgbsf").cancelled == (run_id,)
    now = queued.instance.get_backfill("kzuxgbsf")
    assert now is not None
    assert now.status is BulkActionStatus.CANCELING
    with pytest.raises(DagsterTaskiqError, match="there is no backfill nowhere"):
        cancel_backfill(queued.instance, "nowhere")
