"""Dagster's run queue, which hands over to SQS only what a living worker has a slot for.

Knows the configuration and Dagster's run queue; what is to be handed over comes from `storage/room_watch.py`.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, Field, IntSource, Map, QueuedRunCoordinator

from dagster_taskiq._route_rules import route_of
from dagster_taskiq._time_limit import CALL_S
from dagster_taskiq.dagster_compat.api import ConfigurableClassData, RunQueueConfig, SubmitRunContext
from dagster_taskiq.dagster_compat.cancelable import let_starting_runs_be_terminated
from dagster_taskiq.dagster_compat.connections import bounded_calls
from dagster_taskiq.dagster_compat.run_queue import MoreLimits
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.metrics import OLDEST_WAITS, RUN_SLOTS, RUNS_HELD, RUNS_WAITING, Metrics, on_ecs
from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.fleet import Hold, HoldWatch
from dagster_taskiq.storage.hold_notes import HoldNotes
from dagster_taskiq.storage.queue_ttl import QueueTTL
from dagster_taskiq.storage.room import Room
from dagster_taskiq.storage.room_watch import RoomWatch
from dagster_taskiq.storage.tags import ROUTE_TAG, add_own_tags, drop_copied_tags
from dagster_taskiq.storage.waiting import WaitingRuns, WaitNotes, waiting_by_route

logger = logging.getLogger(__name__)

DEFAULT_LOOK_AHEAD: Final = 1
_BY_ROUTE: Final = "max_concurrent_runs_by_route"
_NO_LIMIT: Final = -1
_DEQUEUE_EVERY_S: Final = 1
_REPEATED_AFTER_S: Final = 60
_LOGGER_OF_THE_DAEMON: Final = "dagster.daemon.QueuedRunCoordinatorDaemon"
_MEASURE_EVERY_S: Final = 30
"""Twice in each minute, the period of the alarms, so that none is without a value."""


class _OnceAMinute(logging.Filter):
    """Dagster's daemon would write the same line every second, as long as all slots are busy."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[str, float] = ("", 0.0)

    def filter(self, record: logging.LogRecord) -> bool:
        text, said_at = self._last
        if record.getMessage() == text and record.created - said_at < _REPEATED_AFTER_S:
            return False
        self._last = (record.getMessage(), record.created)
        return True


class TaskiqRunCoordinator(QueuedRunCoordinator[DagsterInstance]):
    """Keeps runs QUEUED until a living worker has a free slot, so that all that waits can be ended in Dagster's UI.

    .. code-block:: yaml

        run_coordinator:
          module: dagster_taskiq.coordinator
          class: TaskiqRunCoordinator
          config:
            look_ahead: 1
            max_concurrent_runs_by_route: {gpu: 2}

    It takes everything that `QueuedRunCoordinator` takes. `max_concurrent_runs` stays an upper bound, and has no
    default. Each route has slots, and a limit, of its own, so that none waits for another one. It needs
    `TaskiqRunLauncher`, whose settings say when a worker is dead.
    """

    def __init__(
        self,
        look_ahead: int = DEFAULT_LOOK_AHEAD,
        max_concurrent_runs: int | None = None,
        max_concurrent_runs_by_route: Mapping[str, int] | None = None,
        dequeue_interval_seconds: int | None = None,
        inst_data: ConfigurableClassData | None = None,
        **queued: Any,
    ) -> None:
        """Raises `SettingsError`.

        `look_ahead`: so many runs more than there are slots are handed over, of each route. At least one, so that a
        fleet without workers gets a message to wake up for; and a slot that becomes free has its next run at once.
        `max_concurrent_runs_by_route`: so many runs of a route are in progress at most.
        """
        if look_ahead < 1:
            raise SettingsError(f"look_ahead must be at least 1, not {look_ahead}: a fleet without workers needs it")
        bounds = {route_of(_BY_ROUTE, route): limit for route, limit in (max_concurrent_runs_by_route or {}).items()}
        if any(limit < 0 for limit in bounds.values()):
            raise SettingsError(f"{_BY_ROUTE}: a limit must be at least 0, not {min(bounds.values())}")
        let_starting_runs_be_terminated()
        super().__init__(
            max_concurrent_runs=_NO_LIMIT if max_concurrent_runs is None else max_concurrent_runs,
            dequeue_interval_seconds=_DEQUEUE_EVERY_S if dequeue_interval_seconds is None else dequeue_interval_seconds,
            inst_data=inst_data,
            **queued,
        )
        self._look_ahead = look_ahead
        self._bounds: Mapping[str, int] = bounds
        self._dequeues = False
        self._known_room: tuple[RoomWatch, MoreLimits] | None = None
        self._known_ttl: QueueTTL | None = None
        self._known_notes: WaitNotes | None = None
        self._known_hold: tuple[HoldWatch, HoldNotes] | None = None
        self._known_metrics: Metrics | None = None
        self._measured_at = 0.0
        self._measured: set[str] = {DEFAULT_ROUTE}

    @classmethod
    def config_type(cls) -> Any:
        """The schema of `QueuedRunCoordinator`, `look_ahead` and `max_concurrent_runs_by_route`."""
        look_ahead = Field(
            IntSource,
            is_required=False,
            default_value=DEFAULT_LOOK_AHEAD,
            description="How many runs more than there are free slots are handed over to the queue, of each route;"
            " at least 1.",
        )
        by_route = Field(
            Map(str, int),  # type: ignore[no-untyped-call]
            is_required=False,
            description="How many runs of a route may be in progress at a time, by route, as in {gpu: 2}.",
        )
        own = {"look_ahead": look_ahead, _BY_ROUTE: by_route}
        return {**super().config_type(), **own}  # type: ignore[dict-item]

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "TaskiqRunCoordinator":
        """Called by Dagster with the checked configuration."""
        return cls(inst_data=inst_data, **config_value)

    @property
    def look_ahead(self) -> int:
        """How many runs more than there are slots are handed over."""
        return self._look_ahead

    @property
    def max_concurrent_runs_by_route(self) -> Mapping[str, int]:
        """The configured limits, by route."""
        return self._bounds

    @property
    def dequeue_interval_seconds(self) -> int:
        """How often the daemon looks at the queue, in seconds.

        Dagster asks for it once, where it makes the daemon that hands runs over: in this process slots count.
        """
        if not self._dequeues:
            self._dequeues = True
            logging.getLogger(_LOGGER_OF_THE_DAEMON).addFilter(_OnceAMinute())
        return super().dequeue_interval_seconds

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        """Put the run into Dagster's queue, with a tag that says which route it goes to.

        Raises `SettingsError` when this instance is configured wrongly, or a tag asks for what cannot be a route. Then
        Dagster makes the run a FAILURE with that reason, and shows it to whoever has launched it.
        """
        launcher = self.check()
        route = launcher.routing.route_for(context.dagster_run)
        try:
            self._tag(launcher, context.dagster_run, route)
        except Exception:  # tags of another run do not count; and the route is decided again at launch
            logger.exception("tags could not be changed", extra={"run_id": context.dagster_run.run_id})
        run = super().submit_run(context)
        launcher.superseding().look(run)
        return run

    def _tag(self, launcher: TaskiqRunLauncher, run: DagsterRun, route: str) -> None:
        drop_copied_tags(self._instance, run)
        launcher.routing.with_tags_of_job(run)
        if route != DEFAULT_ROUTE or self._bounds or launcher.routing.are_in_use():
            add_own_tags(self._instance, run, {ROUTE_TAG: route})

    def get_run_queue_config(self) -> RunQueueConfig:
        """The limits of Dagster's run queue; in its daemon `max_concurrent_runs` is at most slots plus look-ahead.

        Dagster counts runs that are STARTING, STARTED and CANCELING against it: what a worker is at work on, and what
        has been handed over. Where routes are in use, each has a limit of its own, on the tag `dagster-taskiq/route`.
        Elsewhere (every run's own process asks for the limits of pools here) it is the configured limit, and costs
        nothing. While the fleet is held the number is 0. Raises `SettingsError`.
        """
        config = super().get_run_queue_config()
        if not self._dequeues:
            return config
        with bounded_calls(self._instance, CALL_S):
            self._queue_ttl().look()
            hold, room = self._look_for_hold(), self.look_at_room()
            self._measure(room, hold)
            watch, more = self._room()
            if room.in_use:
                watch.tag_what_waits(self.check().routing)
            if hold is None:
                self._notes().write()
        limit = room.total if hold is None else 0
        if config.max_concurrent_runs != _NO_LIMIT:
            limit = min(limit, config.max_concurrent_runs)
        return more.added_to(config._replace(max_concurrent_runs=limit), watch.limits_of_tags(room))

    def look_at_room(self) -> Room:
        """How many runs may be in progress now, of each route and of all. Blocks on the database, and never raises."""
        watch, more = self._room()
        # Dagster takes the last limit of a tag's value: what users have written for a route is to count beside ours.
        own = more.of_tag(super().get_run_queue_config(), ROUTE_TAG)
        bounds = {route: min(own.get(route, limit), limit) for route, limit in self._bounds.items()}
        return watch.look({**own, **bounds})

    def check(self) -> TaskiqRunLauncher:
        """The launcher that it hands runs over to. Raises `SettingsError` when this instance is configured wrongly."""
        launcher = self._instance.run_launcher
        if not isinstance(launcher, TaskiqRunLauncher):
            raise SettingsError(
                f"TaskiqRunCoordinator needs the run_launcher TaskiqRunLauncher, not {type(launcher).__name__};"
                " correct run_launcher or run_coordinator in dagster.yaml"
            )
        if "max_concurrent_runs" in (self._instance.get_settings("concurrency") or {}).get("runs", {}):
            raise SettingsError(
                "concurrency.runs.max_concurrent_runs in dagster.yaml would replace what TaskiqRunCoordinator"
                " counts; write it as max_concurrent_runs into the config of run_coordinator"
            )
        return launcher

    def _room(self) -> tuple[RoomWatch, MoreLimits]:
        if self._known_room is None:
            watch = RoomWatch(self._instance, self.check().settings, self._look_ahead)
            self._known_room = watch, MoreLimits(self._instance)
        return self._known_room

    def _queue_ttl(self) -> QueueTTL:
        if self._known_ttl is None:
            settings = self.check().settings
            self._known_ttl = QueueTTL(self._instance, settings, Claims.of(self._instance, settings))
        return self._known_ttl

    def _notes(self) -> WaitNotes:
        if self._known_notes is None:
            self._known_notes = WaitNotes(self._instance, self.check().settings)
        return self._known_notes

    def _look_for_hold(self) -> Hold | None:
        """Whether the fleet is held; the runs that wait are told."""
        if self._known_hold is None:
            self._known_hold = HoldWatch(self._instance), HoldNotes(self._instance)
        watch, notes = self._known_hold
        hold = watch.look()
        if hold is not None:
            notes.write(hold)
        return hold

    def _metrics(self) -> Metrics:
        """Those of Dagster's daemon, which alone dequeues."""
        if self._known_metrics is None:
            settings = self.check().settings
            self._known_metrics = Metrics.chosen(
                settings.metrics, queue_name(settings.queue_url), on_ecs=on_ecs(), stdout_is_a_log=True
            )
        return self._known_metrics

    def _measure(self, room: Room, hold: Hold | None) -> None:
        """What waits, by route: each has a fleet, which grows by the numbers under its own queue's name."""
        metrics = self._metrics()
        if not metrics.wanted or time.monotonic() - self._measured_at < _MEASURE_EVERY_S:
            return
        self._measured_at = time.monotonic()
        try:
            waiting = waiting_by_route(self._instance)
        except Exception:  # a number that is missing must not keep runs from being launched
            logger.exception("waiting runs could not be counted")
            return
        # Also a route that is in use no more: its fleet is to hear that nothing waits.
        self._measured |= {*room.routes, *waiting}
        settings = self.check().settings
        for route in sorted(self._measured):
            runs, slots = waiting.get(route, WaitingRuns(0, 0.0)), room.routes.get(route)
            # A fleet is scaled on the runs that wait. More workers would not help those that are held.
            waits, held = (runs.count, 0) if hold is None else (0, runs.count)
            values = {RUNS_WAITING: waits, RUNS_HELD: held, OLDEST_WAITS: runs.oldest_s}
            of_route = metrics.of_queue(queue_name(settings.of_route(route).queue_url))
            of_route.put({**values, RUN_SLOTS: slots.slots if slots is not None else 0})
