"""Steps that wait for a route without workers: what the run's log says, when, and what is asked for it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.executor import SQSStepHandler
from dagster_taskiq.settings import Settings
from dagster_taskiq.steps.plan import Plan
from dagster_taskiq.steps.unserved import Unserved
from dagster_taskiq.storage.heartbeats import Heartbeats

SETTINGS = Settings(queue_url="http://127.0.0.1/1/tasks", region_name="us-east-1")
OF_GPU = (
    "steps wait for route gpu, of which no worker that takes steps is alive; start one with"
    " `dagster-taskiq worker start -q gpu`"
)
OF_THE_UNNAMED = "steps wait, and no worker that takes steps is alive; start one with `dagster-taskiq worker start`"


class Handler(SQSStepHandler):
    """Knows how often it was asked."""

    asked = 0

    def unserved(self, instance: DagsterInstance, routes: set[str]) -> set[str]:
        self.asked += 1
        return super().unserved(instance, routes)


@dataclass
class World:
    instance: DagsterInstance
    run: DagsterRun
    now: float = 0.0
    handler: Handler = field(default_factory=lambda: Handler(SETTINGS))
    waiting: dict[str, str] = field(default_factory=dict)
    looked: int = 0

    def unserved(self) -> Unserved:
        return Unserved(self.plan(), clock=lambda: self.now)

    def plan(self) -> Plan:
        context: Any = SimpleNamespace(instance=self.instance, dagster_run=self.run, run_id=self.run.run_id)
        nothing: Any = None
        return Plan(context, nothing, self.handler, nothing, nothing, lambda key: key.partition("_")[0], None)

    def wait_for(self, *step_keys: str) -> None:
        self.waiting = {f"task of {key}": key for key in step_keys}

    def go_on(self, unserved: Unserved, until: float) -> None:
        """As the loop does: several times a second."""
        while self.now < until:
            self.now += 0.25
            unserved.note(self.look)

    def look(self) -> dict[str, str]:
        self.looked += 1
        return self.waiting

    def beat(self, worker: str, routes: list[str], steps: int = 4, ago: float = 0.0) -> None:
        at = time.time() - ago
        facts = {"slots": [1, steps], "work": [], "queue": "tasks", "routes": routes}
        Heartbeats(self.instance, 30, 10, clock=lambda: at).beat(worker, facts)

    def log(self) -> list[str]:
        return [entry.message for entry in self.instance.all_logs(self.run.run_id)]


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance, create_run_for_test(instance))


def test_it_is_written_after_a_minute_and_once(world: World) -> None:
    unserved = world.unserved()
    world.wait_for("gpu_a", "gpu_b")
    world.go_on(unserved, 59)
    assert (world.log(), world.handler.asked) == ([], 0)
    world.go_on(unserved, 70)
    assert world.log() == [OF_GPU]
    world.go_on(unserved, 1_000)
    assert (world.log(), world.handler.asked) == ([OF_GPU], 1), "once, and nobody asks about that route again"
    world.wait_for("gpu_b", "default_c")
    world.go_on(unserved, 1_100)
    assert world.log() == [OF_GPU, OF_THE_UNNAMED]


def test_a_run_that_is_resumed_remembers_what_it_has_written(world: World) -> None:
    world.wait_for("gpu_a")
    world.go_on(world.unserved(), 100)
    resumed = world.unserved()
    for entry in world.instance.all_logs(world.run.run_id):
        if entry.dagster_event is not None:
            resumed.remember(entry.dagster_event)
    world.go_on(resumed, 300)
    assert world.log() == [OF_GPU]


def test_nothing_is_asked_while_workers_have_all_steps(world: World) -> None:
    unserved = world.unserved()
    for number in range(100):  # each is taken within a minute
        world.wait_for(f"gpu_{number}")
        world.go_on(unserved, world.now + 40)
    world.wait_for()
    world.go_on(unserved, world.now + 1_000)
    assert (world.log(), world.handler.asked) == ([], 0)
    assert world.looked <= world.now / 5 + 1, "the plan may be large, and the loop turns often"


def test_steps_that_wait_for_a_slot_are_nobodys_mistake_until_its_workers_are_gone(world: World) -> None:
    unserved = world.unserved()
    world.beat("w-1", ["gpu"])
    world.wait_for("gpu_a")
    world.go_on(unserved, 360)
    assert world.log() == []
    assert world.handler.asked <= 300 / 30 + 1, "twice a minute"
    Heartbeats(world.instance, 30, 10).gone("w-1")
    world.go_on(unserved, 400)
    assert world.log() == [OF_GPU]


@pytest.mark.parametrize(
    "worker",
    [{"routes": ["default"]}, {"routes": ["gpu"], "steps": 0}, {"routes": ["gpu"], "ago": 3_600.0}],
    ids=["of another route", "without slots for steps", "dead"],
)
def test_who_does_not_serve_a_route(world: World, worker: dict[str, Any]) -> None:
    world.beat("w-1", **worker)
    world.wait_for("gpu_a")
    world.go_on(world.unserved(), 100)
    assert world.log() == [OF_GPU]


def test_a_database_that_does_not_answer_costs_only_the_note(world: World) -> None:
    class Out(Handler):
        def unserved(self, instance: DagsterInstance, routes: set[str]) -> set[str]:
            self.asked += 1
            if self.asked < 3:
                raise OSError("no database")
            return SQSStepHandler.unserved(self, instance, routes)

    world.handler = Out(SETTINGS)
    unserved = world.unserved()
    world.wait_for("gpu_a")
    world.go_on(unserved, 200)
    assert (world.log(), world.handler.asked) == ([OF_GPU], 3)
