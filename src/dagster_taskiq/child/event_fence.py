"""The fence: which events this process may write, once it has to stop. Knows Dagster's events; not processes.

Once a run's process has to stop, it writes no terminal run event itself: it hands it to the supervisor. And so it does
while threads of the run's ops still run: a run is final when nothing of it runs any more.
"""

import sys
from collections.abc import Mapping
from typing import Any, Final

from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus

from dagster_taskiq.child.child_process import ChildProcess
from dagster_taskiq.child.control_channel import ControlChannel
from dagster_taskiq.child.stays import what_stays
from dagster_taskiq.cleanup.plan import handler_names
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, serialize_value
from dagster_taskiq.dagster_compat.definitions import job_of
from dagster_taskiq.dagster_compat.execution import failed_for_good
from dagster_taskiq.dagster_compat.interrupts import DagsterExecutionInterruptedError
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.storage import event_of, is_stored
from dagster_taskiq.messages import StepMessage
from dagster_taskiq.storage.cleanup_events import cleanup_handlers
from dagster_taskiq.storage.engine_events import PATIENCE_KEY, TASK_ID_KEY
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.status_repair import repair_early_end
from dagster_taskiq.storage.step_state import forget_states

_TERMINAL: Final = {DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_CANCELED}
_BEFORE_MORE_WORK: Final = {
    DagsterEventType.STEP_START,
    DagsterEventType.STEP_UP_FOR_RETRY,
    DagsterEventType.STEP_RESTARTED,
}
_STEP_ENDS: Final = {
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
    DagsterEventType.STEP_SKIPPED,
    DagsterEventType.RESOURCE_INIT_FAILURE,  # from which the run's executor makes a failure or a retry
}
_UNLESS_ORPHANED: Final = {DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY}
_UNLESS_INTERRUPTED: Final = {*_UNLESS_ORPHANED, DagsterEventType.RESOURCE_INIT_FAILURE}
_LONGEST_REASON: Final = 500
_EXIT_S: Final = 5.0
"""What a run's process has for its exit, after it has waited for its steps."""
_STOPPED: Final = {*FINISHED_STATUSES, DagsterRunStatus.CANCELING}


class EventFence:
    """Stands where the instance takes in events: `DagsterInstance.handle_new_event` of this process.

    Patient with the database: Dagster would have the op fail when it is away for a moment.
    """

    def __init__(self, instance: DagsterInstance, run_id: str, control: ControlChannel) -> None:
        self._instance = instance
        self._store = instance.handle_new_event
        self._run_id = run_id
        self._control = control

    def __call__(self, event: Any, *, batch_metadata: Any = None) -> None:
        """As `handle_new_event`, unless the event is held back."""
        dagster_event = event_of(event)
        ours = dagster_event is not None and event.run_id == self._run_id
        kind = dagster_event.event_type if dagster_event is not None and ours else None
        if kind is DagsterEventType.RUN_FAILURE and dagster_event is not None:
            begins = f'Execution of run for "{dagster_event.job_name}" failed. '
            self._control.send(failed=str(dagster_event.message).removeprefix(begins)[:_LONGEST_REASON])
        if self._holds(event, kind):
            return
        entry = self._to_store(event, kind)
        tried = False

        def store() -> None:
            nonlocal tried
            # A try whose answer was lost may have been stored all the same.
            if not (tried and is_stored(self._instance, entry)):
                tried = True
                self._store(entry, batch_metadata=batch_metadata)

        retry_storage(store, "write to the event log")
        self._stored(event, kind)

    def _holds(self, event: Any, kind: DagsterEventType | None) -> bool:
        raise NotImplementedError

    def _to_store(self, event: Any, kind: DagsterEventType | None) -> Any:
        return event

    def _stored(self, event: Any, kind: DagsterEventType | None) -> None:
        raise NotImplementedError


class RunFence(EventFence):
    """Of a run's process: once that has to stop, or while threads keep it, its terminal event goes to the supervisor.

    And once another worker has the run, no event at all is written.
    """

    def __init__(self, instance: DagsterInstance, run_id: str, process: ChildProcess) -> None:
        super().__init__(instance, run_id, process.control)
        self._process = process

    def _holds(self, event: Any, kind: DagsterEventType | None) -> bool:
        if event.run_id == self._run_id and self._control.is_lost():
            return True  # the run's log is another worker's
        if kind is DagsterEventType.RUN_START and self._is_stopped():
            # Between core's last look and this event it builds the plan, which takes seconds for thousands of assets.
            raise DagsterExecutionInterruptedError
        if kind not in _TERMINAL:
            return False
        must_stop = self._must_stop()
        if not must_stop and not what_stays():
            return False
        self._control.send(
            verdict=kind.value,
            took_hold=self._process.interrupted,
            came_first=not must_stop,
            entry=serialize_value(event),
        )
        return True

    def _must_stop(self) -> bool:
        if self._process.interrupts.came or self._process.interrupted or self._control.must_stop():
            return True
        return self._is_stopped()

    def _is_stopped(self) -> bool:
        run = retry_storage(lambda: self._instance.get_run_by_id(self._run_id), "read the run")
        return run is None or run.status in _STOPPED

    def _stored(self, event: Any, kind: DagsterEventType | None) -> None:
        if kind is DagsterEventType.RUN_START:
            stopped = retry_storage(lambda: repair_early_end(self._instance, self._run_id), "look for an early end")
            self._announce_handlers()
            if stopped:
                raise DagsterExecutionInterruptedError
        elif kind is DagsterEventType.STEP_WORKER_STARTING and TASK_ID_KEY not in _metadata(event):
            # Not by our own executor: what is started next, here, can receive a cancellation, too.
            self._process.admit()
        elif kind is DagsterEventType.RUN_SUCCESS and self._process.state_kept:
            forget_states(self._instance, self._run_id)
        elif kind is DagsterEventType.ENGINE_EVENT:
            self._ask_for_patience(event)
        if kind in _BEFORE_MORE_WORK and self._control.must_stop():
            # An op that swallowed the interrupt, or one with a RetryPolicy, would go on to its next step or attempt.
            raise DagsterExecutionInterruptedError

    def _ask_for_patience(self, event: Any) -> None:
        metadata = _metadata(event)
        if PATIENCE_KEY in metadata:
            # The executor announces that it waits for its steps to stop, wherever they run.
            self._control.send(patience_s=float(metadata[PATIENCE_KEY].value) + _EXIT_S)

    def _announce_handlers(self) -> None:
        """So that whoever ends the run knows, without its code, whether there is something to be done."""
        if "dagster_taskiq.op_api" not in sys.modules:
            return  # nobody has imported `on_cancel`
        run = retry_storage(lambda: self._instance.get_run_by_id(self._run_id), "read the run")
        names = handler_names(job_of(run, self._instance)) if run is not None else []
        if run is not None and names:
            event = cleanup_handlers(names)
            retry_storage(lambda: append_event(self._instance, run, event), "write to the event log")


def _metadata(event: Any) -> Mapping[str, Any]:
    return getattr(event.dagster_event.event_specific_data, "metadata", None) or {}


class StepFence(EventFence):
    """Of a step's process: it writes how the step ended, unless its worker is gone."""

    def __init__(self, instance: DagsterInstance, message: StepMessage, process: ChildProcess) -> None:
        super().__init__(instance, message.run_id, process.control)
        self._process = process
        self._step_key = message.step_key
        self._succeeded = False
        self._begins_again = message.begins_again

    def forget_state(self) -> None:
        """When the step is over with its hooks and resources, which may keep a state, too: delete it, if it is done."""
        if self._succeeded and self._process.state_kept:
            forget_states(self._instance, self._run_id, self._step_key)

    def _holds(self, event: Any, kind: DagsterEventType | None) -> bool:
        # What a worker's death did to a step is no failure of the op: the run's executor finds the worker dead, and
        # decides. A success is one.
        if kind in _UNLESS_ORPHANED and (self._control.worker_is_gone() or self._control.is_lost()):
            return True
        return kind in _UNLESS_INTERRUPTED and self._is_interrupted()

    def _is_interrupted(self) -> bool:
        """Whether the worker stops, and so the run's executor is to decide what becomes of the step."""
        self._control.listen()
        return self._begins_again and self._control.signal.is_shutdown and not self._control.late

    def _to_store(self, event: Any, kind: DagsterEventType | None) -> Any:
        # For Dagster an interrupt is an error like any other, of which an op with a RetryPolicy recovers.
        cancelled = kind is DagsterEventType.STEP_UP_FOR_RETRY and self._control.must_stop()
        return failed_for_good(event) if cancelled else event

    def _stored(self, event: Any, kind: DagsterEventType | None) -> None:
        if kind in _STEP_ENDS and event.dagster_event.step_key == self._step_key:
            self._control.send(step_ended=kind.value)
        if kind is DagsterEventType.STEP_SUCCESS:
            self._succeeded = True
        if kind in _BEFORE_MORE_WORK and self._control.must_stop():
            raise DagsterExecutionInterruptedError
