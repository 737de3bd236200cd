"""`cancellation_token()` in an op: what an interrupt is there, and where its state is kept.

Knows Dagster's ops and their interrupts; not how a process learns of a cancellation.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from dagster import DagsterExecutionInterruptedError

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
    return asyncio.CancelledError(cancellation.reason)


class InterruptsOfProcess(Protocol):
    """The interrupts of the process in which the op runs, as far as its token needs them."""

    def take(self) -> None:
        """The work is about to interrupt itself: the interrupt that is on its way comes too late."""

    def shields_ended(self, *, abandoned: bool) -> None:
        """See `TokenBackend`."""


class OpToken:
    """The `TokenBackend` of one step."""

    def __init__(
        self,
        interrupts: InterruptsOfProcess,
        step: StepOfRun | str,
        state_of: Callable[[StepOfRun], State],
    ) -> None:
        """`step`: or why it is not known."""
        self._interrupts = interrupts
        self._step = step
        self._state_of = state_of

    def error(self, cancellation: Cancellation) -> BaseException:
        """See `TokenBackend`."""
        self._interrupts.take()
        return interrupt_of_op(cancellation)

    def shields_ended(self, *, abandoned: bool) -> None:
        """See `TokenBackend`."""
        self._interrupts.shields_ended(abandoned=abandoned)

    def state(self) -> State:
        """See `TokenBackend`. Raises `StateError` where it is not known for which step."""
        step = self._step
        if isinstance(step, str):
            raise StateError(
                f"{step}, so its state is unknown: call cancellation_token() in the op, and pass the token on"
            )
        return self._state_of(step)
