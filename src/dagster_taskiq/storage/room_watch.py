"""How many runs of each route may be in progress now? Asked again and again by Dagster's daemon.

Knows Dagster's runs, their tags, and the slots of workers; `room.py` has the arithmetic. All calls block on the
database.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq.dagster_compat.run_counts import TaggedCount, count_by_tag, without_tag
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.queue_names import DEFAULT_ROUTE, is_route
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.room import Room, RunsOfRoute, room_of
from dagster_taskiq.storage.routing import Routing
from dagster_taskiq.storage.slots import RunSlots
from dagster_taskiq.storage.tags import ROUTE_TAG, add_own_tags

logger = logging.getLogger(__name__)

_UNUSED_FOR_S: Final = 5.0
"""How often to look whether a run is of a route with a name, as long as nothing else speaks of one."""
_TAGGED_AT_ONCE: Final = 100
_AT_WORK: Final = (DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING)
_STATUSES: Final = (DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING, *_AT_WORK)


class RoomWatch:
    """Keep the object: it remembers what it has seen."""

    def __init__(self, instance: DagsterInstance, settings: Settings, look_ahead: int) -> None:
        self._instance = instance
        self._settings = settings
        self._look_ahead = look_ahead
        self._slots = RunSlots(instance, settings)
        self._counted_at = float("-inf")
        self._runs: Mapping[str, RunsOfRoute] = {}
        self._untagged = RunsOfRoute()
        self._unroutable = 0
        """How many of the runs that wait cannot be given a route, by the last look at them."""

    def look(self, bounds: Mapping[str, int]) -> Room:
        """Limits by route, and for all together. `bounds`: configured limits, by route. Never raises.

        As long as no route with a name is in use, by a rule, a limit, a worker or a run, it is one limit for all, and
        the runs are counted every few seconds only. When they cannot be counted, it goes on with what it knew.
        """
        workers = self._slots.of_workers()
        named = {*bounds, *(rule.route for rule in self._settings.routes)}
        named |= {route for worker in workers for route in worker.routes if route != DEFAULT_ROUTE}
        if named or self._named_runs() or time.monotonic() - self._counted_at > _UNUSED_FOR_S:
            self._count()
        named |= self._named_runs()
        return room_of(named, workers, self._runs if named else {}, self._look_ahead, bounds)

    def limits_of_tags(self, room: Room) -> list[dict[str, Any]]:
        """The same for Dagster's run queue, which counts by the runs' tag; none while no route is in use.

        What was launched before has no tag, and is of the unnamed route.
        """
        if not room.in_use:
            return []
        limits = {route: one.limit for route, one in room.routes.items()}
        limits[DEFAULT_ROUTE] = max(0, limits[DEFAULT_ROUTE] - self._untagged.in_progress)
        return [{"key": ROUTE_TAG, "value": route, "limit": limit} for route, limit in limits.items()]

    def tag_what_waits(self, routing: Routing) -> None:
        """Tag the runs that have come into the queue before routes were in use; a hundred at a time. Never raises."""
        if not self._untagged.queued:
            self._unroutable = 0
        if self._untagged.queued == self._unroutable:
            return
        try:
            found = without_tag(self._instance, ROUTE_TAG, DagsterRunStatus.QUEUED, _TAGGED_AT_ONCE)
            runs = self._instance.get_runs(RunsFilter(run_ids=found)) if found else ()
            self._unroutable = sum(not self._tag(run, routing) for run in runs)
        except Exception:
            logger.exception("runs that wait could not be given their route")

    def _tag(self, run: DagsterRun, routing: Routing) -> bool:
        """Whether it has a route."""
        try:
            route = routing.route_for(run)
        except SettingsError:  # it fails when it is launched, with this reason
            return False
        add_own_tags(self._instance, run, {ROUTE_TAG: route})
        return True

    def _named_runs(self) -> set[str]:
        return {route for route in self._runs if route != DEFAULT_ROUTE}

    def _count(self) -> None:
        try:
            counts = count_by_tag(self._instance, ROUTE_TAG, _STATUSES)
        except Exception as error:  # noqa: BLE001 - whatever the storage raises
            logger.warning("the runs of each route cannot be counted: %r", error)
            return
        self._counted_at = time.monotonic()
        self._runs, self._untagged = _by_route(counts), _together(one for one in counts if one.value is None)


def _by_route(counts: Iterable[TaggedCount]) -> Mapping[str, RunsOfRoute]:
    found: dict[str, list[TaggedCount]] = {}
    for one in counts:
        found.setdefault(one.value if is_route(one.value) and one.value else DEFAULT_ROUTE, []).append(one)
    return {route: _together(some) for route, some in found.items()}


def _together(counts: Iterable[TaggedCount]) -> RunsOfRoute:
    by_status = Counter[DagsterRunStatus]()
    for one in counts:
        by_status[one.status] += one.count
    return RunsOfRoute(
        queued=by_status[DagsterRunStatus.QUEUED],
        handed_over=by_status[DagsterRunStatus.STARTING],
        at_work=sum(by_status[status] for status in _AT_WORK),
    )
