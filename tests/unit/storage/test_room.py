"""How many runs may be in progress, by route and together."""

from dagster_taskiq.storage.room import Room, RunsOfRoute, room_of
from dagster_taskiq.storage.slots import WorkerSlots


def worker(slots: int, *routes: str) -> WorkerSlots:
    return WorkerSlots(frozenset(routes or ("default",)), slots)


def room(*workers: WorkerSlots, bounds: dict[str, int] | None = None, **runs: RunsOfRoute) -> Room:
    return room_of((), workers, runs, 1, bounds or {})


def limits(found: Room) -> dict[str, int]:
    return {route: one.limit for route, one in found.routes.items()}


def test_without_named_routes_it_is_all_slots_and_the_look_ahead() -> None:
    found = room(worker(4), worker(2))
    assert (found.total, limits(found), found.in_use) == (7, {"default": 7}, False)


def test_each_route_has_the_slots_of_its_workers_and_one_without_workers_the_look_ahead() -> None:
    found = room(worker(4), worker(2, "gpu"), big=RunsOfRoute(queued=3))
    assert (found.total, limits(found)) == (9, {"big": 1, "default": 5, "gpu": 3})


def test_a_worker_of_two_routes_counts_for_each_and_once_in_the_total() -> None:
    found = room(worker(4, "gpu", "default"))
    assert (found.total, limits(found)) == (6, {"default": 5, "gpu": 5})


def test_slots_that_one_route_has_taken_are_no_slots_of_the_other_one() -> None:
    found = room(worker(4, "gpu", "default"), default=RunsOfRoute(at_work=4))
    assert limits(found) == {"default": 5, "gpu": 1}
    found = room(worker(4, "gpu", "default"), gpu=RunsOfRoute(at_work=1), default=RunsOfRoute(at_work=1))
    assert limits(found) == {"default": 4, "gpu": 4}


def test_the_runs_of_dead_workers_take_no_room_from_other_routes() -> None:
    found = room(worker(4), gpu=RunsOfRoute(at_work=16), default=RunsOfRoute(at_work=2))
    assert limits(found) == {"default": 5, "gpu": 1}
    assert found.total - 18 == 3, "for the other three of default"


def test_a_third_route_gets_its_look_ahead_although_the_shared_slots_are_taken() -> None:
    gpu, default = RunsOfRoute(at_work=3, handed_over=2), RunsOfRoute(at_work=1, handed_over=1)
    found = room(worker(4, "urgent", "gpu", "default"), gpu=gpu, default=default)
    assert limits(found)["urgent"] == 1
    assert found.total > 7


def test_a_configured_limit_is_an_upper_bound() -> None:
    found = room(worker(4, "gpu"), worker(2), bounds={"gpu": 2, "default": 9})
    assert limits(found) == {"default": 3, "gpu": 2}
    assert (found.routes["gpu"].is_configured, found.routes["default"].is_configured) == (True, False)
