"""Whose cancellation is it, here? The one place where a process, a task or a test registers, and where others look.

Knows tokens; neither Dagster nor taskiq.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Protocol

from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.cancellation.token import CancellationToken


class CancellableProcess(Protocol):
    """A process that works for a worker, which tells it when to stop. No answer takes I/O to speak of."""

    @property
    def cancellation(self) -> Cancellation | None:
        """Why it is to stop, if it is."""

    def is_cancelled(self) -> bool:
        """Whether somebody asked for the end of its work, so that it does not go on elsewhere."""

    def is_orphaned(self) -> bool:
        """Whether its worker is gone: the next one decides what becomes of the work."""

    def token(self) -> CancellationToken | None:
        """The token of the op that calls this; None when there is none."""


class _NoWorker:
    """A process that no worker of ours has started: under any other launcher, in a test, in a notebook."""

    cancellation = None

    def is_cancelled(self) -> bool:
        return False

    def is_orphaned(self) -> bool:
        return False

    def token(self) -> CancellationToken | None:
        return None


NO_WORKER: Final = _NoWorker()
TASK_TOKEN: Final[ContextVar[Callable[[], CancellationToken] | None]] = ContextVar("TASK_TOKEN", default=None)
"""Set by a taskiq worker around each task."""
_process: CancellableProcess = NO_WORKER
_of_test: CancellationToken | None = None


def enter_process(process: CancellableProcess) -> None:
    """From now on this process is that one, in all of its threads."""
    global _process
    _process = process


def current_process() -> CancellableProcess:
    """What this process knows of its worker; `NO_WORKER` when it has none."""
    return _process


def current_token() -> CancellationToken | None:
    """The token of whoever calls this: that of a test, else of a taskiq task, else of an op."""
    if _of_test is not None:
        return _of_test
    of_task = TASK_TOKEN.get()
    return of_task() if of_task is not None else _process.token()


@contextmanager
def token_of_test(token: CancellationToken) -> Iterator[None]:
    """As long as this lasts, it is the token of everybody, in every thread."""
    global _of_test
    before, _of_test = _of_test, token
    try:
        yield
    finally:
        _of_test = before
