"""A fence means what its query means, for as long as it stands, wherever it was put up."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.errors import QueryError
from dagster_taskiq.run_fence import Fence, fence_for, put_up, take_down
from dagster_taskiq.run_query import RunQuery


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def soon() -> float:
    return time.time() + 600


@pytest.mark.parametrize(
    "query",
    [
        RunQuery(),
        RunQuery(job="load", tags=(("team", "a"), ("team", "b"), ("dagster/partition", None)), sensor="files"),
        RunQuery(partition_range=("2026-11-01", "2026-11-05"), where="job.startswith('l') and age < minutes(5)"),
    ],
)
def test_it_reads_as_it_was_written(instance: DagsterInstance, query: RunQuery) -> None:
    tags = {"team": "a", "dagster/partition": "2026-11-02", "dagster/sensor_name": "files"}
    run = create_run_for_test(instance, "load", status=DagsterRunStatus.STARTING, tags=tags)
    fence = Fence(query, soon(), "why", "ada")
    assert fence_for(instance, run) is None
    put_up(instance, fence)
    assert fence_for(instance, run) == fence
    if query != RunQuery():
        assert fence_for(instance, create_run_for_test(instance, "report")) is None
    take_down(instance, fence)
    assert fence_for(instance, run) is None


def test_its_time_is_over_by_itself(instance: DagsterInstance) -> None:
    run = create_run_for_test(instance)
    put_up(instance, Fence(RunQuery(), time.time() - 1, None, "ada"))
    assert fence_for(instance, run) is None


def test_many_at_once(instance: DagsterInstance) -> None:
    fences = [Fence(RunQuery(job=f"job_{number}"), soon(), None, "ada") for number in range(6)]
    together = [threading.Thread(target=put_up, args=(instance, fence)) for fence in fences]
    for one in together:
        one.start()
    for one in together:
        one.join()
    runs = [create_run_for_test(instance, f"job_{number}") for number in range(6)]
    assert [fence_for(instance, run) for run in runs] == fences
    take_down(instance, fences[0])
    take_down(instance, fences[0])
    assert [fence_for(instance, run) for run in runs] == [None, *fences[1:]]


@pytest.mark.parametrize("query", [RunQuery(older_than_s=60), RunQuery(statuses=(DagsterRunStatus.STARTED,))])
def test_what_no_new_run_can_be_is_refused(query: RunQuery) -> None:
    with pytest.raises(QueryError, match="it goes with no status and no age"):
        Fence(query, soon(), None, "ada")
