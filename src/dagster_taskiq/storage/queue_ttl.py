"""Runs that may wait only for so long, by their tag, and end instead of being started when they have waited longer.

Counted from the creation of the run to its start. Knows runs and claims; asked by the launcher, by whoever hands runs
over, and by workers before they begin with a run. All calls block on the database.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.cancellation.words import OURSELVES
from dagster_taskiq.dagster_compat.many_runs import can_move_runs
from dagster_taskiq.dagster_compat.tagged_runs import runs_with_tag
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import ignored_time_limit
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.tags import QUEUE_TTL_TAG
from dagster_taskiq.storage.time_limits import in_seconds, seconds_from_tag
from dagster_taskiq.storage.unstarted import NOT_BEGUN, Unstarted, end_handed_over, end_queued

logger = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 5.0
_AT_ONCE: Final = 100
"""Runs that are ended in one look."""


def waited_too_long(instance: DagsterInstance, run: DagsterRun) -> str | None:
    """In words that the run has waited for longer than it may; None: it has not. One query if it has the tag."""
    if QUEUE_TTL_TAG not in run.tags:
        return None
    record = instance.get_run_record_by_id(run.run_id)
    return _too_long(run.tags[QUEUE_TTL_TAG], record.create_timestamp.timestamp()) if record is not None else None


def ttl_of(tags: Mapping[str, str]) -> float | None:
    """How many seconds after its creation a run may begin; None: whenever. A tag that cannot be read is none."""
    try:
        return seconds_from_tag(tags[QUEUE_TTL_TAG]) if QUEUE_TTL_TAG in tags else None
    except SettingsError:
        return None  # its log says so


def _too_long(value: str, created_at: float) -> str | None:
    ttl_s = ttl_of({QUEUE_TTL_TAG: value})
    if ttl_s is None or time.time() - created_at <= ttl_s:
        return None
    return f"waited longer than its queue_ttl_seconds of {in_seconds(ttl_s)}"


def end_of_waiting(settings: Settings, why: str) -> Unstarted:
    """How such a run ends, by the setting `queue_ttl_outcome`."""
    return Unstarted(why, OURSELVES, fails=settings.queue_ttl_outcome == "failure")


def ended_before_launch(claims: Claims, settings: Settings, run: DagsterRun) -> bool:
    """Where a run would be sent to a worker: end it instead, if it has waited too long. Never raises.

    Where its tag cannot be read, its log says so.
    """
    try:
        _warn_of_tag(claims.instance, run)
        why = waited_too_long(claims.instance, run)
        return why is not None and end_handed_over(claims, run.run_id, end_of_waiting(settings, why))
    except Exception:  # whatever it is: a worker looks again before it begins
        logger.exception("cannot look how long a run has waited", extra={"run_id": run.run_id})
        return False


def _warn_of_tag(instance: DagsterInstance, run: DagsterRun) -> None:
    if QUEUE_TTL_TAG in run.tags:
        try:
            seconds_from_tag(run.tags[QUEUE_TTL_TAG])
        except SettingsError as error:
            append_event(instance, run, ignored_time_limit(f"{QUEUE_TTL_TAG} {error}"))


class QueueTTL:
    """Ends the runs that wait, in Dagster's queue or handed over, and have waited too long. Keep the object."""

    def __init__(
        self,
        instance: DagsterInstance,
        settings: Settings,
        claims: Claims,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._instance = instance
        self._settings = settings
        self._claims = claims
        self._clock = clock
        self._look_at = float("-inf")

    def look(self) -> None:
        """Every five seconds at most; never raises. One small query as long as no run has ever had the tag."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY_S
        try:
            self._end(self._expired())
        except Exception:
            logger.exception("cannot look for runs that have waited too long")

    def _expired(self) -> Mapping[str, tuple[DagsterRunStatus, str]]:
        """By run, its status, and why it ends."""
        waiting = runs_with_tag(self._instance, QUEUE_TTL_TAG, {DagsterRunStatus.QUEUED, *NOT_BEGUN})
        found = {run.run_id: (run.status, _too_long(run.value, run.created_at)) for run in waiting}
        return dict([(run_id, (status, why)) for run_id, (status, why) in found.items() if why][:_AT_ONCE])

    def _end(self, expired: Mapping[str, tuple[DagsterRunStatus, str]]) -> None:
        for run_id, (status, why) in expired.items():
            try:
                ended = self._end_one(run_id, status, end_of_waiting(self._settings, why))
            except Exception:  # what goes wrong with one of them does not concern the others
                logger.exception("a run that has waited too long could not be ended", extra={"run_id": run_id})
                continue
            if ended:
                logger.info("run %s ended: %s", run_id[:8], why, extra={"run_id": run_id})

    def _end_one(self, run_id: str, status: DagsterRunStatus, end: Unstarted) -> bool:
        if status is not DagsterRunStatus.QUEUED:
            return end_handed_over(self._claims, run_id, end)
        return can_move_runs(self._instance) and bool(end_queued(self._instance, [run_id], end))
