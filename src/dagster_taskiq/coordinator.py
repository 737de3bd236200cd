"""Dagster's run queue, which hands over to SQS only what a living worker has a slot for.

Knows the configuration and Dagster's run queue; the slots come from `storage/slots.py`.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, Field, IntSource, QueuedRunCoordinator

from dagster_taskiq._time_limit import CALL_S
from dagster_taskiq.dagster_compat.api import ConfigurableClassData, RunQueueConfig, SubmitRunContext
from dagster_taskiq.dagster_compat.cancelable import let_starting_runs_be_terminated
from dagster_taskiq.dagster_compat.connections import bounded_calls
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.metrics import OLDEST_WAITS, RUN_SLOTS, RUNS_HELD, RUNS_WAITING, Metrics, on_ecs
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.fleet import Hold, HoldWatch
from dagster_taskiq.storage.hold_notes import HoldNotes
from dagster_taskiq.storage.queue_ttl import QueueTTL
from dagster_taskiq.storage.slots import RunSlots
from dagster_taskiq.storage.tags import drop_copied_tags
from dagster_taskiq.storage.waiting import WaitNotes, waiting_runs

logger = logging.getLogger(__name__)

DEFAULT_LOOK_AHEAD: Final = 1
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

    It takes everything that `QueuedRunCoordinator` takes. `max_concurrent_runs` stays an upper bound, and has no
    default. It needs `TaskiqRunLauncher`, whose settings say when a worker is dead.
    """

    def __init__(
        self,
        look_ahead: int = DEFAULT_LOOK_AHEAD,
        max_concurrent_runs: int | None = None,
        dequeue_interval_seconds: int | None = None,
        inst_data: ConfigurableClassData | None = None,
        **queued: Any,
    ) -> None:
        """Raises `SettingsError`.

        `look_ahead`: so many runs more than there are slots are handed over. At least one, so that a fleet without
        workers gets a message to wake up for; and a slot that becomes free has its next run at once.
        """
        if look_ahead < 1:
            raise SettingsError(f"look_ahead must be at least 1, not {look_ahead}: a fleet without workers needs it")
        let_starting_runs_be_terminated()
        super().__init__(
            max_concurrent_runs=_NO_LIMIT if max_concurrent_runs is None else max_concurrent_runs,
            dequeue_interval_seconds=_DEQUEUE_EVERY_S if dequeue_interval_seconds is None else dequeue_interval_seconds,
            inst_data=inst_data,
            **queued,
        )
        self._look_ahead = look_ahead
        self._dequeues = False
        self._known_slots: RunSlots | None = None
        self._known_ttl: QueueTTL | None = None
        self._known_notes: WaitNotes | None = None
        self._known_hold: tuple[HoldWatch, HoldNotes] | None = None
        self._known_metrics: Metrics | None = None
        self._measured_at = 0.0

    @classmethod
    def config_type(cls) -> Any:
        """The schema of `QueuedRunCoordinator`, and `look_ahead`."""
        look_ahead = Field(
            IntSource,
            is_required=False,
            default_value=DEFAULT_LOOK_AHEAD,
            description="How many runs more than there are free slots are handed over to the queue; at least 1.",
        )
        return {**super().config_type(), "look_ahead": look_ahead}  # type: ignore[dict-item]

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
    def dequeue_interval_seconds(self) -> int:
        """How often the daemon looks at the queue, in seconds.

        Dagster asks for it once, where it makes the daemon that hands runs over: in this process slots count.
        """
        if not self._dequeues:
            self._dequeues = True
            logging.getLogger(_LOGGER_OF_THE_DAEMON).addFilter(_OnceAMinute())
        return super().dequeue_interval_seconds

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        """Put the run into Dagster's queue. Raises `SettingsError` when this instance is configured wrongly."""
        self.check()
        try:
            drop_copied_tags(self._instance, context.dagster_run)
        except Exception:  # they do not count, they are only seen
            logger.exception("tags could not be removed", extra={"run_id": context.dagster_run.run_id})
        run = super().submit_run(context)
        self.check().superseding().look(run)
        return run

    def get_run_queue_config(self) -> RunQueueConfig:
        """The limits of Dagster's run queue; in its daemon `max_concurrent_runs` is at most slots plus look-ahead.

        Dagster counts runs that are STARTING, STARTED and CANCELING against it: what a worker is at work on, and what
        has been handed over. Elsewhere (every run's own process asks for the limits of pools here) it is the configured
        limit, and costs nothing. While the fleet is held the number is 0. Raises `SettingsError`.
        """
        config = super().get_run_queue_config()
        if not self._dequeues:
            return config
        with bounded_calls(self._instance, CALL_S):
            self._queue_ttl().look()
            hold, slots = self._look_for_hold(), self._slots().count()
            self._measure(slots, hold)
            if hold is None:
                self._notes().write()
        limit = slots + self._look_ahead if hold is None else 0
        if config.max_concurrent_runs != _NO_LIMIT:
            limit = min(limit, config.max_concurrent_runs)
        return config._replace(max_concurrent_runs=limit)

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

    def _slots(self) -> RunSlots:
        if self._known_slots is None:
            self._known_slots = RunSlots(self._instance, self.check().settings)
        return self._known_slots

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

    def _measure(self, slots: int, hold: Hold | None) -> None:
        metrics = self._metrics()
        if not metrics.wanted or time.monotonic() - self._measured_at < _MEASURE_EVERY_S:
            return
        self._measured_at = time.monotonic()
        try:
            waiting = waiting_runs(self._instance)
        except Exception:  # a number that is missing must not keep runs from being launched
            logger.exception("waiting runs could not be counted")
            return
        # A fleet is scaled on the runs that wait. More workers would not help those that are held.
        waits, held = (waiting.count, 0) if hold is None else (0, waiting.count)
        metrics.put({RUNS_WAITING: waits, RUNS_HELD: held, OLDEST_WAITS: waiting.oldest_s, RUN_SLOTS: slots})
