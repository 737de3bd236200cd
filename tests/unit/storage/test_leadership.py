"""One worker at a time does what only one has to do; and another one, when that one is gone."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from dagster import DagsterInstance

from dagster_taskiq.storage.leadership import Leadership

LAPSES = 150.0


@dataclass
class World:
    instance: DagsterInstance
    now: float = 1000.0
    workers: dict[str, Leadership] = field(default_factory=dict)

    def worker(self, name: str) -> Leadership:
        return self.workers.setdefault(
            name, Leadership(self.instance, "reconcile", name, LAPSES, monotonic=lambda: self.now)
        )

    def leaders(self, *names: str) -> list[str]:
        return [name for name in names if self.worker(name).take()]


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_the_first_one_has_it_and_keeps_it(world: World) -> None:
    for _ in range(10):
        assert world.leaders("a", "b", "c") == ["a"]
        world.now += 60


def test_one_that_is_gone_is_followed_by_another_and_finds_that_out(world: World) -> None:
    assert world.leaders("a", "b", "c") == ["a"]
    for _ in range(2):
        world.now += 60
        assert world.leaders("b", "c") == []
    world.now += 60
    assert world.leaders("b", "c") == ["b"]
    assert world.leaders("a", "b", "c") == ["b"], "it was only late"


def test_one_that_ends_lets_the_next_one_have_it_at_once(world: World) -> None:
    assert world.leaders("a", "b") == ["a"]
    world.worker("a").resign()
    assert world.leaders("b", "a") == ["b"]
    world.worker("a").resign()
    assert world.leaders("b", "a") == ["b"], "it was no longer its own to give"


def test_one_whose_change_was_stored_although_it_was_told_otherwise(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks after the commit: its own row is a stranger's to it, and lapses as one."""
    assert world.leaders("a") == ["a"]
    with monkeypatch.context() as patch:
        patch.setattr("dagster_taskiq.storage.leadership.replace_value", broken_after_the_commit)
        with pytest.raises(ConnectionResetError):
            world.worker("a").take()
    assert world.leaders("a", "b") == []
    world.now += LAPSES
    assert world.leaders("a", "b") == ["a"]


def broken_after_the_commit(instance: DagsterInstance, key: str, old: str, new: str) -> bool:
    from dagster_taskiq.dagster_compat.key_values import replace_value

    assert replace_value(instance, key, old, new)
    raise ConnectionResetError


def test_one_that_cannot_do_it_does_not_take_it_back_for_a_while(world: World) -> None:
    assert world.leaders("a", "b") == ["a"]
    world.worker("a").resign(100)
    assert world.leaders("a") == []
    world.now += 99
    assert world.leaders("a") == [], "the others look less often than it does"
    assert world.leaders("b") == ["b"]
    world.worker("b").resign()
    world.now += 1
    assert world.leaders("a") == ["a"]
