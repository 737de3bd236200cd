"""A process in which ops run, and which learns of their cancellation.

It is a child of a worker, or a process of Dagster's multiprocess executor below one, which joins the child when it is
first asked for a token. Knows the control channel and Dagster's interrupts; not which work is done.
"""

import os
import threading
from typing import Any, Final
from weakref import WeakKeyDictionary

from dagster import DagsterRunStatus

from dagster_taskiq.cancellation.current import NO_WORKER, CancellableProcess, current_process, enter_process
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.cancellation.token import CancellationToken, never
from dagster_taskiq.cancellation.words import why_stopped
from dagster_taskiq.child.control_channel import ADDRESS_VARIABLE, ControlChannel, invitation, join
from dagster_taskiq.child.control_listener import ControlListener
from dagster_taskiq.child.current_step import CurrentStep, StepOfRun
from dagster_taskiq.child.interrupts import Interrupts
from dagster_taskiq.child.op_token import OpToken
from dagster_taskiq.child.step_limits import StepLimits
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.definitions import current_op
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.step_failures import tell_crashes, tell_interrupts
from dagster_taskiq.dagster_compat.step_scope import watch_process_of_step, watch_steps
from dagster_taskiq.storage.step_state import state_of

_RELAYED: Final = ("shield", "state", "step_limit", "step_stopped", "step_over", "step_finished")
_FROM_ELSEWHERE: Final = Cancellation(CancelKind.SHUTDOWN, cause="a signal came that its worker has not sent")


class ChildProcess:
    """This process, as everything in it may ask it: is it cancelled, was it interrupted, what is the op's token?"""

    def __init__(self, control: ControlChannel, of_step: StepOfRun | None = None) -> None:
        """Makes itself the process that `current_process` answers, and watches Dagster's interrupts and its steps.

        `of_step`: the only step that it is made for.
        """
        self.control = control
        self.state_kept = False
        """Whether an op has a state that is to be deleted in the end."""
        self._step = CurrentStep(of_step)
        self._states: dict[StepOfRun, State] = {}
        self._opening = threading.Lock()
        self._listener: ControlListener | None = None
        self._admits = False
        self._limits_of_guests: dict[object, str] = {}
        self.interrupts = Interrupts(control.signal, self._record_interrupt, self._listen)
        self._limits = StepLimits(control, self.interrupts.step_begins, self.interrupts.step_is_over)
        watch_steps(self)
        watch_process_of_step(self._step.is_made_for)
        tell_crashes(self._limits.why_gone)
        tell_interrupts(lambda _: self._why_stopped(of_step))
        enter_process(self)
        os.register_at_fork(after_in_child=self._forked)

    # What `current_process` is asked

    @property
    def cancellation(self) -> Cancellation | None:
        """See `CancellableProcess`."""
        return self.control.signal.cancellation

    def is_cancelled(self) -> bool:
        """See `CancellableProcess`."""
        return self.control.is_cancelled()

    def is_orphaned(self) -> bool:
        """See `CancellableProcess`."""
        return self.control.worker_is_gone()

    @property
    def interrupted(self) -> bool:
        """Whether the work was interrupted: in an op, or in Dagster."""
        return self.interrupts.delivered

    def _record_interrupt(self) -> None:
        """In the signal handler: what was sent before the signal is known when the op sees the interrupt."""
        self.control.wait_for_intent()
        if not self.control.signal.is_set:
            self.control.signal.record(_FROM_ELSEWHERE)
        if self._listener is not None:
            self._listener.wake()

    def _listen(self) -> None:
        """In a signal handler."""
        self.control.listen()
        if self._listener is not None:
            self._listener.wake()

    def _why_stopped(self, step: StepOfRun | None) -> str:
        """For the failure of a step that was interrupted. `step`: the only one, which can be cancelled by itself."""
        self.control.listen()
        if (of_limit := self._limits.why_failed) is not None:
            return f"stopped: {of_limit}"
        # It may have been interrupted because of the run's status, before it was told.
        cancellation = self.cancellation or Cancellation(CancelKind.REQUESTED)
        by_itself = step is not None and not _run_is_stopped(step)
        return why_stopped(cancellation, "step cancelled" if by_itself else "run terminated")

    def token(self) -> CancellationToken:
        """See `CancellableProcess`. Whoever asks has a listener from then on."""
        self.interrupts.route()  # a process that a thread has made to join has not done it yet
        self.listener()
        signal = self._limits.signal or self.control.signal
        return CancellationToken(signal, OpToken(self.interrupts, self._step.asked(), self._state_of))

    def finished(self) -> None:
        """All is done but the exit, for which an interpreter waits for its threads: of a process of one step."""
        self._limits.finished()

    # What `watch_steps` tells

    def began(self, context: Any) -> None:
        """See `StepWatcher`."""
        self._step.began(context.instance, context.run_id, context.step.key)
        self._limits.began(context)

    def torn_off(self, context: Any) -> None:
        """See `StepWatcher`."""
        self._limits.torn_off(context)

    def reported(self, context: Any) -> None:
        """See `StepWatcher`."""
        self._limits.reported(context)

    def fails_alone(self, _: Any) -> bool:
        """See `StepWatcher`."""
        return self._limits.why_failed is not None

    def ended(self, context: Any) -> None:
        """See `StepWatcher`."""
        try:
            self.interrupts.close_generators()
        finally:
            self._limits.ended(context)
            self._step.ended(context.instance, context.run_id, context.step.key)

    # Processes below this one

    def listener(self) -> ControlListener:
        """Listening begins when somebody wants to know: who does not use the token has no thread."""
        if self._listener is None:
            self._listener = ControlListener(self.control, self._relay)
            self._listener.wake()
        return self._listener

    def admit(self) -> None:
        """Processes that will be started by this one can join."""
        if not self._admits:
            self._admits = True
            os.environ[ADDRESS_VARIABLE] = self.listener().admit()

    def _forked(self) -> None:
        """In a fork of this process, of which the worker knows nothing: what is sent to us must not reach it."""
        if current_process() is self:
            enter_process(NO_WORKER)
            self.interrupts.forget()
            self._limits.forget()
            self.control.close()
            if self._listener is not None:
                self._listener.close()

    def _relay(self, guest: object, message: dict[str, Any] | None) -> None:
        if message is None:
            if (limit := self._limits_of_guests.pop(guest, None)) is not None:
                self.control.send(step_gone=limit)
            return
        if "step_limit" in message:
            self._limits_of_guests[guest] = message["step_limit"]["name"]
        relayed = {key: message[key] for key in _RELAYED if key in message}
        self.state_kept = self.state_kept or "state" in relayed
        if relayed:
            self.control.send(**relayed)

    def _state_of(self, step: StepOfRun) -> State:
        # One for all of the step's threads: each has what the others have kept.
        with self._opening:
            if step not in self._states:
                self._states[step] = state_of(step.instance, step.run_id, step.step_key, self._record_state)
            return self._states[step]

    def _record_state(self) -> None:
        if not self.state_kept:
            self.state_kept = True
            self.control.send(state=True)


def _run_is_stopped(step: StepOfRun) -> bool:
    run = retry_storage(lambda: step.instance.get_run_by_id(step.run_id), "read the run")
    return run is None or run.status in {*FINISHED_STATUSES, DagsterRunStatus.CANCELING}


_states: Final[WeakKeyDictionary[Any, State]] = WeakKeyDictionary()


def join_worker() -> CancellableProcess:
    """Where this is a process that Dagster has started below a child of a worker: listen to what the child receives."""
    address = invitation()
    if current_process() is NO_WORKER and address is not None and (control := join(address)) is not None:
        _Guest(control)
    return current_process()


class _Guest(ChildProcess):
    """A process that has joined."""

    def _forked(self) -> None:
        """As a step's, of the process from which the multiprocess executor forks its steps: each joins by itself."""
        if current_process() is self:
            super()._forked()
            join_worker()


def token_of_op() -> CancellationToken | None:
    """Asked when nobody else has a token. None when this is no op."""
    process = join_worker()
    if process is not NO_WORKER:
        return process.token()
    context = current_op()
    return never(_states.setdefault(context, State())) if context is not None else None
