"""`cancellation_token()` in a taskiq task: what an interrupt is there, and the shield that holds it back.

Knows asyncio and threads; no queues.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.cancellation.token import CancellationToken
from dagster_taskiq.errors import TaskCancelled


class TaskToken:
    """The `TokenBackend` of one task. `interrupt` of the constructor cancels the task's coroutine."""

    def __init__(self, signal: CancelSignal, interrupt: Callable[[], None]) -> None:
        self._signal = signal
        self._interrupt = interrupt
        self._shielded = False
        self._held_back = False
        self.kept = State()
        """What the task keeps in `token.state`, for as long as this worker has the task."""

    def get(self) -> CancellationToken:
        """See `cancellation_token`."""
        return CancellationToken(self._signal, self)

    def interrupt(self) -> None:
        """Now, or at the end of the shield."""
        if self._shielded:
            self._held_back = True
        else:
            self._interrupt()

    def error(self, cancellation: Cancellation) -> BaseException:
        """See `TokenBackend`. A coroutine gets what asyncio would give it."""
        if _in_coroutine():
            return asyncio.CancelledError(cancellation.reason)
        return TaskCancelled(cancellation.reason)

    def holding_interrupts(self) -> AbstractContextManager[None]:
        """See `TokenBackend`. A function in a thread is not interrupted anyway."""
        return self._holding_interrupts() if _in_coroutine() else nullcontext()

    @contextmanager
    def _holding_interrupts(self) -> Iterator[None]:
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
            held_back, self._held_back = self._held_back, False
            if held_back:
                cancellation = self._signal.cancellation
                raise asyncio.CancelledError(cancellation.reason if cancellation is not None else None)

    def state(self) -> State:
        """See `TokenBackend`."""
        return self.kept


def _in_coroutine() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
