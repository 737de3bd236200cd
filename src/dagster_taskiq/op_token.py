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

from dagster_taskiq import dagster_internals as core
from dagster_taskiq import token
from dagster_taskiq.cancellation import CancelKind
from dagster_taskiq.op_state import state_of
from dagster_taskiq.state import State
from dagster_taskiq.token import CancellationToken, Cause
from dagster_taskiq.voice import ADDRESS_VARIABLE, Ear, Voice, join

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


def op_error(cause: Cause) -> BaseException:
    """What interrupts an op: its coroutine, if it is one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return OpCancelled(cause.reason)
    core.note_interrupt()
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
        return op_error(cause)

    def holding_interrupts(self) -> AbstractContextManager[None]:
        return self._process.holding_interrupts()

    def state(self) -> State:
        if self._step_key is None:
            return State()
        return state_of(self._instance, self._run_id, self._step_key, self._process.note_state)


class OpProcess:
    """A process in which ops run, and which is told of their cancellation."""

    def __init__(self, voice: Voice, instance: DagsterInstance | None = None, run_id: str = "") -> None:
        self.voice = voice
        self._instance = instance
        self._run_id = run_id
        self._step_key: str | None = None
        self._ear: Ear | None = None
        self.state_kept = False
        """Whether an op has a state that is to be deleted in the end."""
        self._admits = False
        self._interrupted = False
        global _here
        _here = self
        voice.signal.tell_of_shield = lambda name: voice.say(shield=name)
        core.hook_interrupts(self._note_interrupt)
        core.interrupt_coroutines(lambda: voice.signal.cancelled)
        token.provide(self.token)

    def _note_interrupt(self) -> None:
        """In the signal handler: what was told before the signal is known when the op sees the interrupt."""
        self._interrupted = True
        self.voice.wait_for_intent()
        if self.voice.signal.cause is None:
            self.voice.signal.note(Cause(CancelKind.SHUTDOWN))  # a signal from elsewhere
        if self._ear is not None:
            self._ear.wake()

    def take_interrupt(self) -> None:
        """Of a cancellation that is known, but whose interrupt is only on its way: wait for it, and take it in.

        Otherwise it would come into the middle of the op's `finally`, which has begun to run because of the token.
        """
        if self._interrupted or threading.current_thread() is not threading.main_thread():
            return
        with core.capture_interrupts():
            until = time.monotonic() + _ON_ITS_WAY_S
            while not core.check_captured_interrupt() and time.monotonic() < until:
                time.sleep(0.001)

    @contextmanager
    def holding_interrupts(self) -> Iterator[None]:
        """See `token.Surroundings`."""
        if threading.current_thread() is not threading.main_thread():
            yield  # no interrupt comes here
            return
        signal, came = self.voice.signal, False
        known_before = signal.cancelled
        try:
            with core.capture_interrupts():
                try:
                    yield
                finally:
                    came = core.check_captured_interrupt()
        finally:
            if not came and signal.cancelled and not known_before:
                self.take_interrupt()
                came = True
            if came:  # also instead of an error in the block, which becomes its context
                raise op_error(signal.cause or Cause(CancelKind.SHUTDOWN))

    def ear(self) -> Ear:
        """Listening begins when somebody wants to know: who does not use the token has no thread."""
        if self._ear is None:
            self._ear = Ear(self.voice, self._relay)
            self._ear.wake()
        return self._ear

    def admit(self) -> None:
        """Processes that will be started by this one can join."""
        if not self._admits:
            self._admits = True
            os.environ[ADDRESS_VARIABLE] = self.ear().admit()

    def _relay(self, message: dict[str, Any]) -> None:
        said = {key: message[key] for key in ("shield", "state") if key in message}
        self.state_kept = self.state_kept or "state" in said
        if said:
            self.voice.say(**said)

    def note_state(self) -> None:
        """An op keeps something in its state."""
        if not self.state_kept:
            self.state_kept = True
            self.voice.say(state=True)

    def token(self) -> CancellationToken | None:
        """Of the op that runs here."""
        self.ear()
        context = core.current_op()
        if context is not None:
            self._instance, self._run_id = context.instance, context.run_id
            self._step_key = context.get_step_execution_context().step.key
        if self._instance is None:
            return None
        # In a thread of the op's there is no context; the step is the one that asked last.
        return CancellationToken(self.voice.signal, _Op(self, self._instance, self._run_id, self._step_key))


_here: OpProcess | None = None
_states: Final[WeakKeyDictionary[Any, State]] = WeakKeyDictionary()


def join_worker() -> OpProcess | None:
    """Where this is a process that Dagster has started below a child of a worker: hear what the child hears."""
    address = os.environ.get(ADDRESS_VARIABLE)
    if _here is None and address is not None and (voice := join(address)) is not None:
        return OpProcess(voice)
    return _here


def token_of_op() -> CancellationToken | None:
    """Asked when nobody else provides a token. None when this is no op."""
    process = join_worker()
    if process is not None:
        return process.token()
    context = core.current_op()
    return token.never(_states.setdefault(context, State())) if context is not None else None
