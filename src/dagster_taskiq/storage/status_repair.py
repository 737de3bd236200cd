"""Which status of a run is the true one when somebody wrote another one too late, and how it is restored.

Knows the events that set the status of a run; not who writes them, or how a run ends. The reasons are in
docs/decisions/003: Dagster does not check its transitions, so each writer looks at the log afterwards.
All calls block on the database.
"""

from collections.abc import Sequence
from typing import Final

from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.dagster_compat.many_runs import set_status
from dagster_taskiq.dagster_compat.storage import event_of
from dagster_taskiq.storage.engine_events import restored
from dagster_taskiq.storage.event_log import append_event

_STATUS_AFTER: Final = {
    DagsterEventType.RUN_SUCCESS: DagsterRunStatus.SUCCESS,
    DagsterEventType.RUN_FAILURE: DagsterRunStatus.FAILURE,
    DagsterEventType.RUN_CANCELED: DagsterRunStatus.CANCELED,
}
_TERMINAL: Final = set(_STATUS_AFTER)
_SETS_A_STATUS: Final = _TERMINAL | {
    DagsterEventType.RUN_ENQUEUED,
    DagsterEventType.RUN_STARTING,
    DagsterEventType.RUN_START,
    DagsterEventType.RUN_CANCELING,
}


def terminal_events(instance: DagsterInstance, run_id: str) -> list[DagsterEventType]:
    """The terminal events of a run in its log, in order."""
    return _events(instance, run_id, _TERMINAL)


def true_status(history: Sequence[DagsterEventType]) -> DagsterRunStatus:
    """CANCELED if the run ever was, whatever came after it; otherwise that of the first terminal event."""
    return _STATUS_AFTER[_true_event(history)]


def restore(instance: DagsterInstance, run: DagsterRun, history: Sequence[DagsterEventType]) -> DagsterRunStatus:
    """Give the run the status of the true one of these terminal events again, and return it.

    The event is not written a second time: sensors of run statuses would see another end. A note says what happened,
    unless the true event is the last word of the log: then its writer is between the event and the status.
    """
    true, status = _true_event(history), true_status(history)
    was = set_status(instance, run.run_id, status)
    if was is not None and _events(instance, run.run_id, _SETS_A_STATUS)[-1:] != [true]:
        append_event(instance, run, restored(f"the run is {status.value}, and a late event made it {was.value}"))
    return status


def repair_late_canceling(instance: DagsterInstance, run_id: str) -> DagsterRunStatus | None:
    """After a RUN_CANCELING was written: had the run ended before it? If so, restore its status and return it.

    A run may end between reading its status and writing CANCELING. Then nobody would ever finish it.
    """
    history = terminal_events(instance, run_id)
    run = instance.get_run_by_id(run_id) if history else None
    if run is None or run.status is not DagsterRunStatus.CANCELING:
        return None
    return restore(instance, run, history)


def repair_early_end(instance: DagsterInstance, run_id: str) -> bool:
    """After a RUN_START was written: whether the run had ended before it, or was to be stopped; if so, restore that.

    A RUN_START makes the run STARTED whatever it was before, and then nobody would see that it is to be stopped.
    """
    history = _events(instance, run_id, _TERMINAL | {DagsterEventType.RUN_CANCELING})
    ends = [kind for kind in history if kind in _TERMINAL]
    run = instance.get_run_by_id(run_id) if history else None
    if run is None:
        return bool(history)
    if ends and run.status is not true_status(ends):
        restore(instance, run, ends)
    elif not ends and run.status is DagsterRunStatus.STARTED:
        instance.report_run_canceling(run)
    return True


def _true_event(history: Sequence[DagsterEventType]) -> DagsterEventType:
    return DagsterEventType.RUN_CANCELED if DagsterEventType.RUN_CANCELED in history else history[0]


def _events(instance: DagsterInstance, run_id: str, of: set[DagsterEventType]) -> list[DagsterEventType]:
    events = [event_of(entry) for entry in instance.all_logs(run_id, of_type=of)]
    return [event.event_type for event in events if event is not None]
