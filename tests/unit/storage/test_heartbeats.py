"""Alive, dead, or too early to say: two looks at a heartbeat, with clocks that jump and a database that was away."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from dagster import DagsterInstance

from dagster_taskiq.dagster_compat.storage import values_under
from dagster_taskiq.storage.heartbeats import Heartbeats

DEAD_AFTER, CONFIRM = 15.0, 10.0


@dataclass
class World:
    instance: DagsterInstance
    observers_clock: float = 1_000.0
    workers_clock: float = 1_000.0
    passed: float = 0.0
    here: Heartbeats = field(init=False)
    there: Heartbeats = field(init=False)

    def __post_init__(self) -> None:
        self.here = Heartbeats(
            self.instance, DEAD_AFTER, CONFIRM, clock=lambda: self.observers_clock, monotonic=lambda: self.passed
        )
        self.there = Heartbeats(self.instance, DEAD_AFTER, CONFIRM, clock=lambda: self.workers_clock)

    def wait(self, seconds: float) -> None:
        self.observers_clock += seconds
        self.workers_clock += seconds
        self.passed += seconds

    def look(self) -> str:
        alive, in_doubt = self.here.look({"w"})
        assert self.here.alive({"w"}) == alive | in_doubt
        return "alive" if alive else "in doubt" if in_doubt else "dead"


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_a_worker_that_beats_is_alive(world: World) -> None:
    world.there.beat("w")
    world.wait(DEAD_AFTER - 1)
    assert world.look() == "alive"


def test_a_worker_that_has_stopped_beating_is_dead_at_the_second_look(world: World) -> None:
    world.there.beat("w")
    world.wait(DEAD_AFTER)
    assert world.look() == "in doubt"
    world.wait(CONFIRM - 1)
    assert world.look() == "in doubt"
    world.wait(1)
    assert world.look() == "dead"


def test_a_worker_that_says_so_is_dead_at_once(world: World) -> None:
    world.there.gone("w")
    assert world.look() == "dead"


def test_a_worker_that_nobody_has_heard_of_is_dead_at_the_second_look(world: World) -> None:
    assert world.look() == "in doubt"
    world.wait(CONFIRM)
    assert world.look() == "dead"


def test_who_beats_again_after_an_outage_is_alive(world: World) -> None:
    world.there.beat("w")
    world.wait(300)
    assert world.look() == "in doubt"
    world.wait(CONFIRM - 1)
    world.there.beat("w")
    world.wait(1)
    assert world.look() == "alive"
    world.wait(DEAD_AFTER)
    assert world.look() == "in doubt", "what was doubted before is forgotten"


def test_a_look_that_fails_lets_the_waiting_begin_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.there.beat("w")
    world.wait(DEAD_AFTER)
    assert world.look() == "in doubt"
    world.wait(CONFIRM)
    with monkeypatch.context() as patch:
        patch.setattr(type(world.instance.daemon_cursor_storage), "get_cursor_values", _is_away)
        with pytest.raises(ConnectionError):
            world.look()
    assert world.look() == "in doubt"
    world.wait(CONFIRM)
    assert world.look() == "dead"


def _is_away(*_: object) -> None:
    raise ConnectionError("the database is away")


@pytest.mark.parametrize("ahead", [-3_600.0, 3_600.0], ids=["slow", "fast"])
def test_a_clock_that_is_an_hour_wrong_kills_nobody_and_keeps_nobody_alive(world: World, ahead: float) -> None:
    world.workers_clock += ahead
    world.there.beat("w")
    assert world.look() == "in doubt", "the times cannot be compared, so only change tells"
    for _ in range(10):
        world.wait(5)
        world.there.beat("w")
        assert world.look() == "alive"
    world.wait(CONFIRM)
    assert world.look() == "dead"


@pytest.mark.parametrize("jump", [-3_600.0, 3_600.0], ids=["back", "forth"])
def test_a_clock_that_jumps_here_kills_nobody(world: World, jump: float) -> None:
    world.there.beat("w")
    assert world.look() == "alive"
    world.observers_clock += jump
    for _ in range(4):
        world.wait(5)
        world.there.beat("w")
        assert world.look() != "dead"


def test_a_heartbeat_that_an_outage_has_held_does_not_revive_its_worker(world: World) -> None:
    """It arrives after a later one, or after its worker has died."""
    world.there.beat("w")
    world.wait(DEAD_AFTER)
    assert world.look() == "in doubt"
    world.wait(CONFIRM)
    world.workers_clock -= DEAD_AFTER + CONFIRM + 5
    world.there.beat("w")
    assert world.look() == "dead"


def test_a_clock_that_jumps_back_there_kills_nobody(world: World) -> None:
    world.workers_clock += 7_200
    world.there.beat("w")
    assert world.look() == "in doubt"
    world.workers_clock -= 3_600
    for _ in range(4):
        world.wait(CONFIRM / 2 - 1)
        world.there.beat("w")
        assert world.look() != "dead"


def test_all_of_them_are_listed_until_they_are_forgotten(world: World) -> None:
    world.there.beat("old", {"where": "somewhere"})
    world.there.gone("ended")
    world.wait(7 * 24 * 3_600 + 1)
    world.there.beat("w", {"work": []})
    assert {last.worker_id: last.gone for last in world.here.last()} == {"old": False, "ended": True, "w": False}
    world.here.forget_the_long_dead()
    (left,) = world.here.last()
    assert (left.worker_id, left.at, left.facts) == ("w", world.workers_clock, {"work": []})


def test_workers_that_are_dead_for_long_take_no_memory(world: World) -> None:
    for number in range(3):
        world.there.beat(f"w-{number}")
    world.wait(DEAD_AFTER)
    assert world.here.living() == []
    assert len(world.here._suspects) == 3
    world.wait(8 * 24 * 3_600)
    world.here.forget_the_long_dead()
    assert world.here.living() == []
    assert world.here._suspects == {}


def test_long_names_are_told_apart_by_what_mysql_has_of_a_key(world: World) -> None:
    """Its unique index has 64 characters: of two lives of a worker on a host with a long name the key was the same."""
    first, second = (f"ip-10-0-112-123.eu-central-1.compute.internal-{life}" for life in ("1a2b3c4d", "5e6f7a8b"))
    world.there.beat(first, {"where": "here"})
    world.there.gone(second)
    keys = values_under(world.instance, "dagster-taskiq/heartbeat/")
    assert len({key[:64] for key in keys}) == 2
    assert world.here.look({first, second, "w"}) == ({first}, {"w"})
    assert [(beat.worker_id, dict(beat.facts)) for beat in world.here.living()] == [(first, {"where": "here"})]
    assert {beat.worker_id for beat in world.here.last()} == {first, second}
    world.wait(8 * 86_400)
    world.here.forget_the_long_dead()
    assert world.here.last() == []
