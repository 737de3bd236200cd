"""`cancellation_token()` in an op: what an interrupt is there, and where its state is kept.

Knows Dagster's ops and their interrupts; not how a process learns of a cancellation.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from dagster import DagsterExecutionInterruptedError, DagsterInstance

from dagster_taskiq.cancellation.current import current_process
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.storage.step_state import state_of


class OpCancelled(DagsterExecutionInterruptedError):
    """Raised by `raise_if_cancelled`, and at the end of a shield, in an op. For Dagster an interrupt like any other.

    As `asyncio.CancelledError` it is no `Exception`, so that no `except Exception` takes it for an error. `reason` is
    what the canceller gave, or None.
    """

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(f"cancelled: {reason}" if reason else "cancelled")
        self.reason = reason


def interrupt_of_op(cancellation: Cancellation) -> BaseException:
    """What interrupts an op: its coroutine, if it is one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return OpCancelled(cancellation.reason)
    current_process().record_interrupt()
    return asyncio.CancelledError(cancellation.reason)


class InterruptedProcess(Protocol):
    """The process in which the op runs, as far as its token needs it."""

    def take_interrupt(self) -> None:
        """Wait for the interrupt of a cancellation that is known already, and take it in."""

    def holding_interrupts(self) -> AbstractContextManager[None]:
        """See `TokenBackend`."""


class OpToken:
    """The `TokenBackend` of the op `step_key` of a run. `on_state` is called when the op keeps something."""

    def __init__(
        self,
        process: InterruptedProcess,
        instance: DagsterInstance,
        run_id: str,
        step_key: str | None,
        on_state: Callable[[], None],
    ) -> None:
        self._process = process
        self._instance = instance
        self._run_id = run_id
        self._step_key = step_key
        self._on_state = on_state

    def error(self, cancellation: Cancellation) -> BaseException:
        """See `TokenBackend`."""
        self._process.take_interrupt()
        return interrupt_of_op(cancellation)

    def holding_interrupts(self) -> AbstractContextManager[None]:
        """See `TokenBackend`."""
        return self._process.holding_interrupts()

    def state(self) -> State:
        """See `TokenBackend`."""
        if self._step_key is None:
            return State()
        return state_of(self._instance, self._run_id, self._step_key, self._on_state)
