"""What is said of runs that wait, and of the runs that workers are at."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from dagster import AssetKey, DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import EngineEvent
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.storage.waiting import (
    NOTED_AFTER_S,
    CancelledRuns,
    WaitNotes,
    cancelled_runs,
    describe_wait,
    describe_waiting,
    waiting_runs,
)
from dagster_taskiq.storage.workers import list_workers

SETTINGS = Settings(queue_url="http://127.0.0.1/1/tasks", region_name="us-east-1")


@dataclass
class World:
    instance: DagsterInstance

    def run(self, status: DagsterRunStatus = DagsterRunStatus.STARTING, **options: object) -> DagsterRun:
        run: DagsterRun = create_run_for_test(self.instance, status=status, **options)  # type: ignore[arg-type]
        return run

    def beat(self, worker: str, *work: DagsterRun, slots: int = 1, ago: float = 0.0, queue: str = "tasks") -> None:
        at = time.time() - ago
        facts = {"slots": [slots, 4], "work": [[run.run_id, None, at] for run in work], "queue": queue}
        Heartbeats(self.instance, 30, 10, clock=lambda: at).beat(worker, facts)

    def all(self) -> str | None:
        return "; ".join(describe_waiting(self.instance, SETTINGS, list_workers(self.instance, SETTINGS))) or None

    def listed(self) -> list[str]:
        return [work.run_id for worker in list_workers(self.instance, SETTINGS) for work in worker.work]


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_no_run_waits(world: World) -> None:
    world.run(DagsterRunStatus.STARTED)
    assert world.all() is None


def test_without_a_worker(world: World) -> None:
    world.run()
    world.beat("steps only", slots=0)
    world.beat("of another fleet", queue="others")
    assert world.all() == "1 run waits, for 0 s: no worker that takes runs is alive"


def test_without_a_slot(world: World) -> None:
    world.beat("one", world.run(DagsterRunStatus.STARTED))
    world.beat("two", *[world.run(DagsterRunStatus.STARTED) for _ in range(2)], slots=2)
    world.run()
    last = world.run()
    why = "no free slot, 3 of 3 are taken (workers: 2)"
    assert world.all() == f"2 runs wait, the oldest for 0 s: {why}"
    said = describe_wait(world.instance, SETTINGS, last.run_id)
    assert said == f"waiting for a worker for 0 s, older runs that wait: 1; {why}"


def test_with_a_slot(world: World) -> None:
    world.beat("one", world.run(DagsterRunStatus.STARTED), slots=2)
    assert "1 of 2 slots are free" in describe_wait(world.instance, SETTINGS, world.run().run_id)


def ended(world: World, kind: DagsterEventType) -> DagsterRun:
    run = world.run(DagsterRunStatus.STARTED)
    world.instance.report_dagster_event(DagsterEvent(kind.value, run.job_name), run.run_id)
    return run


def test_a_run_that_has_ended_since_the_heartbeat_is_not_listed(world: World) -> None:
    for kind in (DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_CANCELED):
        world.beat("w", ended(world, kind), ago=5)
        assert world.listed() == [], kind


def test_a_run_that_was_cancelled_by_force_is_listed_while_its_worker_names_it(world: World) -> None:
    run = ended(world, DagsterEventType.RUN_CANCELED)
    world.beat("w", run)
    assert world.listed() == [run.run_id]


def test_a_run_that_was_picked_up_since_the_last_heartbeat_is_listed(world: World) -> None:
    claims = Claims(world.instance, Heartbeats(world.instance, 30, 10))
    known, new, released = (world.run(DagsterRunStatus.STARTED) for _ in range(3))
    world.beat("w", known, ago=5)
    world.beat("another", ago=5)
    for run in (new, released):
        assert claims.take(run, "w", "a task", "", None) is not None
    assert claims.release(released, "it was handed back")
    assert world.listed() == [known.run_id, new.run_id]
    world.beat("w", known)
    assert world.listed() == [known.run_id], "the heartbeat is newer than the claim"


def test_what_a_run_of_selected_assets_makes_is_named(world: World) -> None:
    assets = frozenset(AssetKey(name) for name in ("a", "b", "c"))
    world.beat("w", world.run(DagsterRunStatus.STARTED, job_name="__ASSET_JOB", asset_selection=assets))
    (worker,) = list_workers(world.instance, SETTINGS)
    assert [work.assets for work in worker.work] == ["a, b and 1 more"]


def test_runs_of_a_cancelled_backfill_wait_and_will_not_start(world: World) -> None:
    """As workers and Dagster's daemon see it."""
    for number, status in enumerate(
        (BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.CANCELED)
    ):
        backfill = PartitionBackfill(f"b{number}", status, False, {}, backfill_timestamp=time.time())
        world.instance.add_backfill(backfill)
        for state in (DagsterRunStatus.STARTING, DagsterRunStatus.STARTED):
            world.run(state, tags={"dagster/backfill": backfill.backfill_id})
    world.run()
    found = waiting_runs(world.instance)
    assert (found.count, found.of_cancelled_backfills) == (2, 2)


def canceled(world: World, **facts: object) -> None:
    world.run(DagsterRunStatus.CANCELED, tags={TASK_ID_TAG: "a task"}, **facts)


def test_messages_that_no_run_in_progress_needs_are_of_cancelled_runs(world: World) -> None:
    def found(visible: int | None) -> CancelledRuns:
        return cancelled_runs(world.instance, list_workers(world.instance, SETTINGS), visible)

    assert found(7) == CancelledRuns(0, 0, 0), "plain tasks, or others that we know nothing of"
    claims = Claims(world.instance, Heartbeats(world.instance, 30, 10))
    with_worker, without = (world.run(DagsterRunStatus.CANCELING) for _ in range(2))
    world.run(DagsterRunStatus.STARTING)
    world.beat("w", with_worker)
    for run, worker in ((with_worker, "w"), (without, "one that is dead")):
        assert claims.take(run, worker, "a task", "", None) is not None
    for _ in range(4):
        canceled(world)
    assert found(5) == CancelledRuns(2, 1, 3), "two are needed: of the run that starts, and of the one without a worker"
    assert found(2).messages == 0
    assert found(100).messages == 4
    assert found(None) == CancelledRuns(2, 1, None), "the queue could not be asked"


def notes(world: World, run: DagsterRun) -> list[str]:
    events = [entry.dagster_event for entry in world.instance.all_logs(run.run_id)]
    return [event.message or "" for event in events if event is not None and event.is_engine_event]


def test_a_run_that_has_waited_for_a_minute_says_why_once(world: World) -> None:
    ahead_s = 0.0
    writer = WaitNotes(world.instance, SETTINGS, clock=lambda: time.time() + ahead_s)
    waiting = [world.run() for _ in range(3)]
    at_work = world.run(DagsterRunStatus.STARTED)
    world.beat("w", at_work)
    writer.write()
    assert [notes(world, run) for run in waiting] == [[], [], []], "it has not waited for long"
    for _ in range(3):
        ahead_s += NOTED_AFTER_S + 1
        writer.write()
        waiting.append(world.run())
    assert notes(world, at_work) == []
    told = [notes(world, run) for run in waiting]
    assert [len(lines) for lines in told] == [1, 1, 1, 1, 1, 0]
    for older, (line,) in enumerate(told[:-1]):
        assert line.startswith("waiting for a worker for "), line
        assert line.endswith(f" s, older runs that wait: {older}; no free slot, 1 of 1 are taken (workers: 1)"), line


def test_a_run_whose_log_cannot_be_written_keeps_no_other_one_from_saying_why(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_s = 0.0
    writer = WaitNotes(world.instance, SETTINGS, clock=lambda: time.time() + ahead_s)
    bad, good = world.run(), world.run()

    def append(instance: DagsterInstance, run: DagsterRun, event: EngineEvent) -> None:
        if run.run_id == bad.run_id:
            raise OSError("no space left")
        append_event(instance, run, event)

    monkeypatch.setattr("dagster_taskiq.storage.waiting.append_event", append)
    for _ in range(3):
        ahead_s += NOTED_AFTER_S + 1
        writer.write()
    assert [len(notes(world, run)) for run in (bad, good)] == [0, 1]
