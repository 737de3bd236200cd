"""A hold on the fleet, and requests to stop: as they are stored, noted in logs, and found again by name."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from tests.unit.storage.test_waiting import SETTINGS

from dagster_taskiq.cli.fleet import _of_routes
from dagster_taskiq.dagster_compat.storage import put_value, values_under
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.storage.fleet import (
    HOLD_KEY,
    Hold,
    HoldWatch,
    StopRequest,
    ask_to_stop,
    forget_old_stops,
    hold_fleet,
    read_hold,
    release_fleet,
    stop_key,
)
from dagster_taskiq.storage.fleet_state import look_at_fleet
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.hold_notes import HoldNotes
from dagster_taskiq.storage.stop_workers import find_worker, look_at_stops
from dagster_taskiq.storage.tags import ROUTE_TAG
from dagster_taskiq.storage.waiting import describe_wait, describe_waiting
from dagster_taskiq.storage.workers import list_workers


@dataclass
class World:
    instance: DagsterInstance

    def run(self, status: DagsterRunStatus = DagsterRunStatus.STARTING, route: str | None = None) -> DagsterRun:
        tags = {ROUTE_TAG: route} if route is not None else {}
        run: DagsterRun = create_run_for_test(self.instance, status=status, tags=tags)
        return run

    def beat(self, worker: str, *, ago: float = 0.0, **facts: Any) -> None:
        at = time.time() - ago
        Heartbeats(self.instance, 30, 10, clock=lambda: at).beat(worker, {"slots": [1, 4], **facts})

    def notes(self, run: DagsterRun) -> list[str]:
        events = [entry.dagster_event for entry in self.instance.all_logs(run.run_id)]
        return [event.message or "" for event in events if event is not None and event.is_engine_event]

    def find(self, given: str) -> str:
        return find_worker(list_workers(self.instance, SETTINGS, everybody=True), given).worker_id


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_a_second_hold_changes_the_reason_of_the_first(world: World) -> None:
    first = hold_fleet(world.instance, reason="migration", by="ada")
    second = hold_fleet(world.instance, reason="still\n\x1b[31mmigrating", by="bob")
    assert (second.since, second.by) == (first.since, "bob")
    assert read_hold(world.instance) == second
    assert second.described().endswith(" UTC: still [31mmigrating"), "nothing that a terminal would obey"
    assert release_fleet(world.instance) == second
    assert release_fleet(world.instance) is None
    assert read_hold(world.instance) is None


def test_a_heartbeat_brings_back_what_people_want(world: World) -> None:
    beats, asks = Heartbeats(world.instance, 30, 10), [HOLD_KEY, stop_key("w")]
    assert beats.beat("w", asks=asks) == {}
    hold = hold_fleet(world.instance, reason="migration", by="ada")
    request = StopRequest(time.time(), "ada", "a larger machine", finish=True)
    ask_to_stop(world.instance, "w", request)
    found = beats.beat("w", asks=asks)
    assert Hold.parse(found[HOLD_KEY]) == hold
    assert StopRequest.parse(found[stop_key("w")]) == request
    assert list(beats.beat("another", asks=[HOLD_KEY, stop_key("another")])) == [HOLD_KEY]


def test_a_request_that_nobody_has_heard_is_forgotten_after_a_week(world: World) -> None:
    week = 7 * 24 * 3_600
    ask_to_stop(world.instance, "old", StopRequest(time.time() - week - 1, "ada"))
    ask_to_stop(world.instance, "new", StopRequest(time.time() - week + 60, "ada"))
    forget_old_stops(world.instance)
    assert list(values_under(world.instance, stop_key(""))) == [stop_key("new")]


def test_who_looks_for_a_hold_believes_the_last_answer(world: World) -> None:
    watch = HoldWatch(world.instance)
    assert watch.look() is None
    hold = hold_fleet(world.instance, reason="migration", by="ada")
    assert watch.look() == hold
    put_value(world.instance, HOLD_KEY, "of a later version")
    assert watch.look() == hold
    put_value(world.instance, HOLD_KEY, "{}")
    assert release_fleet(world.instance) is not None
    assert watch.look() is None


def test_each_run_that_waits_is_told_once_of_a_hold(world: World) -> None:
    clock = 0.0

    def daemon() -> HoldNotes:
        return HoldNotes(world.instance, clock=lambda: clock)

    before, at_work = world.run(), world.run(DagsterRunStatus.STARTED)
    hold = hold_fleet(world.instance, reason="migration", by="ada")
    for notes in (daemon(), daemon()):  # it was started again
        for _ in range(3):
            notes.write(hold)
            clock += 3
    after = world.run()
    notes.write(hold)
    assert world.notes(at_work) == []
    (line,) = world.notes(before)
    assert line == f"not begun: {hold.described()}. What waits begins after: dagster-taskiq fleet release"
    assert world.notes(after) == [line]
    again = Hold(hold.since + 60, "bob", "once more")
    clock += 3
    notes.write(again)
    assert [len(world.notes(run)) for run in (before, after)] == [2, 2]


def test_it_is_said_why_runs_wait(world: World) -> None:
    run = world.run()
    hold = hold_fleet(world.instance, reason="migration", by="ada")
    assert describe_wait(world.instance, SETTINGS, run.run_id).endswith(f"; {hold.described()}")
    said = describe_waiting(world.instance, SETTINGS, list_workers(world.instance, SETTINGS), hold)
    assert said == ["1 run waits, for 0 s: the fleet is held"]


def test_the_state_names_those_that_do_not_know(world: World) -> None:
    run = world.run(DagsterRunStatus.STARTED)
    for _ in range(2):
        world.run()
    work = [[run.run_id, None, time.time()], [run.run_id, "a_step", time.time()]]
    hold = hold_fleet(world.instance, reason="migration", by="ada")
    world.beat("knows", held=hold.since, work=work)
    world.beat("knows of an older one", held=hold.since - 60)
    world.beat("is dead", ago=3_600)
    state = look_at_fleet(world.instance, SETTINGS)
    assert state.not_heard == ["knows of an older one"]
    assert (state.runs, state.steps, state.runs_waiting, state.handed_over) == (1, 1, 2, 2)
    assert not state.is_idle
    world.beat("knows", held=hold.since)
    world.beat("knows of an older one", held=hold.since)
    assert look_at_fleet(world.instance, SETTINGS).is_idle


def test_the_state_of_each_route(world: World) -> None:
    begun, working = world.run(route="gpu"), world.run(DagsterRunStatus.STARTED)
    for route in ("gpu", "gpu", "big", None):
        world.run(route=route)
    work = [[begun.run_id, None, time.time()], [working.run_id, "on_gpu", time.time()]]
    world.beat("both", routes=["gpu", "default"], work=work, work_routes=[None, "gpu"])
    world.beat("small", work=[[working.run_id, None, time.time()], [working.run_id, "a_step", time.time()]])
    state = look_at_fleet(world.instance, SETTINGS)
    assert (state.runs, state.steps, state.runs_waiting) == (2, 2, 4)
    assert list(_of_routes(state)) == [
        "route default: 2 workers, at work: 1 run, 1 step; runs that wait: 1",
        "route big: no worker; runs that wait: 1",
        "route gpu: 1 worker, at work: 1 run, 1 step; runs that wait: 2",
    ]
    assert state.to_json()["routes"]["gpu"] == {
        "workers": ["both"],
        "at_work": {"runs": 1, "steps": 1},
        "runs_waiting": 2,
    }


def test_what_is_at_work_is_counted_once(world: World) -> None:
    """Of a worker that does not say on which route a step has come, it is counted for that of its run."""
    run = world.run(DagsterRunStatus.STARTED, "gpu")
    work = [[run.run_id, None, time.time()], [run.run_id, "a_step", time.time()]]
    world.beat("older", routes=["default", "gpu", "big"], work=work)
    world.beat("one", routes=["big"], work=[[run.run_id, "another", time.time()], ["deleted", "x", time.time()]])
    state = look_at_fleet(world.instance, SETTINGS)
    assert (state.runs, state.steps) == (1, 3)
    counted = {route: (one.runs, one.steps) for route, one in state.routes.items()}
    assert counted == {"default": (0, 0), "big": (0, 2), "gpu": (1, 1)}


def test_without_named_routes_none_is_spoken_of(world: World) -> None:
    world.run()
    world.beat("w")
    state = look_at_fleet(world.instance, SETTINGS)
    assert list(_of_routes(state)) == []
    assert list(state.to_json()["routes"]) == ["default"]


def test_a_worker_is_found_by_its_id_or_by_the_name_of_one_that_is_alive(world: World) -> None:
    world.beat("loader-aaaaaaaa", ago=3_600)
    world.beat("loader-bbbbbbbb")
    world.beat("loader-2-cccccccc")
    assert world.find("loader") == world.find("loader-bbbbbbbb") == "loader-bbbbbbbb"
    assert world.find("loader-2") == "loader-2-cccccccc"
    world.beat("loader-dddddddd")
    with pytest.raises(DagsterTaskiqError, match="2 workers are called loader: loader-bbbbbbbb, loader-dddddddd; give"):
        world.find("loader")
    with pytest.raises(DagsterTaskiqError, match=r"worker loader-aaaaaaaa is dead, last heard of 3600 s ago; nothing"):
        world.find("loader-aaaaaaaa")
    with pytest.raises(DagsterTaskiqError, match="no worker is called load; those that there are"):
        world.find("load")


def test_what_has_become_of_a_request(world: World) -> None:
    stopping = {"at": time.time(), "by": "ada", "reason": None, "until": time.time() + 15}
    world.beat("a", stopping=stopping)
    world.beat("b", stopping={**stopping, "until": None})
    world.beat("c")
    world.beat("d", ago=3_600, stopping=stopping)
    Heartbeats(world.instance, 30, 10).gone("e")

    def outcomes(*, finish: bool) -> list[str]:
        return [stop.outcome for stop in look_at_stops(world.instance, SETTINGS, "abcde", finish=finish)]

    run = world.run(DagsterRunStatus.STARTED)
    work = [[run.run_id, None, time.time()]]
    world.beat("a", stopping=stopping, work=work)
    world.beat("c", work=work)
    world.instance.report_run_canceled(run)  # by force: its process goes on
    found = look_at_stops(world.instance, SETTINGS, "abcde", finish=True)
    assert [stop.at_work for stop in found] == [1, 0, None, 0, 0], "c may have begun something else"
    assert outcomes(finish=True) == ["draining", "finishing", "asked", "dead", "ended"]
    assert outcomes(finish=False) == ["draining", "asked", "asked", "dead", "ended"], "b has heard that it may finish"
