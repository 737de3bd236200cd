"""`cancellation_token()` in an op: what an interrupt is there, and where its state is kept.

Knows Dagster's ops and interrupts, and the process in which they run: a child of a worker, or a process of Dagster's
multiprocess executor below one, which joins when it is first asked.
"""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

from dagster import DagsterExecutionInterruptedError, DagsterInstance

from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.cancellation.token import CancellationToken, Cause, never, provide
from dagster_taskiq.child.control_channel import ADDRESS_VARIABLE, ControlChannel, join
from dagster_taskiq.child.control_listener import ControlListener
from dagster_taskiq.dagster_compat.definitions import current_op
from dagster_taskiq.dagster_compat.interrupts import (
    capture_interrupts,
    check_captured_interrupt,
    interrupt_coroutines,
    on_interrupt,
    record_interrupt,
)
from dagster_taskiq.storage.step_state import state_of

_ON_ITS_WAY_S: Final = 2.0
"""The signal follows the intent within milliseconds; in a process of Dagster's own it is passed on by its parent."""


class OpCancelled(DagsterExecutionInterruptedError):
    """Raised by `raise_if_cancelled`, and at the end of a shield, in an op. For Dagster an interrupt like any other.

    As `asyncio.CancelledError` it is no `Exception`, so that no `except Exception` takes it for an error. `reason` is
    what the canceller said, or None.
    """

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(f"cancelled: {reason}" if reason else "cancelled")
        self.reason = reason


def interrupt_of_op(cause: Cause) -> BaseException:
    """What interrupts an op: its coroutine, if it is one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return OpCancelled(cause.reason)
    record_interrupt()
    return asyncio.CancelledError(cause.reason)


class _Op:
    """The surroundings of the op `step_key` of a run."""

    def __init__(self, process: "OpProcess", instance: DagsterInstance, run_id: str, step_key: str | None) -> None:
        self._process = process
        self._instance = instance
        self._run_id = run_id
        self._step_key = step_key

    def error(self, cause: Cause) -> BaseException:
        self._process.take_interrupt()
        return interrupt_of_op(cause)

    def holding_interrupts(self) -> AbstractContextManager[None]:
        return self._process.holding_interrupts()

    def state(self) -> State:
        if self._step_key is None:
            return State()
        return state_of(self._instance, self._run_id, self._step_key, self._process.note_state)


class OpProcess:
    """A process in which ops run, and which is told of their cancellation."""

    def __init__(self, control: ControlChannel, instance: DagsterInstance | None = None, run_id: str = "") -> None:
        self.control = control
        self._instance = instance
        self._run_id = run_id
        self._step_key: str | None = None
        self._listener: ControlListener | None = None
        self.state_kept = False
        """Whether an op has a state that is to be deleted in the end."""
        self._admits = False
        self._interrupted = False
        global _here
        _here = self
        control.signal.on_shield = lambda name: control.send(shield=name)
        on_interrupt(self._record_interrupt)
        interrupt_coroutines(lambda: control.signal.cancelled)
        provide(self.token)

    def _record_interrupt(self) -> None:
        """In the signal handler: what was told before the signal is known when the op sees the interrupt."""
        self._interrupted = True
        self.control.wait_for_intent()
        if self.control.signal.cause is None:
            self.control.signal.record(Cause(CancelKind.SHUTDOWN))  # a signal from elsewhere
        if self._listener is not None:
            self._listener.wake()

    def take_interrupt(self) -> None:
        """Of a cancellation that is known, but whose interrupt is only on its way: wait for it, and take it in.

        Otherwise it would come into the middle of the op's `finally`, which has begun to run because of the token.
        """
        if self._interrupted or threading.current_thread() is not threading.main_thread():
            return
        with capture_interrupts():
            until = time.monotonic() + _ON_ITS_WAY_S
            while not check_captured_interrupt() and time.monotonic() < until:
                time.sleep(0.001)

    @contextmanager
    def holding_interrupts(self) -> Iterator[None]:
        """See `token.TokenBackend`."""
        if threading.current_thread() is not threading.main_thread():
            yield  # no interrupt comes here
            return
        signal, came = self.control.signal, False
        known_before = signal.cancelled
        try:
            with capture_interrupts():
                try:
                    yield
                finally:
                    came = check_captured_interrupt()
        finally:
            if not came and signal.cancelled and not known_before:
                self.take_interrupt()
                came = True
            if came:  # also instead of an error in the block, which becomes its context
                raise interrupt_of_op(signal.cause or Cause(CancelKind.SHUTDOWN))

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

    def _relay(self, message: dict[str, Any]) -> None:
        said = {key: message[key] for key in ("shield", "state") if key in message}
        self.state_kept = self.state_kept or "state" in said
        if said:
            self.control.send(**said)

    def note_state(self) -> None:
        """An op keeps something in its state."""
        if not self.state_kept:
            self.state_kept = True
            self.control.send(state=True)

    def token(self) -> CancellationToken | None:
        """Of the op that runs here."""
        self.listener()
        context = current_op()
        if context is not None:
            self._instance, self._run_id = context.instance, context.run_id
            self._step_key = context.get_step_execution_context().step.key
        if self._instance is None:
            return None
        # In a thread of the op's there is no context; the step is the one that asked last.
        return CancellationToken(self.control.signal, _Op(self, self._instance, self._run_id, self._step_key))


_here: OpProcess | None = None
_states: Final[WeakKeyDictionary[Any, State]] = WeakKeyDictionary()


def join_worker() -> OpProcess | None:
    """Where this is a process that Dagster has started below a child of a worker: hear what the child hears."""
    address = os.environ.get(ADDRESS_VARIABLE)
    if _here is None and address is not None and (control := join(address)) is not None:
        return OpProcess(control)
    return _here


def token_of_op() -> CancellationToken | None:
    """Asked when nobody else provides a token. None when this is no op."""
    process = join_worker()
    if process is not None:
        return process.token()
    context = current_op()
    return never(_states.setdefault(context, State())) if context is not None else None
