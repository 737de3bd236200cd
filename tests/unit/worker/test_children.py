"""The runs that a run has launched, when it is terminated: which, told once, waited for, and for how long."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import DagsterInstance, DagsterRun, job

from dagster_taskiq._lane import Lane
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import read_engine_events
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import CANCEL_CHILDREN_TAG, GRACE_SECONDS_TAG, cancels_children
from dagster_taskiq.worker.children import cancel_children
from dagster_taskiq.worker.context import WorkerContext

SETTINGS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1", cancel_children=True)
pytestmark = pytest.mark.anyio

TERMINATED = Cancellation(CancelKind.REQUESTED, "why", "ada")


@job
def nothing() -> None: ...


class World:
    def __init__(self, instance: DagsterInstance) -> None:
        self.instance = instance
        self.asked: list[tuple[tuple[str, ...], str, str]] = []
        self.then: Callable[[str], object] = lambda run_id: instance.report_run_canceled(self.run(run_id))
        heartbeats = Heartbeats.of_runs(instance, SETTINGS)
        self.context = WorkerContext(
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
            cancel_runs=self.cancel,
        )

    def run(self, run_id: str) -> DagsterRun:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def make(self, parent: DagsterRun | None = None) -> DagsterRun:
        tags = {"dagster/parent_run_id": parent.run_id} if parent is not None else {}
        return self.instance.create_run_for_job(nothing, tags=tags)

    def cancel(self, _: DagsterInstance, run_ids: Sequence[str], reason: str, by: str) -> Mapping[str, str]:
        self.asked.append((tuple(sorted(run_ids)), reason, by))
        for run_id in run_ids:
            self.then(run_id)
        return {}

    def story(self, run: DagsterRun) -> list[str]:
        events = [entry.dagster_event for entry in self.instance.all_logs(run.run_id)]
        return [event.message or "" for event in events if event is not None and event.is_engine_event]


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_the_tag_wins_over_the_setting() -> None:
    assert cancels_children({}, default=True)
    assert not cancels_children({}, default=False)
    assert not cancels_children({CANCEL_CHILDREN_TAG: "false"}, default=True)
    assert cancels_children({CANCEL_CHILDREN_TAG: "true"}, default=False)
    assert cancels_children({CANCEL_CHILDREN_TAG: "perhaps"}, default=True)


async def test_they_are_told_once_and_waited_for(world: World) -> None:
    parent = world.make()
    children = sorted(world.make(parent).run_id for _ in range(2))
    world.make()
    assert await cancel_children(world.context, parent, TERMINATED)
    assert world.asked == [(tuple(children), f"parent run {parent.run_id} was terminated: why", "ada")]
    first, last = world.story(parent)
    assert first.startswith("cancelling 2 runs that this run launched: ")
    assert last.startswith("all of them final after ")
    assert await cancel_children(world.context, parent, TERMINATED), "again: there is nothing left to do"
    assert len(world.asked) == 1


async def test_those_that_do_not_end_are_named_and_no_longer_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SETTINGS.children_patience_s(30) >= 30 + SETTINGS.status_poll_seconds + 60
    monkeypatch.setattr(Settings, "children_patience_s", lambda _, grace_s: grace_s)
    world.then = lambda _: None
    parent = world.make()
    child = world.make(parent)
    world.instance.add_run_tags(child.run_id, {GRACE_SECONDS_TAG: "0.1"})
    assert await cancel_children(world.context, parent, TERMINATED)
    assert "1 run that this run launched had not ended after " in world.story(parent)[-1]
    assert child.run_id in world.story(parent)[-1]
    assert [*read_engine_events(world.instance, parent.run_id)]


async def test_a_worker_that_stops_leaves_the_rest_to_the_next_one(world: World) -> None:
    parent = world.make()
    child = world.make(parent)
    world.then = lambda _: world.context.shutdown.set(Cancellation(CancelKind.SHUTDOWN))
    assert not await cancel_children(world.context, parent, TERMINATED)
    again = World(world.instance)
    assert await cancel_children(again.context, parent, TERMINATED)
    assert [run_ids for run_ids, _, _ in again.asked] == [(child.run_id,)]


async def test_a_re_execution_is_left_alone(world: World) -> None:
    """Somebody has forced the end of the run and launched it again, before its worker came to see that it is over."""
    parent = world.make()
    before = world.make(parent)
    world.instance.report_run_canceled(parent)
    world.make(parent)
    assert await cancel_children(world.context, world.run(parent.run_id), TERMINATED)
    assert [run_ids for run_ids, _, _ in world.asked] == [(before.run_id,)]
