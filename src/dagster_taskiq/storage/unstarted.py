"""End runs that no worker has begun, so that none ever begins with them. Knows runs and claims; not why they end.

A run in Dagster's queue leaves it by a status that is compared and swapped; of one that was handed over, whoever ends
it has the claim, as a worker that begins with it has. All calls block on the database.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq.cancellation.words import OURSELVES, asked
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, MAX_RETRIES_TAG
from dagster_taskiq.dagster_compat.execution import unexpected_termination
from dagster_taskiq.dagster_compat.many_runs import move_runs, store_events
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import append_event, as_dagster_event
from dagster_taskiq.storage.status_repair import restore, terminal_events
from dagster_taskiq.storage.tags import (
    CANCEL_REASON_TAG,
    CANCELLED_BY_TAG,
    RUN_ID_TAG,
    TASK_ID_TAG,
    TIMED_OUT_TAG,
    add_own_tags,
    own_tags,
)

logger = logging.getLogger(__name__)

NOT_BEGUN: Final = frozenset({DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING})


@dataclass(frozen=True, slots=True)
class Unstarted:
    """How such a run ends: CANCELED, with who has asked for it and why; or with `fails` FAILURE, with the reason."""

    reason: str | None
    by: str
    fails: bool = False

    @property
    def tags(self) -> dict[str, str]:
        """What the run's tags are to say of it, also for whoever has to finish it, if this process dies over it."""
        if self.fails:
            # It is not tried again: it would wait once more, for as long, and begin after all.
            return {TIMED_OUT_TAG: self.reason or "waited too long", MAX_RETRIES_TAG: "0"}
        return {CANCELLED_BY_TAG: self.by} | ({CANCEL_REASON_TAG: self.reason} if self.reason else {})

    @classmethod
    def of_tags(cls, run: DagsterRun, default_by: str) -> "Unstarted":
        """As the tags of a run say that is being ended."""
        reason, by, limit = map(own_tags(run).get, (CANCEL_REASON_TAG, CANCELLED_BY_TAG, TIMED_OUT_TAG))
        if limit is not None and reason is None and by is None:
            return cls(limit, default_by, fails=True)
        return cls(reason, by or default_by)  # what somebody has asked for is stronger


def end_queued(instance: DagsterInstance, run_ids: Sequence[str], end: Unstarted) -> set[str]:
    """End those of these runs that are in Dagster's queue, as its coordinator does, but many at a time.

    None that has started: each is decided by one statement. If this process dies in between, a run is CANCELING, nobody
    starts it, and a worker that looks for lost runs ends it. Raises `TypeError` where `can_move_runs` is False.
    """
    queued = RunsFilter(run_ids=list(run_ids), statuses=[DagsterRunStatus.QUEUED])
    runs = {run.run_id: run for run in instance.get_runs(queued)}
    tags = {run_id: {**own_tags(run), **end.tags, RUN_ID_TAG: run_id} for run_id, run in runs.items()}
    ordered = [runs[run_id] for run_id in run_ids if run_id in runs]
    moved = move_runs(instance, ordered, DagsterRunStatus.QUEUED, DagsterRunStatus.CANCELING, tags)
    failed = store_events(instance, {run_id: _events(runs[run_id], end) for run_id in moved})
    for run_id, error in failed.items():
        logger.warning("events could not be written: %s", error, extra={"run_id": run_id})
    written = [runs[run_id] for run_id in moved if run_id not in failed]
    final = DagsterRunStatus.FAILURE if end.fails else DagsterRunStatus.CANCELED
    return move_runs(instance, written, DagsterRunStatus.CANCELING, final)


def _events(run: DagsterRun, end: Unstarted) -> list[DagsterEvent]:
    canceling, canceled = DagsterEventType.RUN_CANCELING, DagsterEventType.RUN_CANCELED
    if end.fails:
        failure, why = DagsterEventType.RUN_FAILURE.value, unexpected_termination()
        return [DagsterEvent(failure, run.job_name, message=end.reason, event_specific_data=why)]
    asked_by = end.by, end.reason
    return [
        as_dagster_event(run, engine_events.requested("none yet", end.reason, end.by)),
        DagsterEvent(canceling.value, run.job_name, message=asked("Canceling run from the queue.", *asked_by)),
        DagsterEvent(canceled.value, run.job_name, message=asked("Canceled before it was started.", *asked_by)),
    ]


def end_handed_over(claims: Claims, run_id: str, end: Unstarted) -> bool:
    """End a run that was handed over, if no worker has it. False: one has it, or may have it, or it is over."""
    run = claims.instance.get_run_by_id(run_id)
    withheld = claims.withhold(run, end.by) if run is not None and run.status in NOT_BEGUN else None
    if withheld is None:
        return False
    try:
        return end_unstarted(claims.instance, run_id, end)
    finally:
        claims.let_go(withheld)


def end_withdrawn(claims: Claims, run: DagsterRun) -> bool:
    """Where a run would be sent to a worker: end it instead, if it was being withdrawn as Dagster's daemon took it.

    Never raises.
    """
    # Only by tags that name this run: in the launchpad, Dagster's UI copies the others.
    if run.tags.get(RUN_ID_TAG) != run.run_id or not run.tags.keys() & {CANCELLED_BY_TAG, TIMED_OUT_TAG}:
        return False
    try:
        end_handed_over(claims, run.run_id, Unstarted.of_tags(run, OURSELVES))
    except Exception:
        logger.exception("a run that was withdrawn could not be ended", extra={"run_id": run.run_id})
        return False  # its log keeps it from beginning
    return True


def end_unstarted(instance: DagsterInstance, run_id: str, end: Unstarted) -> bool:
    """End a run that nobody else can begin with, because the caller has the claim. False: it has begun, or is over.

    Where somebody has terminated it meanwhile, it is CANCELED as he wants it.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.status in FINISHED_STATUSES:
        return False
    if history := terminal_events(instance, run_id):
        restore(instance, run, history)  # Dagster's daemon took it from its queue at the moment in which it was ended
        return True
    if run.status is DagsterRunStatus.CANCELING:
        end = Unstarted.of_tags(run, end.by)
    elif run.status not in NOT_BEGUN:
        return False
    add_own_tags(instance, run, end.tags)
    if end.fails:
        instance.report_run_failed(run, end.reason, unexpected_termination())
        return True
    task_id = own_tags(run).get(TASK_ID_TAG, "none yet")
    append_event(instance, run, engine_events.requested(task_id, end.reason, end.by))
    instance.report_run_canceled(run, asked("Canceled before it was started.", end.by, end.reason))
    return True
