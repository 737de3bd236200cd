"""Why a run is being stopped, by what the database says: the one place that tells who is stronger.

A message may be late, forged, or lost with its worker. So that somebody has asked for the end of a run, and that it has
taken longer than it may, is in its tags. Knows tags, statuses and Dagster's run monitoring; not how a run is stopped.
"""

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR
from dagster_taskiq.dagster_compat.run_monitoring import limit_of_monitoring
from dagster_taskiq.dagster_compat.storage import with_stored_tags
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, TIMED_OUT_TAG, own_tags
from dagster_taskiq.storage.time_limits import TimeLimit


def stored_stop(instance: DagsterInstance, run: DagsterRun) -> Cancellation | None:
    """Whether the run is to be CANCELED, because somebody wants it, or FAILURE, because it took too long.

    What somebody has asked for is stronger, whatever came first. None: nothing stops the run, as far as the database
    knows. Two queries at most.
    """
    run = with_stored_tags(instance, run)
    tags, channel = own_tags(run), CancelChannel.STATUS_WATCH
    reason, by, late_reason = (tags.get(tag) for tag in (CANCEL_REASON_TAG, CANCELLED_BY_TAG, TIMED_OUT_TAG))
    if reason is None and by is None and run.status is not DagsterRunStatus.CANCELED:
        if late_reason is None and run.status is DagsterRunStatus.CANCELING:
            # Run monitoring marks it first, and our launcher, which it asks then, says why a moment later.
            of_dagster = limit_of_monitoring(instance, run)
            late_reason = TimeLimit(*of_dagster).exceeded("run") if of_dagster is not None else None
        if late_reason is not None:
            return Cancellation(CancelKind.DEADLINE, late_reason, channel=channel)
        if run.status is not DagsterRunStatus.CANCELING:
            return None
    # Whoever asks by way of this package leaves a name.
    return Cancellation(CancelKind.REQUESTED, reason, by or UNKNOWN_AUTHOR, channel=channel)
