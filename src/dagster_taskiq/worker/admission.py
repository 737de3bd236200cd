"""May this message be started? One table, and what has to be read and written to look it up.

The order is what makes two racing sides see each other: the worker appends its claim, then reads the run; the
launcher writes the run's status, then reads the claims. Of two racing workers `claims` decides. Knows Dagster's runs
and claims; not SQS, not processes.
"""

import enum
import logging
import time
from dataclasses import dataclass, field
from typing import Final, Literal

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq._retry import poll_until
from dagster_taskiq.cleanup.record import cleanup_record
from dagster_taskiq.dagster_compat.api import BACKFILL_ID_TAG, FINISHED_STATUSES
from dagster_taskiq.dagster_compat.storage import backfill_status
from dagster_taskiq.storage.claims import Claims, Owner
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.tags import TASK_ID_TAG, add_own_tags, own_tags

logger = logging.getLogger(__name__)

WorkKind = Literal["execute_run", "resume_run", "execute_step"]

_CONTEST_S: Final = 3.0
_LOOK_EVERY_S: Final = 0.05
_CANCELLED_BACKFILL: Final = frozenset({"CANCELING", "CANCELED", "FAILING"})


class Action(enum.Enum):
    """What the worker does with a message."""

    DROP = "delete the message; there is nothing to do"
    HAND_BACK = "give the message back with a delay; somebody else is at work"
    LOOK_AGAIN = "look again in a moment; the worker that has it may be dead"
    FINISH_CANCELLATION = "report the run CANCELED; the worker that had it is gone"
    START = "start the child"
    RESUME = "resume the run in a child"
    FAIL = "report the run FAILURE; the worker that had it is gone"


_WITHOUT_THE_CLAIM: Final = (Action.DROP, Action.HAND_BACK, Action.LOOK_AGAIN)


@dataclass(frozen=True, slots=True)
class Decision:
    """`why` is for the log and, where a run is finished by it, for the run's events."""

    action: Action
    why: str
    run: DagsterRun | None = None
    at: float = field(default_factory=time.monotonic, compare=False)

    def is_stale(self, dead_after_s: float) -> bool:
        """Whether so much time has passed that others may have taken this worker for dead: it hung in between."""
        return time.monotonic() - self.at > dead_after_s


@dataclass(frozen=True, slots=True)
class Candidate:
    """One received message and who received it."""

    kind: WorkKind
    run_id: str
    task_id: str
    worker_id: str
    where: str


def admit_run(instance: DagsterInstance, claims: Claims, candidate: Candidate) -> Decision:
    """Look the run up, claim it, look again, decide. Blocks on the database.

    LOOK_AGAIN means: call this again after `claims.heartbeats.confirm_s`. A decision other than that, DROP and
    HAND_BACK leaves the claim with this worker.
    """
    run = instance.get_run_by_id(candidate.run_id)
    early = _before_the_claim(claims, candidate, run)
    if early is not None:
        return early
    assert run is not None  # noqa: S101 - for the type checker: an unknown run was dropped above
    if TASK_ID_TAG not in own_tags(run):
        # Sent by somebody else's producer: from now on the run can be terminated all the same.
        add_own_tags(instance, run, {TASK_ID_TAG: candidate.task_id})
    earlier = _dead_owner(claims, candidate, run)
    claims.claim(run, candidate.worker_id, candidate.task_id, candidate.where)
    run = instance.get_run_by_id(candidate.run_id)
    owner = claims.owner(candidate.run_id, candidate.worker_id)
    decision = _after_the_claim(candidate, run, owner, earlier, claims)
    if decision.action not in _WITHOUT_THE_CLAIM:
        decision = resolve_contention(claims, candidate) or decision
    if run is not None and decision.action in _WITHOUT_THE_CLAIM:
        claims.release(run, candidate.worker_id, candidate.task_id, decision.why)
    elif run is not None and owner is not None and owner.beside:
        claims.release_dead_claims(run, candidate.worker_id, candidate.task_id)
    return decision


def _before_the_claim(claims: Claims, candidate: Candidate, run: DagsterRun | None) -> Decision | None:
    """What can be decided without a claim, so that it leaves no trace in the log of a run that goes on."""
    if run is None:
        return Decision(Action.DROP, "the run does not exist (deleted?)")
    if run.status in FINISHED_STATUSES and not _must_be_cleaned_up(claims, run):
        return Decision(Action.DROP, f"the run is {run.status.value} already")
    if own_tags(run).get(TASK_ID_TAG, candidate.task_id) != candidate.task_id:
        return Decision(Action.DROP, "superseded: the run was launched or resumed again under another task id")
    if run.status is DagsterRunStatus.QUEUED:
        return Decision(Action.DROP, "the run is QUEUED: its run coordinator has not launched it")
    if run.status not in (DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING):
        owner = claims.owner(candidate.run_id)
        if owner is not None and owner.alive and owner.worker_id != candidate.worker_id:
            return _for(owner, f"worker {owner.worker_id} is at work on it", run)
    return None


def _must_be_cleaned_up(claims: Claims, run: DagsterRun) -> bool:
    """CANCELED, by force perhaps, before the worker that had it came to running its cleanup handlers."""
    return run.status is DagsterRunStatus.CANCELED and cleanup_record(claims.instance, run.run_id).due


def _for(owner: Owner, why: str, run: DagsterRun | None) -> Decision:
    """What to do as long as somebody else has it."""
    if owner.in_doubt:
        return Decision(Action.LOOK_AGAIN, f"the heartbeat of worker {owner.worker_id}, which has it, is old", run)
    return Decision(Action.HAND_BACK, why, run)


def resolve_contention(claims: Claims, candidate: Candidate, step: StepRef | None = None) -> Decision | None:
    """HAND_BACK if somebody else has claimed the same and does not give way within a moment; else None.

    Called by who has the first claim. Whoever saw it gives way to it; who does not, did not see it, and has begun.
    """
    rival: str | None = None

    def gave_way() -> bool:
        nonlocal rival
        rival = claims.rival(candidate.run_id, candidate.worker_id, step)
        return rival is None

    if poll_until(gave_way, within_s=_CONTEST_S, every_s=_LOOK_EVERY_S):
        return None
    return Decision(Action.HAND_BACK, f"worker {rival} has claimed it, too, and does not give way")


def _dead_owner(claims: Claims, candidate: Candidate, run: DagsterRun) -> str | None:
    if run.status in (DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING):
        return None
    owner = claims.owner(candidate.run_id)
    return owner.worker_id if owner is not None and owner.worker_id != candidate.worker_id else None


def _after_the_claim(
    candidate: Candidate, run: DagsterRun | None, owner: Owner | None, earlier: str | None, claims: Claims
) -> Decision:
    if run is None:
        return Decision(Action.DROP, "the run was deleted")
    to_be_cleaned_up = _must_be_cleaned_up(claims, run)
    if run.status in FINISHED_STATUSES and not to_be_cleaned_up:
        return Decision(Action.DROP, f"the run is {run.status.value} already", run)
    if owner is not None and owner.worker_id != candidate.worker_id:
        return _for(owner, f"worker {owner.worker_id} claimed it first", run)
    if to_be_cleaned_up:
        return Decision(Action.FINISH_CANCELLATION, "its cleanup is outstanding", run)
    if run.status is DagsterRunStatus.CANCELING:
        return Decision(Action.FINISH_CANCELLATION, "terminated while no worker was at work on it", run)
    if candidate.kind == "resume_run":
        return Decision(Action.RESUME, "resume requested by run monitoring", run)
    if run.status in (DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING):
        if _its_backfill_is_cancelled(claims.instance, run):
            return Decision(Action.FINISH_CANCELLATION, "its backfill was canceled before the run was started", run)
        return Decision(Action.START, "to be started", run)
    who = f"worker {earlier}, which had it, is gone" if earlier else "the worker that had it is unknown"
    if claims.instance.run_will_resume(run.run_id):
        return Decision(Action.RESUME, who, run)
    return Decision(Action.FAIL, who, run)


def _its_backfill_is_cancelled(instance: DagsterInstance, run: DagsterRun) -> bool:
    """Dagster terminates the runs of such a backfill at its daemon's next tick; until then slots become free."""
    backfill_id = run.tags.get(BACKFILL_ID_TAG)
    return backfill_id is not None and backfill_status(instance, backfill_id) in _CANCELLED_BACKFILL


def admit_step_again(claims: Claims, step: StepRef, candidate: Candidate) -> Decision | None:
    """For a message that was received before: DROP if anybody has claimed the step, this worker included."""
    owner = claims.first_claimant(candidate.run_id, step)
    return Decision(Action.DROP, f"worker {owner} had it before") if owner is not None else None


def admit_step(instance: DagsterInstance, claims: Claims, step: StepRef, candidate: Candidate) -> Decision:
    """May this attempt of a step be started? Claims it and decides: START, DROP, HAND_BACK. Blocks on the database.

    START leaves the claim with this worker; called again after it failed half-way, it goes on with that claim. An
    attempt that anybody else has claimed is never started again, also when that worker is dead: what becomes of it is
    the decision of the run's executor, which watches its workers.
    """
    run = instance.get_run_by_id(candidate.run_id)
    why = _reason_to_drop_step(run)
    if why is not None or run is None:
        return Decision(Action.DROP, why or "")  # without a trace in the log
    claims.claim(run, candidate.worker_id, candidate.task_id, candidate.where, step.step_key)
    run = instance.get_run_by_id(candidate.run_id)
    why = _reason_to_drop_step(run)
    owner = claims.first_claimant(candidate.run_id, step)
    if why is None and owner != candidate.worker_id:
        why = f"worker {owner} claimed it first"
    lost = resolve_contention(claims, candidate, step) if why is None else Decision(Action.DROP, why)
    if lost is None:
        return Decision(Action.START, "to be started", run)
    if run is not None:
        claims.release(run, candidate.worker_id, candidate.task_id, lost.why, step.step_key)
    return lost


def _reason_to_drop_step(run: DagsterRun | None) -> str | None:
    if run is None:
        return "the run does not exist (deleted?)"
    return None if run.status is DagsterRunStatus.STARTED else f"its run is {run.status.value}"
