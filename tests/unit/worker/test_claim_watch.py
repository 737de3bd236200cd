"""What a worker does that has lost a run, or may lose it soon: on Dagster's own in-memory storage."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import DagsterInstance, DagsterRun, job

from dagster_taskiq._lane import Lane
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.metrics import Metrics
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.worker import run_task
from dagster_taskiq.worker.claim_watch import ClaimWatch
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.run_task import RunWork

pytestmark = pytest.mark.anyio

SETTINGS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1", visibility_timeout_seconds=30)
RUN, STEP = "task-of-the-run", "task-of-a-step"


@job
def nothing() -> None: ...


@dataclass
class World:
    instance: DagsterInstance
    run: DagsterRun
    context: WorkerContext
    now: float = 1_000.0
    cancelled: dict[str, Cancellation] = field(default_factory=dict)
    watch: ClaimWatch = field(init=False)

    def __post_init__(self) -> None:
        self.context.heard_at = self.now
        self.watch = ClaimWatch(self.context, self.cancel, clock=lambda: self.now)

    def cancel(self, task_id: str, cancellation: Cancellation) -> bool:
        self.cancelled[task_id] = cancellation
        return True


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        heartbeats = Heartbeats.of_runs(instance, SETTINGS)
        context = WorkerContext(
            instance=instance,
            settings=SETTINGS,
            lane=Lane("test"),
            claims=Claims(instance, heartbeats),
            step_claims=StepClaims(instance),
            heartbeats_of_steps=heartbeats,
            processes=cast("Any", SimpleNamespace()),
            worker_id="me",
            where="here",
            cancel_tasks=cast("Any", None),
            metrics=Metrics([], ""),
        )
        run = instance.create_run_for_job(nothing)
        assert context.claims.take(run, "me", RUN, "here", None)
        with context.working_on(RUN, run.run_id), context.working_on(STEP, run.run_id, StepRef("step", STEP)):
            yield World(instance, run, context)


def take_over(world: World) -> None:
    other = Claims(world.instance, world.context.claims.heartbeats)
    assert other.take(world.run, "other", "task-2", "there", other.read([world.run.run_id])[world.run.run_id])


async def test_what_is_still_its_own_goes_on(world: World) -> None:
    await world.watch.look()
    assert world.cancelled == {}
    assert await world.context.still_ours(RUN)


async def test_what_it_releases_or_claims_anew_itself_is_not_lost(world: World) -> None:
    """The watch may look between the change of the row and the moment that this process knows of it."""
    mine, same_worker = (
        world.context.claims.mine(world.run.run_id),
        Claims(world.instance, world.context.claims.heartbeats),
    )
    same_worker.release(world.run, "no child could be started", mine)
    await world.watch.look()
    assert same_worker.take(world.run, "me", RUN, "here", same_worker.read([world.run.run_id])[world.run.run_id])
    await world.watch.look()
    assert world.cancelled == {}


async def test_a_message_that_cannot_be_followed_takes_nothing_from_older_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was resumed, and its new message is here, where the older work still goes on; the database fails."""
    older, newer = (RunningTask(task_id, settle=cast("Any", None), awaits_signal=True) for task_id in (RUN, "task-2"))
    world.context.at_work[world.run.run_id] = older, asyncio.Event()
    get_run, answers = world.instance.get_run_by_id, iter(["away"])

    def look(run_id: str) -> DagsterRun | None:
        if next(answers, None) is None:
            return get_run(run_id)
        raise OSError("the database is away")

    monkeypatch.setattr(world.instance, "get_run_by_id", look)
    with newer.entered():
        await RunWork(world.context).carry_out("resume_run", world.run.run_id)
    assert world.context.claims.holds(world.run.run_id)
    await world.watch.look()
    assert world.cancelled == {}


async def test_work_that_another_worker_has_meanwhile_is_known_no_longer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the watch would look after it as long as the worker lives."""

    def look(_: str) -> DagsterRun | None:
        raise OSError("the database is away")

    take_over(world)
    newer = RunningTask(RUN, settle=cast("Any", None), awaits_signal=True)
    with monkeypatch.context() as away, newer.entered():
        away.setattr(run_task, "DATABASE_RETRY_S", 0.0)
        away.setattr(run_task, "admit_run", lambda *_: look(""))
        await RunWork(world.context).carry_out("execute_run", world.run.run_id)
    assert world.context.claims.mine(world.run.run_id) is None


async def test_a_run_that_another_worker_has_taken_over_is_stopped_and_a_step_of_it_is_not(world: World) -> None:
    take_over(world)
    await world.watch.look()
    assert {task_id: one.kind for task_id, one in world.cancelled.items()} == {RUN: CancelKind.LEASE_LOST}
    assert world.context.active[RUN].lost.is_set, "its cleanup, too"
    assert not world.context.active[STEP].lost.is_set
    assert not await world.context.still_ours(RUN)
    assert world.context.grace_s(world.run, world.cancelled[RUN]) == SETTINGS.lost_grace_s


async def test_a_worker_that_cannot_beat_stops_everything_before_others_may_take_it_over(world: World) -> None:
    world.now += SETTINGS.cut_off_after_s
    world.watch.check_heartbeat()
    assert world.cancelled == {}
    world.now += 1
    world.watch.check_heartbeat()
    assert {task_id: one.kind for task_id, one in world.cancelled.items()} == dict.fromkeys(
        (RUN, STEP), CancelKind.SHUTDOWN
    )
    assert world.context.active[RUN].lost.is_set, "its cleanup, too"
    gone_by = SETTINGS.cut_off_after_s + SETTINGS.heartbeat_every_s + world.context.grace_s(world.run)
    assert gone_by < SETTINGS.given_up_after_s + SETTINGS.death_confirmed_after_s
    world.context.heard_at = world.now
    world.watch.check_heartbeat()
    assert not world.context.is_cut_off


@pytest.mark.parametrize("heard", [True, False])
async def test_a_lost_lease_and_no_database_mean_that_others_have_it(
    world: World, heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_away(_: object) -> bool:
        raise ConnectionError("the database is away")

    monkeypatch.setattr(world.context.claims, "holds", is_away)
    monkeypatch.setattr("dagster_taskiq.worker.context.monotonic", lambda: world.now)
    world.now += 0 if heard else SETTINGS.dead_after_s
    assert await world.context.still_ours(RUN) is heard
