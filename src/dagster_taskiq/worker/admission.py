"""May this message be started? One table, and what has to be read and written to look it up.

The order is what makes two racing sides see each other: the worker writes its claim, then reads the run; the launcher
writes the run's status, then reads the claim. Of two racing workers the row of the claim decides. Knows Dagster's runs
and claims; not SQS, not processes.
"""

import enum
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Literal

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.cleanup.record import cleanup_record
from dagster_taskiq.dagster_compat.api import BACKFILL_ID_TAG, FINISHED_STATUSES
from dagster_taskiq.dagster_compat.run_counts import CANCELLED_BACKFILL
from dagster_taskiq.dagster_compat.storage import backfill_status
from dagster_taskiq.storage.claims import Claim, Claims, ClaimState, is_given_up
from dagster_taskiq.storage.code_waits import waits_for_code
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import StepRef, append_event, read_engine_events, run_will_resume
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.queue_ttl import waited_too_long
from dagster_taskiq.storage.routing import route_of_run
from dagster_taskiq.storage.step_claims import StepClaims, StepState
from dagster_taskiq.storage.step_events import step_lost
from dagster_taskiq.storage.tags import TASK_ID_TAG, add_own_tags, own_tags, was_stopped
from dagster_taskiq.storage.unstarted import NOT_BEGUN
from dagster_taskiq.worker.code_check import CodeMissing, FindCode, is_here

logger = logging.getLogger(__name__)

WorkKind = Literal["execute_run", "resume_run", "execute_step"]


class Action(enum.Enum):
    """What the worker does with a message."""

    DROP = "delete the message; there is nothing to do"
    HAND_BACK = "give the message back with a delay; somebody else is at work"
    LOOK_AGAIN = "look again in a moment; the worker that has it may be dead"
    FINISH_CANCELLATION = "report the run CANCELED; the worker that had it is gone"
    START = "start the child"
    RESUME = "resume the run in a child"
    EXPIRE = "end it; it has waited for longer than it may"
    FAIL = "report the run FAILURE; the worker that had it is gone"
    HAND_ON = "give the message back; another worker may have the code"
    WAIT_FOR_CODE = "give the message back; a worker that has the code may be about to start"
    NO_CODE = "report the FAILURE; no living worker has the code"


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
    elsewhere: str | None = None
    """Why no process may be begun for it by this worker, whatever code that has."""


def admit_run(
    instance: DagsterInstance,
    claims: Claims,
    candidate: Candidate,
    held: str | None = None,
    find_code: FindCode = is_here,
) -> Decision:
    """Look the run up, claim it, look again, decide. Blocks on the database.

    `held`: why nothing may be begun; then only what is to be cancelled goes on.
    LOOK_AGAIN means: call this again after `claims.heartbeats.confirm_s`. A decision other than that, DROP, HAND_BACK,
    HAND_ON and WAIT_FOR_CODE leaves the claim with this worker. `find_code`: whether it can be begun here.
    """
    run = instance.get_run_by_id(candidate.run_id)
    early = _before_the_claim(claims, candidate, run)
    if early is not None:
        return early
    assert run is not None  # noqa: S101 - for the type checker: an unknown run was dropped above
    seen = claims.read([run.run_id]).get(run.run_id)
    other = _other_owner(claims, candidate, run, seen)
    if other is not None:
        return other
    if held is not None and not _is_to_be_finished(run):
        return Decision(Action.HAND_BACK, held, run)
    elsewhere = candidate.elsewhere
    no_code = CodeMissing(elsewhere, others=True) if elsewhere else find_code(run, route_of_run(run), "runs")
    later = _without_its_code(instance, candidate, run, no_code) if no_code is not None else None
    if later is not None:
        return later  # before the claim: the run's log is not about this worker
    if TASK_ID_TAG not in own_tags(run):
        # Sent by somebody else's producer: from now on the run can be terminated all the same.
        add_own_tags(instance, run, {TASK_ID_TAG: candidate.task_id})
    mine = claims.take(run, candidate.worker_id, candidate.task_id, candidate.where, seen)
    if mine is None:
        return Decision(Action.HAND_BACK, "another worker claimed it first", run)
    now = instance.get_run_by_id(candidate.run_id)
    decision = _after_the_claim(candidate, now, seen, claims)
    if decision.action is Action.DROP:
        claims.release(run, decision.why, mine)
    if no_code is not None and decision.action in (Action.START, Action.RESUME):
        if no_code.others:  # it had changed since the first look
            claims.release(run, no_code.why, mine)
            return replace(decision, action=Action.HAND_ON, why=no_code.why)
        return replace(decision, action=Action.NO_CODE, why=no_code.why)
    return decision


def _without_its_code(
    instance: DagsterInstance, candidate: Candidate, run: DagsterRun, no_code: CodeMissing
) -> Decision | None:
    """What becomes of a message whose run cannot be loaded here; None: go on, to what takes no code, or to its failure.

    What was cancelled does not wait: its cleanup handlers fail, as they do without any worker that has the code.
    """
    if not begins_a_process(instance, run, candidate.kind):
        return None
    if no_code.others:
        return Decision(Action.HAND_ON, no_code.why, run)
    if not _is_to_be_finished(run) and waits_for_code(instance, run, candidate.task_id, no_code.why):
        return Decision(Action.WAIT_FOR_CODE, no_code.why, run)
    return None


def begins_a_process(instance: DagsterInstance, run: DagsterRun, kind: WorkKind) -> bool:
    """Whether going on with it here takes the code of the run: for the run, or for its cleanup handlers."""
    if _is_to_be_finished(run):
        return cleanup_record(instance, run.run_id).due
    if run.status is DagsterRunStatus.STARTED and kind == "execute_run":
        return run_will_resume(instance, run.run_id)
    return _ends_unbegun(instance, run) is None


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
    return None


def _is_to_be_finished(run: DagsterRun) -> bool:
    """Whether nothing more than its end is to be written, and its cleanup handlers to be run."""
    return run.status is DagsterRunStatus.CANCELING or was_stopped(run)


def _must_be_cleaned_up(claims: Claims, run: DagsterRun) -> bool:
    """Ended, by force perhaps, before the worker that had it came to running its cleanup handlers."""
    return was_stopped(run) and cleanup_record(claims.instance, run.run_id).due


def _other_owner(claims: Claims, candidate: Candidate, run: DagsterRun, seen: Claim | None) -> Decision | None:
    """What to do as long as somebody else has it; None: it can be claimed."""
    if seen is None or seen.state is ClaimState.RELEASED or seen.worker_id == candidate.worker_id:
        return None
    if seen.task_id == candidate.task_id and is_given_up(seen):
        return Decision(Action.HAND_BACK, f"run monitoring was told that worker {seen.worker_id} is dead", run)
    # The run's own message comes again when its worker no longer renews its lease: a second sign of its death.
    heartbeats = claims.heartbeats if seen.task_id == candidate.task_id else claims.without_message
    alive, in_doubt = heartbeats.look([seen.worker_id])
    if in_doubt and seen.state is ClaimState.HELD:
        return Decision(Action.LOOK_AGAIN, f"the heartbeat of worker {seen.worker_id}, which has it, is old", run)
    if alive and seen.state is ClaimState.HELD:
        return Decision(Action.HAND_BACK, f"worker {seen.worker_id} is at work on it", run)
    return None


def _after_the_claim(candidate: Candidate, run: DagsterRun | None, before: Claim | None, claims: Claims) -> Decision:
    if run is None:
        return Decision(Action.DROP, "the run was deleted")
    to_be_cleaned_up = _must_be_cleaned_up(claims, run)
    if run.status in FINISHED_STATUSES and not to_be_cleaned_up:
        return Decision(Action.DROP, f"the run is {run.status.value} already", run)
    if to_be_cleaned_up:
        return Decision(Action.FINISH_CANCELLATION, "its cleanup is outstanding", run)
    if run.status is DagsterRunStatus.CANCELING:
        return Decision(Action.FINISH_CANCELLATION, "terminated while no worker was at work on it", run)
    if candidate.kind == "resume_run":
        return Decision(Action.RESUME, "resume requested by run monitoring", run)
    if run.status in NOT_BEGUN:
        return _ends_unbegun(claims.instance, run) or Decision(Action.START, "to be started", run)
    gone = before is not None and before.worker_id != candidate.worker_id
    who = (
        f"worker {before.worker_id}, which had it, is gone" if before and gone else "the worker that had it is unknown"
    )
    if run_will_resume(claims.instance, run.run_id):
        return Decision(Action.RESUME, who, run)
    return Decision(Action.FAIL, who, run)


def _ends_unbegun(instance: DagsterInstance, run: DagsterRun) -> Decision | None:
    """How a run ends that is not to be begun any more; None: it may begin."""
    if run.status not in NOT_BEGUN:
        return None
    if _its_backfill_is_cancelled(instance, run):
        return Decision(Action.FINISH_CANCELLATION, "its backfill was canceled before the run was started", run)
    why = waited_too_long(instance, run)
    return Decision(Action.EXPIRE, why, run) if why is not None else None


def _its_backfill_is_cancelled(instance: DagsterInstance, run: DagsterRun) -> bool:
    """Dagster terminates the runs of such a backfill at its daemon's next tick; until then slots become free."""
    backfill_id = run.tags.get(BACKFILL_ID_TAG)
    return backfill_id is not None and backfill_status(instance, backfill_id) in CANCELLED_BACKFILL


def admit_step_again(
    instance: DagsterInstance, claims: StepClaims, heartbeats: Heartbeats, step: StepRef, candidate: Candidate
) -> Decision | None:
    """For a message that was received before: if anybody has claimed the step, this worker included, it is not started.

    DROP, when it is over. HAND_BACK, as long as that worker may be alive: a message comes again up to a quarter of the
    visibility timeout before the heartbeat of a dead one is old enough, and it is the only one who tells of the death.
    LOOK_AGAIN: call this again after `heartbeats.confirm_s`. When it is dead, the step is reported lost, and then DROP.
    """
    claim = claims.find(candidate.run_id, step)
    if claim is None:
        return None
    had_it = Decision(Action.DROP, f"worker {claim.worker_id} had it before")
    if claim.state is StepState.OVER or claim.worker_id == candidate.worker_id:
        return had_it
    if claim.state is StepState.HELD:
        alive, in_doubt = heartbeats.look([claim.worker_id])
        if in_doubt:
            return Decision(Action.LOOK_AGAIN, f"the heartbeat of worker {claim.worker_id}, which had it, is old")
        if alive:
            return Decision(Action.HAND_BACK, f"worker {claim.worker_id} is at work on it")
        if not claims.lose(candidate.run_id, step, claim.worker_id):
            return had_it
    run = instance.get_run_by_id(candidate.run_id)
    if run is not None and not _is_reported_lost(instance, run, step):
        why = f"worker {claim.worker_id}, which had step {step.step_key}, is gone"
        may_retry = run.status is DagsterRunStatus.STARTED
        lost = step_lost(claim.worker_id, step.task_id, why, retry=may_retry, interrupted=True)
        append_event(instance, run, lost, step.step_key)
    return had_it


def _is_reported_lost(instance: DagsterInstance, run: DagsterRun, step: StepRef) -> bool:
    return any(stage is Stage.STEP_LOST for stage, _ in read_engine_events(instance, run.run_id, step))


def admit_step(
    instance: DagsterInstance,
    claims: StepClaims,
    step: StepRef,
    candidate: Candidate,
    find_code: FindCode = is_here,
) -> Decision:
    """May this attempt of a step be started? Claims it and decides. Blocks on the database.

    START, DROP; without a claim HAND_ON, when its code may be elsewhere, and WAIT_FOR_CODE, when it is nowhere yet;
    NO_CODE, with the claim, when it has waited for it.

    START leaves the claim with this worker; called again after it failed half-way, it goes on with that claim. An
    attempt that anybody else has claimed is never started again under the same task id, also when that worker is dead:
    what becomes of it is the decision of the run's executor, which watches its workers. When it has an interrupted
    attempt begin again, that is another task, with the number of the interruption in its id.
    """
    run = instance.get_run_by_id(candidate.run_id)
    why = _reason_to_drop_step(run)
    if why is not None or run is None:
        return Decision(Action.DROP, why or "")  # without a trace in the log
    no_code = find_code(run, step.route, "steps")
    if no_code is not None and no_code.others:
        return Decision(Action.HAND_ON, no_code.why)
    if no_code is not None and waits_for_code(instance, run, step.task_id, no_code.why, step):
        return Decision(Action.WAIT_FOR_CODE, no_code.why)
    owner = claims.claim(run, step, candidate.worker_id, candidate.where)
    if owner.worker_id != candidate.worker_id:
        return Decision(Action.DROP, f"worker {owner.worker_id} claimed it first")
    if owner.state is not StepState.HELD:
        return Decision(Action.DROP, "this worker had it before, under another message")
    run = instance.get_run_by_id(candidate.run_id)
    why = _reason_to_drop_step(run)
    if why is None and no_code is not None:
        return Decision(Action.NO_CODE, no_code.why, run)
    if why is None:
        return Decision(Action.START, "to be started", run)
    if run is not None:
        claims.release(run, step, candidate.worker_id, why)
    return Decision(Action.DROP, why)


def _reason_to_drop_step(run: DagsterRun | None) -> str | None:
    if run is None:
        return "the run does not exist (deleted?)"
    return None if run.status is DagsterRunStatus.STARTED else f"its run is {run.status.value}"
