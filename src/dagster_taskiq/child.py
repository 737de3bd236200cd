"""What runs inside the child: handlers first, then the fence, then Dagster. Knows Dagster; not asyncio, not SQS.

The *fence*: once this process was told to stop, in whatever way, it writes no terminal run event itself. It hands
its verdict to the supervisor, which writes the final state when the whole process tree is gone. A step's process
writes how its step ended, unless its worker is gone: then the run decides what becomes of the step.
"""

import signal
import socket
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus

from dagster_taskiq import cancellation, handlers, sqs
from dagster_taskiq import dagster_internals as core
from dagster_taskiq.claims import write_note
from dagster_taskiq.cleanup import Cleanup
from dagster_taskiq.cleanup_plan import handler_names
from dagster_taskiq.database import patiently_asking
from dagster_taskiq.events import PATIENCE_KEY, TASK_ID_KEY, cleanup_handlers
from dagster_taskiq.messages import StepOrder, unpack
from dagster_taskiq.op_state import forget_states
from dagster_taskiq.op_token import OpProcess
from dagster_taskiq.voice import Voice

WARM_UP: Final = "dagster_taskiq.child:warm_up"
RUN_TARGET: Final = "dagster_taskiq.child:run"
STEP_TARGET: Final = "dagster_taskiq.child:step"
CLEANUP_TARGET: Final = "dagster_taskiq.child:cleanup"
PRELOAD: Final = ("dagster_taskiq.child", "dagster_taskiq.executor")

_INTERRUPTS: Final = {signal.SIGTERM, signal.SIGINT}
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
_EXIT_S: Final = 5.0
"""What a run's process has for its exit, after it has waited for its steps."""
_STOPPED: Final = {*core.FINISHED_STATUSES, DagsterRunStatus.CANCELING}
_BODIES: Final = {"execute_run": core.execute_run, "resume_run": core.resume_run}


def warm_up(instance_ref: str) -> None:
    """Runs in the fork server: open the instance once and close it again, so that forks find everything imported.

    Leaves no connection and no thread behind.
    """
    core.read_migration_scripts_once()
    sqs.warm_up()
    with DagsterInstance.from_ref(core.deserialize_value(instance_ref, core.InstanceRef)) as instance:
        instance.get_run_by_id("warm-up")
        with suppress(Exception):  # a storage that has never seen this run may say so
            instance.all_logs("warm-up")


def run(argument: dict[str, Any], channel: socket.socket) -> int:
    """Execute or resume the run that `argument` names. Starts with SIGTERM and SIGINT blocked; returns an exit code."""
    return _work(_run, argument, channel)


def step(argument: dict[str, Any], channel: socket.socket) -> int:
    """Execute the step that `argument` names. Starts with SIGTERM and SIGINT blocked; returns an exit code."""
    return _work(_step, argument, channel)


def cleanup(argument: dict[str, Any], channel: socket.socket) -> int:
    """Run the cleanup handlers of the run that `argument` names. Starts with SIGTERM and SIGINT blocked, as `run`."""
    return _work(_cleanup, argument, channel)


def _work(body: Callable[[dict[str, Any], DagsterInstance, Voice], int], argument: Any, channel: Any) -> int:
    voice = Voice(channel)
    cancellation.told = cancellation.Told(voice.told_to_cancel, voice.worker_is_gone, voice.why)
    with core.capture_interrupts():
        # From here on a signal is either captured (and seen at the next step) or raised inside the op.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        try:
            core.read_migration_scripts_once()
            reference = core.deserialize_value(argument["instance_ref"], core.InstanceRef)
            with DagsterInstance.from_ref(reference) as instance:
                return body(argument, instance, voice)
        except BaseException as error:  # noqa: BLE001 - the supervisor decides what it means; nothing may be lost
            traceback.print_exc()
            voice.say(error=f"{type(error).__name__}: {error}"[:2000])
            return 1
        finally:
            # What comes now comes too late to matter, and must not tear the exit.
            signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
            voice.say(finished=True)


def _run(argument: dict[str, Any], instance: DagsterInstance, voice: Voice) -> int:
    run_id = argument["run_id"]
    fence = _RunFence(instance, run_id, voice, OpProcess(voice, instance, run_id))
    core.hook_interrupts(fence.note_interrupt)
    instance.handle_new_event = fence  # type: ignore[method-assign]
    return _BODIES[argument["kind"]](run_id, instance)


def _step(argument: dict[str, Any], instance: DagsterInstance, voice: Voice) -> int:
    order = StepOrder.from_kwargs(argument["order"])
    run = patiently_asking(lambda: instance.get_run_by_id(order.run_id), "read the run")
    if run is None:
        raise LookupError(f"run {order.run_id} was deleted")
    process = OpProcess(voice, instance, order.run_id)
    instance.handle_new_event = _StepFence(instance, order, voice, process)  # type: ignore[method-assign]
    state = core.rebuild_state(unpack(order.state or ""), run, instance, history=order.reexecution)
    for _ in core.execute_step(run, instance, order.step_key, state, core.RetryMode(order.retries)):
        pass  # the events are in the database; nobody reads them here
    return 0


def _cleanup(argument: dict[str, Any], instance: DagsterInstance, voice: Voice) -> int:
    run = patiently_asking(lambda: instance.get_run_by_id(argument["run_id"]), "read the run")
    if run is not None:
        outcome = Cleanup(instance, run, argument["worker_id"], tell=lambda what: voice.say(cleaning=what)).run()
        voice.say(cleaned=not outcome.stopped)
    return 0


class _Fence:
    """Stands where the instance takes in events: `DagsterInstance.handle_new_event` of this process.

    Patient with the database: Dagster would have the op fail when it is away for a moment.
    """

    def __init__(self, instance: DagsterInstance, run_id: str, voice: Voice) -> None:
        self._instance = instance
        self._store = instance.handle_new_event
        self._run_id = run_id
        self._voice = voice

    def __call__(self, event: Any, *, batch_metadata: Any = None) -> None:
        dagster_event = core.event_of(event)
        ours = dagster_event is not None and event.run_id == self._run_id
        kind = dagster_event.event_type if dagster_event is not None and ours else None
        if self._holds(event, kind):
            return
        told = self._as_told(event, kind)
        tried = False

        def store() -> None:
            nonlocal tried
            # A try whose answer was lost may have been stored all the same.
            if not (tried and core.is_stored(self._instance, told)):
                tried = True
                self._store(told, batch_metadata=batch_metadata)

        patiently_asking(store, "write to the event log")
        self._stored(event, kind)

    def _holds(self, event: Any, kind: DagsterEventType | None) -> bool:
        raise NotImplementedError

    def _as_told(self, event: Any, kind: DagsterEventType | None) -> Any:
        return event

    def _stored(self, event: Any, kind: DagsterEventType | None) -> None:
        raise NotImplementedError


class _RunFence(_Fence):
    def __init__(self, instance: DagsterInstance, run_id: str, voice: Voice, process: OpProcess) -> None:
        super().__init__(instance, run_id, voice)
        self._process = process
        self._took_hold = False
        self._canceling = False

    def note_interrupt(self) -> None:
        """An interrupt is being raised inside the op (or inside Dagster)."""
        self._took_hold = True

    def _holds(self, event: Any, kind: DagsterEventType | None) -> bool:
        if kind not in _TERMINAL or not self._must_hold():
            return False
        self._voice.say(verdict=kind.value, took_hold=self._took_hold, entry=core.serialize_value(event))
        return True

    def _must_hold(self) -> bool:
        if self._took_hold or core.check_captured_interrupt() or self._voice.told_to_stop():
            return True
        run = patiently_asking(lambda: self._instance.get_run_by_id(self._run_id), "read the run")
        return run is None or run.status in _STOPPED

    def _stored(self, event: Any, kind: DagsterEventType | None) -> None:
        if kind is DagsterEventType.RUN_START:
            self._mend_canceling()
            self._announce_handlers()
        elif kind is DagsterEventType.STEP_WORKER_STARTING and TASK_ID_KEY not in _metadata(event):
            # Not by our own executor: what is started next, here, can hear of a cancellation, too.
            self._process.admit()
        elif kind is DagsterEventType.RUN_SUCCESS and self._process.state_kept:
            forget_states(self._instance, self._run_id)
        elif kind is DagsterEventType.ENGINE_EVENT:
            self._ask_for_patience(event)
        if kind in _BEFORE_MORE_WORK and (self._canceling or self._voice.told_to_stop()):
            # An op that swallowed the interrupt, or one with a RetryPolicy, would go on to its next step or attempt.
            raise core.DagsterExecutionInterruptedError

    def _ask_for_patience(self, event: Any) -> None:
        metadata = _metadata(event)
        if PATIENCE_KEY in metadata:
            # The executor says that it waits for its steps to stop, wherever they run.
            self._voice.say(patience_s=float(metadata[PATIENCE_KEY].value) + _EXIT_S)

    def _announce_handlers(self) -> None:
        """So that whoever ends the run knows, without its code, whether there is something to be done."""
        if not handlers.in_use():
            return
        run = patiently_asking(lambda: self._instance.get_run_by_id(self._run_id), "read the run")
        names = handler_names(core.job_of(run, self._instance)) if run is not None else []
        if run is not None and names:
            note = cleanup_handlers(names)
            patiently_asking(lambda: write_note(self._instance, run, note), "write to the event log")

    def _mend_canceling(self) -> None:
        # Transitions are unguarded: a RUN_START that follows a RUN_CANCELING makes the run STARTED again, and then
        # nobody would see in the database that it is to be stopped.
        if self._instance.all_logs(self._run_id, of_type=DagsterEventType.RUN_CANCELING):
            run = self._instance.get_run_by_id(self._run_id)
            if run is not None and run.status is DagsterRunStatus.STARTED:
                self._instance.report_run_canceling(run)
            self._canceling = True


def _metadata(event: Any) -> Mapping[str, Any]:
    return getattr(event.dagster_event.event_specific_data, "metadata", None) or {}


class _StepFence(_Fence):
    def __init__(self, instance: DagsterInstance, order: StepOrder, voice: Voice, process: OpProcess) -> None:
        super().__init__(instance, order.run_id, voice)
        self._process = process
        self._step_key = order.step_key

    def _holds(self, event: Any, kind: DagsterEventType | None) -> bool:
        # What a worker's death did to a step is no failure of the op: the run's executor finds the worker dead, and
        # decides. A success is one.
        return kind in _UNLESS_ORPHANED and self._voice.worker_is_gone()

    def _as_told(self, event: Any, kind: DagsterEventType | None) -> Any:
        # For Dagster an interrupt is an error like any other, of which an op with a RetryPolicy recovers.
        cancelled = kind is DagsterEventType.STEP_UP_FOR_RETRY and self._voice.told_to_stop()
        return core.failed_for_good(event) if cancelled else event

    def _stored(self, event: Any, kind: DagsterEventType | None) -> None:
        if kind in _STEP_ENDS and event.dagster_event.step_key == self._step_key:
            self._voice.say(step_ended=kind.value)
        if kind is DagsterEventType.STEP_SUCCESS and self._process.state_kept:
            forget_states(self._instance, self._run_id, self._step_key)
        if kind in _BEFORE_MORE_WORK and self._voice.told_to_stop():
            raise core.DagsterExecutionInterruptedError
