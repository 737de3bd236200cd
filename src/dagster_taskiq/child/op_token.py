"""`cancellation_token()` in an op: what an interrupt is there, and where its state is kept.

Knows Dagster's ops and their interrupts; not how a process learns of a cancellation.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from dagster import DagsterExecutionInterruptedError

from dagster_taskiq.cancellation.current import current_process
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.child.current_step import StepOfRun
from dagster_taskiq.errors import StateError


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
    """The `TokenBackend` of one step."""

    def __init__(
        self,
        process: InterruptedProcess,
        step: StepOfRun | str,
        state_of: Callable[[StepOfRun], State],
    ) -> None:
        """`step`: or why it is not known."""
        self._process = process
        self._step = step
        self._state_of = state_of

    def error(self, cancellation: Cancellation) -> BaseException:
        """See `TokenBackend`."""
        self._process.take_interrupt()
        return interrupt_of_op(cancellation)

    def holding_interrupts(self) -> AbstractContextManager[None]:
        """See `TokenBackend`."""
        return self._process.holding_interrupts()

    def state(self) -> State:
        """See `TokenBackend`. Raises `StateError` where it is not known for which step."""
        step = self._step
        if isinstance(step, str):
            raise StateError(
                f"{step}, so its state is unknown: call cancellation_token() in the op, and pass the token on"
            )
        return self._state_of(step)
