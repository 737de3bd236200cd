"""How many runs may be in progress at a time, of each route and of all together? Pure: knows slots and counts.

What is handed over fills the slots of a route's workers, and `look_ahead` runs more wait in its queue. A worker of
several routes has its slots once, but any of its routes may have them all. No route waits for another one: the runs
that a route has too many of (its workers have died) take no room from the others.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.storage.slots import WorkerSlots


@dataclass(frozen=True, slots=True)
class RunsOfRoute:
    """Runs of one route that are not over."""

    queued: int = 0
    handed_over: int = 0
    """STARTING: sent, and not known to be at work."""
    at_work: int = 0
    """STARTED or CANCELING."""

    @property
    def in_progress(self) -> int:
        """What Dagster counts against the limits of its run queue."""
        return self.handed_over + self.at_work


@dataclass(frozen=True, slots=True)
class RouteRoom:
    """One route's share."""

    runs: RunsOfRoute
    slots: int
    """Of all living workers that serve it."""
    limit: int
    """So many of its runs may be in progress."""
    is_configured: bool
    """The limit is one that the configuration names, and there are more slots than that."""


@dataclass(frozen=True, slots=True)
class Room:
    """By route, and for all together."""

    total: int
    routes: Mapping[str, RouteRoom] = field(default_factory=dict)

    @property
    def in_use(self) -> bool:
        """Whether there are routes with names."""
        return any(route != DEFAULT_ROUTE for route in self.routes)


def room_of(
    routes: Iterable[str],
    workers: Iterable[WorkerSlots],
    runs: Mapping[str, RunsOfRoute],
    look_ahead: int,
    bounds: Mapping[str, int],
) -> Room:
    """`routes`: those that have no worker and no run among them. `bounds`: configured limits, by route."""
    workers = tuple(workers)
    known = {DEFAULT_ROUTE, *routes, *runs, *(route for worker in workers for route in worker.routes)}
    found: dict[str, RouteRoom] = {}
    for together in _sharing(known, workers):
        slots = sum(worker.runs for worker in workers if worker.routes & together)
        free = max(0, slots - sum(_runs(runs, route).at_work for route in together))
        for route in together:
            own = sum(worker.runs for worker in workers if route in worker.routes)
            # Where routes share workers, what one of them has at work is no slot of the others.
            limit = min(own, _runs(runs, route).at_work + free) + look_ahead
            bound = bounds.get(route, limit)
            found[route] = RouteRoom(_runs(runs, route), own, min(limit, bound), bound < limit)
    surplus = sum(max(0, one.runs.in_progress - one.limit) for one in found.values())
    total = sum(worker.runs for worker in workers) + look_ahead * len(known) + surplus
    return Room(total, {route: found[route] for route in sorted(found)})


def _runs(runs: Mapping[str, RunsOfRoute], route: str) -> RunsOfRoute:
    return runs.get(route, RunsOfRoute())


def _sharing(known: Iterable[str], workers: Iterable[WorkerSlots]) -> list[frozenset[str]]:
    """The routes, those together that share a worker, directly or by way of others."""
    groups = [frozenset({route}) for route in known]
    for worker in workers:
        joined: frozenset[str] = frozenset().union(*(group for group in groups if group & worker.routes))
        groups = [group for group in groups if not group & worker.routes]
        if joined:
            groups.append(joined)
    return groups
