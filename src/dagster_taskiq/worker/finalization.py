"""The final state of a run, once its process tree is gone: one table, and the writing of it.

Knows Dagster's runs and events and how a child ended; not SQS, not processes. What has to be written is decided
from the event log as well as from the status, because Dagster's transitions are unguarded: whoever writes last
wins, also when he comes too late. All calls block on the database.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq._time_limit import check_time
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.cancellation.words import asked
from dagster_taskiq.cleanup.record import NO_CLEANUP, CleanupRecord, cleanup_record
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, MAX_RETRIES_TAG
from dagster_taskiq.dagster_compat.execution import failure_of_a_handler, unexpected_termination
from dagster_taskiq.dagster_compat.storage import deserialize_entry
from dagster_taskiq.process.supervise import ChildEnd
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.cleanup_events import cleanup_failed
from dagster_taskiq.storage.engine_events import finished_all_the_same, left_behind
from dagster_taskiq.storage.event_log import append_event, run_will_resume
from dagster_taskiq.storage.status_repair import restore, terminal_events, true_status
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.step_state import forget_states
from dagster_taskiq.storage.stops import stored_stop
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, TIMED_OUT_TAG, own_tags
from dagster_taskiq.worker.claim_watch import CUT_OFF

_NOT_BEGUN: Final = {DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING}
_GOES_ON: Final = {*_NOT_BEGUN, DagsterRunStatus.STARTED}


class FinalAction(enum.Enum):
    """What is to be written."""

    NOTHING = "the state is final and true, or not ours to decide"
    CANCELED = "the run was cancelled and is gone"
    SUCCESS = "the run had finished its work before the interrupt took hold"
    RESTORE = "a terminal event was overwritten by a late writer; write it again"
    HELD = "write the terminal event that the child held back"
    FAILURE = "the child is gone and nothing will go on"
    RESUMABLE = "interrupted; the next worker goes on with it"


_AFTER_ITS_STEPS: Final = {FinalAction.CANCELED, FinalAction.FAILURE, FinalAction.HELD}


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """Everything that the decision depends on. `history`: terminal run events in the log, in order."""

    status: DagsterRunStatus | None
    history: Sequence[DagsterEventType] = ()
    kind: CancelKind | None = None
    held: DagsterEventType | None = None
    """The terminal event that the child held back."""
    took_hold: bool = False
    """Whether an interrupt was raised inside the child, or it was killed."""
    came_first: bool = False
    """Whether the child had come to that event before anything stopped it: only its threads still ran."""
    will_resume: bool = False
    clean_exit: bool = False
    """Exit code 0."""


def decide(ending: RunOutcome) -> FinalAction:
    """What the run's final state is to be. Pure."""
    if ending.status is None:
        return FinalAction.NOTHING
    if ending.history:
        return FinalAction.NOTHING if ending.status is true_status(ending.history) else FinalAction.RESTORE
    if ending.status in FINISHED_STATUSES or ending.kind is CancelKind.LEASE_LOST:
        return FinalAction.NOTHING
    if ending.kind is CancelKind.DEADLINE:
        return _after_its_time(ending)
    succeeded = ending.held is DagsterEventType.RUN_SUCCESS
    if ending.status is DagsterRunStatus.CANCELING or ending.kind is CancelKind.REQUESTED:
        return FinalAction.SUCCESS if succeeded and not ending.took_hold else FinalAction.CANCELED
    if succeeded or ending.came_first:
        return FinalAction.HELD
    if ending.kind is CancelKind.SHUTDOWN and ending.status in _NOT_BEGUN:
        return FinalAction.RESUMABLE  # not a line of the job has run
    if ending.will_resume and (ending.kind is CancelKind.SHUTDOWN or (ending.held is None and ending.clean_exit)):
        return FinalAction.RESUMABLE
    if ending.kind is CancelKind.SHUTDOWN:
        return FinalAction.FAILURE
    return FinalAction.HELD if ending.held is not None else FinalAction.FAILURE


def _after_its_time(ending: RunOutcome) -> FinalAction:
    """It was stopped because it took too long, unless it was over before that could stop anything."""
    if ending.held is DagsterEventType.RUN_SUCCESS and not ending.took_hold:
        return FinalAction.SUCCESS
    had_failed = ending.held is DagsterEventType.RUN_FAILURE and ending.came_first
    return FinalAction.HELD if had_failed else FinalAction.FAILURE


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What is to be written, and all that is needed to write it."""

    run: DagsterRun | None
    action: FinalAction
    settlement: Settlement
    history: Sequence[DagsterEventType]
    entry: str
    """The event log entry that the child held back."""
    failure: str
    cancellation: Cancellation | None = None
    """What stopped the run, by the database and by what its worker was told."""
    held: DagsterEventType | None = None
    """The kind of that event."""
    has_steps: bool = False
    """Whether steps of the run are still running, and it is not to be final before they have stopped."""
    is_stopped: bool = False
    """Whether the run was cancelled, or took longer than it may: then what it leaves behind is cleaned up."""
    cleanup: CleanupRecord = NO_CLEANUP
    """Whether there are cleanup handlers to be run before, and which have failed."""

    @property
    def outcome(self) -> str:
        """The status that the run has when this is written; "deleted"."""
        if self.run is None:
            return "deleted"
        if self.action is FinalAction.CANCELED:
            return "FAILURE" if self.cleanup.failures else "CANCELED"
        if self.action is FinalAction.HELD:
            return true_status([self.held]).value if self.held is not None else self.run.status.value
        if self.action in (FinalAction.SUCCESS, FinalAction.FAILURE):
            return self.action.name
        return (true_status(self.history) if self.history else self.run.status).value

    def reason(self, end: ChildEnd | None) -> str | None:
        """Why the run has ended so; None: it is a success, or nobody has given a reason."""
        cancellation = self.cancellation
        if self.cleanup.failures and self.action is not FinalAction.FAILURE:
            return cleanup_failed(self.cleanup.failures)
        if cancellation is not None and cancellation.kind is CancelKind.LEASE_LOST:
            return cancellation.cause
        if self.outcome == "CANCELED" and cancellation is not None:
            by = f"by {cancellation.requested_by}" if cancellation.requested_by else None
            return ": ".join(filter(None, [by, cancellation.reason or cancellation.cause])) or None
        if self.outcome == "FAILURE":
            return self.failure if self.action is FinalAction.FAILURE else _last(end, "failed").get("failed")
        return None


def examine(
    instance: DagsterInstance, run_id: str, end: ChildEnd | None, told: Cancellation | None, worker_id: str
) -> Conclusion:
    """Look at the run, now that its tree is gone, and decide.

    `end` is None when no child was started. `told`: of which cancellation its worker has learnt.
    """
    history = terminal_events(instance, run_id)
    run = instance.get_run_by_id(run_id)  # after the events: what goes with one of them was written before it
    cancellation = _what_stopped_it(instance, run, told)
    kind = cancellation.kind if cancellation is not None else None
    held = _last(end, "verdict")
    action = decide(
        RunOutcome(
            status=run.status if run is not None else None,
            history=history,
            kind=kind,
            held=DagsterEventType(held["verdict"]) if held else None,
            took_hold=bool(held.get("took_hold")) or (end is not None and end.kill_at is not None),
            came_first=bool(held.get("came_first")),
            will_resume=run is not None
            and not (kind is not None and kind.ends_the_work)
            and run_will_resume(instance, run_id),
            clean_exit=end is not None and end.exit_code == 0,
        )
    )
    is_stopped = _is_stopped(action, kind, run, history)
    cleanup = cleanup_record(instance, run_id) if is_stopped else CleanupRecord()
    failure = _failure_message(end, cancellation, worker_id)
    if cancellation is not None and kind is CancelKind.DEADLINE:
        failure = cancellation.reason or "run timed out"
        failure += f"; {cleanup_failed(cleanup.failures)}" if cleanup.failures else ""
    settlement = Settlement.LEAVE if kind is CancelKind.LEASE_LOST else Settlement.DELETE
    return Conclusion(
        run=run,
        action=action,
        settlement=Settlement.HAND_BACK if action is FinalAction.RESUMABLE else settlement,
        history=history,
        entry=str(held.get("entry", "")),
        failure=failure,
        cancellation=cancellation,
        held=DagsterEventType(held["verdict"]) if held else None,
        has_steps=action in _AFTER_ITS_STEPS and bool(StepClaims(instance).running(run_id)),
        is_stopped=is_stopped,
        cleanup=cleanup,
    )


def _what_stopped_it(
    instance: DagsterInstance, run: DagsterRun | None, told: Cancellation | None
) -> Cancellation | None:
    """What the database says, unless the worker knows of something stronger.

    A message that claims a time limit which has not struck makes no FAILURE, after which the run would be tried again.
    """
    kind = told.kind if told is not None else None
    is_late = kind is CancelKind.DEADLINE
    if run is None or (kind is not None and kind > CancelKind.DEADLINE):
        return told
    if not is_late and run.status is not DagsterRunStatus.CANCELING:
        return told
    stored = stored_stop(instance, run)
    if told is None or not is_late:
        return stored
    if stored is None and told.channel is CancelChannel.CANCEL_QUEUE:
        return replace(told, kind=CancelKind.REQUESTED)
    # A worker keeps the time of its run also when the database is away, and it cannot write that it is over.
    return replace(stored, received_at=told.received_at) if stored is not None else told


def _is_stopped(
    action: FinalAction, kind: CancelKind | None, run: DagsterRun | None, history: Sequence[DagsterEventType]
) -> bool:
    """Whether the run is ended by us because of a cancellation or its time limit, or is it already, by force."""
    if run is None or kind is CancelKind.LEASE_LOST:
        return False
    if action is FinalAction.CANCELED or (action is FinalAction.FAILURE and kind is CancelKind.DEADLINE):
        return True
    if run.status is DagsterRunStatus.CANCELED or DagsterEventType.RUN_CANCELED in history:
        return True
    # Failed by Dagster's run monitoring, while its processes still ran.
    failed = DagsterRunStatus.FAILURE in {run.status, true_status(history) if history else None}
    return failed and TIMED_OUT_TAG in own_tags(run)


def fail(instance: DagsterInstance, claims: Claims, run_id: str, why: str) -> bool:
    """Nobody goes on with the run: its worker is gone, or its code is nowhere. Report that, and free what it held.

    False, and nothing is written, when the run is being stopped or is over, or no longer this worker's: its steps had
    time to stop, or the database was away, and somebody else may have resumed it meanwhile.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.status not in _GOES_ON or not claims.holds(run_id):
        return False
    instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    check_time()
    instance.report_run_failed(run, why, unexpected_termination())
    return True


def conclude(instance: DagsterInstance, conclusion: Conclusion, end: ChildEnd | None) -> None:
    """Give back what the run held, and write its final state: who sees that state can rely on the former."""
    run, action = conclusion.run, conclusion.action
    if run is None:
        return
    _free_what_it_held(instance, run, end)
    check_time()  # another try looks again how the run has to end
    failures = conclusion.cleanup.failures
    if action is FinalAction.CANCELED and failures:
        if instance.run_retries_enabled:
            # What was cancelled is not tried again, whatever has become of its cleanup.
            instance.add_run_tags(run.run_id, {MAX_RETRIES_TAG: "0"})
        instance.report_run_failed(run, cleanup_failed(failures), failure_of_a_handler())
    elif action is FinalAction.CANCELED:
        text = f'Execution of run for "{run.job_name}" canceled.'
        instance.report_run_canceled(run, asked(text, *_who_and_why(run, conclusion.cancellation)))
    elif action is FinalAction.FAILURE:
        instance.report_run_failed(run, conclusion.failure, unexpected_termination())
    elif action is FinalAction.RESTORE:
        restore(instance, run, conclusion.history)
    elif action in (FinalAction.SUCCESS, FinalAction.HELD):
        if action is FinalAction.SUCCESS:
            append_event(instance, run, finished_all_the_same())
        # As the child would have written it, with its time.
        instance.handle_new_event(deserialize_entry(conclusion.entry))
        if conclusion.held is DagsterEventType.RUN_SUCCESS and _last(end, "state"):
            forget_states(instance, run.run_id)


def _who_and_why(run: DagsterRun, cancellation: Cancellation | None) -> tuple[str | None, str | None]:
    """As the worker was told, or as it is in the run's tags."""
    tags = own_tags(run)
    by, reason = (cancellation.requested_by, cancellation.reason) if cancellation is not None else (None, None)
    return by or tags.get(CANCELLED_BY_TAG), reason or tags.get(CANCEL_REASON_TAG)


def _last(end: ChildEnd | None, key: str) -> dict[str, Any]:
    """The child's last message of that kind; empty when there is none."""
    return next((message for message in reversed(end.messages if end is not None else ()) if key in message), {})


def _failure_message(end: ChildEnd | None, cancellation: Cancellation | None, worker_id: str) -> str:
    if end is not None and end.abandoned:
        return f"worker {worker_id} hung, and its run was interrupted"
    cause = cancellation.cause or "" if cancellation is not None else ""
    if cause.startswith(CUT_OFF):
        return f"worker {worker_id} stopped the run, because others could have taken it over: {cause}"
    if cancellation is not None and cancellation.kind is CancelKind.SHUTDOWN:
        return f"worker shut down: {worker_id} was stopped while it ran this ({cause or 'no cause is known'})"
    if end is None:
        return f"worker {worker_id} could not start the run"
    return how_it_ended(end, "the run's process")


def how_it_ended(end: ChildEnd, whose: str) -> str:
    """How a child ended that could not report it itself, in words; `whose`: "the run's process"."""
    error = _last(end, "error").get("error")
    if end.late is not None:
        late = end.late
        return f"{late.reason}; step {late.step_key} did not react to the interrupt, and {whose} {end.pid} was killed"
    if end.kill_at is not None:
        return f"{whose} {end.pid} did not end when it was interrupted, and was killed"
    if end.abandoned:
        return f"{whose} {end.pid} was interrupted because its worker hung"
    if error is not None:
        return f"{whose} {end.pid} ended with an error: {error}"
    if end.killed_by == "SIGKILL":
        return f"{whose} {end.pid} was killed by SIGKILL, likely out of memory"
    if end.killed_by is not None:
        return f"{whose} {end.pid} was killed by {end.killed_by}"
    return f"{whose} {end.pid} ended with exit code {end.exit_code} before its work was finished"


def _free_what_it_held(instance: DagsterInstance, run: DagsterRun, end: ChildEnd | None) -> None:
    """What only a polite end gives back by itself: the slots of concurrency pools."""
    if end is None:
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        return
    if end.exit_code != 0 or end.killed:
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    if end.kill_at is None and end.interrupted_at is None and end.killed:
        append_event(instance, run, left_behind(end.killed))
