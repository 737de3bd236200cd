"""`cancellation_token()` in a taskiq task: what an interrupt is there, and the shield that holds it back.

Knows asyncio and threads; no queues.
"""

import asyncio
from collections.abc import Callable
from typing import Any

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
        self._waits = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner: asyncio.Task[Any] | None = None
        self.kept = State()
        """What the task keeps in `token.state`, for as long as this worker has the task."""

    def get(self) -> CancellationToken:
        """See `cancellation_token`."""
        return CancellationToken(self._signal, self)

    def belongs_here(self) -> None:
        """Called by the asyncio task that runs the function, when it begins."""
        self._owner = asyncio.current_task()

    def interrupt(self) -> None:
        """Now, or when no shield is open any more. In the loop of the task."""
        self._loop = asyncio.get_running_loop()
        self._waits = True
        self._deliver()

    def _deliver(self) -> None:
        if self._waits and not self._signal.has_shields:
            self._waits = False
            self._interrupt()

    def error(self, cancellation: Cancellation) -> BaseException:
        """See `TokenBackend`. A coroutine gets what asyncio would give it."""
        if _in_coroutine():
            return asyncio.CancelledError(cancellation.reason)
        return TaskCancelled(cancellation.reason)

    def shields_ended(self, *, abandoned: bool) -> None:
        """See `TokenBackend`. In an inner task an error would be lost: a task group takes it for that task's end."""
        if not self._waits or self._loop is None:
            return
        if _in_coroutine() and asyncio.current_task() is self._owner and not abandoned:
            self._waits = False
            cancellation = self._signal.cancellation
            raise asyncio.CancelledError(cancellation.reason if cancellation is not None else None)
        self._loop.call_soon_threadsafe(self._deliver)

    def state(self) -> State:
        """See `TokenBackend`."""
        return self.kept


def _in_coroutine() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
