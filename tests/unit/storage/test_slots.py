"""Slots for runs, as the daemon counts them: from heartbeats that grow old, of workers that stop or serve another
queue, and while the database is away."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dagster import DagsterInstance

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.slots import RunSlots

SETTINGS = Settings(queue_url="http://127.0.0.1/1/tasks", region_name="us-east-1")
DEAD_AFTER, CONFIRM = SETTINGS.dead_after_s, SETTINGS.death_confirmed_after_s


@dataclass
class World:
    instance: DagsterInstance
    now: float = 1_000.0
    slots: RunSlots = field(init=False)
    workers: Heartbeats = field(init=False)

    def __post_init__(self) -> None:
        self.workers = Heartbeats(self.instance, DEAD_AFTER, CONFIRM, clock=lambda: self.now)
        self.begin()

    def begin(self) -> None:
        """As a daemon that has just been started."""
        self.slots = RunSlots(self.instance, SETTINGS, clock=lambda: self.now, monotonic=lambda: self.now)

    def beat(self, worker: str, runs: int = 4, **facts: object) -> None:
        self.workers.beat(worker, {"slots": [runs, 4], **facts})

    def after(self, seconds: float) -> int:
        self.now += seconds
        return self.slots.count()


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_the_slots_of_all_living_workers(world: World) -> None:
    assert world.slots.count() == 0
    world.beat("a", 4)
    world.beat("b", 2)
    world.beat("steps-only", 0)
    assert world.slots.count() == 0, "heartbeats are read once a second at most"
    assert world.after(1) == 6
    world.workers.gone("a")
    assert world.after(1) == 2


def test_a_worker_that_falls_silent_counts_until_it_is_known_to_be_dead(world: World) -> None:
    world.beat("a")
    assert world.slots.count() == 4
    assert world.after(DEAD_AFTER) == 4
    assert world.after(CONFIRM - 1) == 4
    assert world.after(1) == 0


def test_for_a_daemon_that_has_just_started_nobody_counts_who_died_without_a_word(world: World) -> None:
    world.beat("long-dead")
    world.now += 3_600
    world.beat("alive", 2)
    world.begin()
    assert world.slots.count() == 2


def test_a_worker_whose_clock_is_wrong_counts_as_soon_as_it_is_seen_to_beat(world: World) -> None:
    ahead = Heartbeats(world.instance, DEAD_AFTER, CONFIRM, clock=lambda: world.now + 100)
    for expected in (0, 4, 4, 4):
        ahead.beat("a", {"slots": [4, 4]})
        assert world.after(5) == expected
        if expected:
            assert world.after(2) == expected, "also between two of its beats"


def test_a_worker_of_another_queue_is_no_use(world: World) -> None:
    world.beat("ours", 4, queue="tasks")
    world.beat("theirs", 8, queue="other")
    world.beat("older-version", 2)
    assert world.slots.count() == 6


def test_while_the_database_is_away_the_last_count_is_valid_for_a_while(tmp_path: Path) -> None:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        world = World(instance)
        world.beat("a")
        assert world.slots.count() == 4
        (file,) = tmp_path.rglob("runs.db")
        with sqlite3.connect(file) as connection:
            connection.execute("ALTER TABLE kvs RENAME TO away")
        assert world.after(DEAD_AFTER + CONFIRM) == 4
        assert world.after(1) == 0
        with sqlite3.connect(file) as connection:
            connection.execute("ALTER TABLE away RENAME TO kvs")
        world.beat("a")
        assert world.after(1) == 4
