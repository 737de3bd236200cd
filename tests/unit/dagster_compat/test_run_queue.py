"""What holds a run back in Dagster's queue, and what its steps wait for, in Dagster's own storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.storage.dagster_run import RunOpConcurrency
from dagster._core.test_utils import create_run_for_test, instance_for_test

from dagster_taskiq.dagster_compat.run_queue import LimitHit, limits_that_hold, pool_waits, priority_of, queue_order

COORDINATOR = {
    "module": "dagster.core.run_coordinator",
    "class": "QueuedRunCoordinator",
    "config": {"tag_concurrency_limits": [{"key": "team", "limit": 1}, {"key": "kind", "value": "big", "limit": 2}]},
}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with instance_for_test(temp_dir=str(tmp_path), overrides={"run_coordinator": COORDINATOR}) as instance:
        yield instance


def queued(instance: DagsterInstance, **options: object) -> DagsterRun:
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__")
    run = create_run_for_test(instance, status=DagsterRunStatus.NOT_STARTED)
    instance.delete_run(run.run_id)
    origin = RemoteJobOrigin(repository, run.job_name)
    return instance.add_run(run._replace(status=DagsterRunStatus.QUEUED, remote_job_origin=origin, **options))


def test_the_limits_of_tags_that_hold_a_run(instance: DagsterInstance) -> None:
    run, other = queued(instance, tags={"team": "a", "kind": "big"}), queued(instance)
    assert limits_that_hold(instance, [run, other]) == {}
    create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags={"team": "b", "kind": "big"})
    assert limits_that_hold(instance, [run, other]) == {run.run_id: [LimitHit("tag", "team", 1)]}


def test_the_pools_that_hold_a_run(instance: DagsterInstance) -> None:
    instance.event_log_storage.set_concurrency_slots("scarce", 1)
    needs = RunOpConcurrency(root_key_counts={"scarce": 1}, has_unconstrained_root_nodes=False, all_pools={"scarce"})
    run = queued(instance, run_op_concurrency=needs)
    assert limits_that_hold(instance, [run]) == {}
    other = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
    assert instance.event_log_storage.claim_concurrency_slot("scarce", other.run_id, "load").is_claimed
    instance.event_log_storage.set_concurrency_slots("scarce", 0)
    assert limits_that_hold(instance, [run]) == {run.run_id: [LimitHit("pool", "scarce", 0)]}


def test_the_queue_is_in_the_order_in_which_the_daemon_takes_it(instance: DagsterInstance) -> None:
    """By priority, then by age."""
    runs = [queued(instance, tags={"dagster/priority": tag} if tag else {}) for tag in ("", "-1", "10", "x", "10")]
    assert queue_order(instance) == [runs[number].run_id for number in (2, 4, 0, 3, 1)]


def test_a_step_that_waits_for_a_pool(instance: DagsterInstance) -> None:
    storage = instance.event_log_storage
    storage.set_concurrency_slots("scarce", 1)
    holder, waiter = (create_run_for_test(instance, status=DagsterRunStatus.STARTED).run_id for _ in range(2))
    assert storage.claim_concurrency_slot("scarce", holder, "load").is_claimed
    assert pool_waits(instance, [holder, waiter]) == {}
    assert not storage.claim_concurrency_slot("scarce", waiter, "load").is_claimed
    (wait,) = pool_waits(instance, [holder, waiter])[waiter]
    assert (wait.step_key, wait.pool, wait.limit, wait.holders) == ("load", "scarce", 1, (holder,))


@pytest.mark.parametrize(
    ("tags", "priority"), [({}, 0), ({"dagster/priority": "-3"}, -3), ({"dagster/priority": "x"}, 0)]
)
def test_a_priority_is_read_as_the_daemon_reads_it(tags: dict[str, str], priority: int) -> None:
    assert priority_of(tags) == priority
