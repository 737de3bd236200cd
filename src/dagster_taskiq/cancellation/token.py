"""The token: is this work cancelled, why, by whom, and how long has it left? Answered without I/O.

Knows threads; neither Dagster nor taskiq nor processes: a backend knows what an interrupt is there.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.errors import TaskCancelled

logger = logging.getLogger(__name__)


class TokenBackend(Protocol):
    """What is around the work: an op of Dagster's, a task of taskiq's, nothing."""

    def error(self, cancellation: Cancellation) -> BaseException:
        """What `raise_if_cancelled` raises."""

    def shields_ended(self, *, abandoned: bool) -> None:
        """No shield is open any more: deliver the interrupt that waits, if there is one; here it is raised.

        `abandoned`: the block was left because its generator is thrown away, where an error would be lost.
        """

    def state(self) -> State:
        """Where `token.state` is kept."""


class CancellationToken:
    """Whether the work that holds it is cancelled. All but `state` is answered at once, from memory.

    Outside the workers of this package it is never cancelled, and its state is not kept.
    """

    __slots__ = ("_backend", "_signal", "_state")

    def __init__(self, signal: CancelSignal, backend: TokenBackend) -> None:
        """Made by `op_api.cancellation_token`."""
        self._signal = signal
        self._backend = backend
        self._state: State | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether the work is to end. Once true it stays true."""
        return self._signal.cancellation is not None

    def raise_if_cancelled(self) -> None:
        """Do nothing, or raise what an interrupt raises here.

        In an op: `OpCancelled`; in a coroutine: `asyncio.CancelledError`; in a taskiq task that is a plain function:
        `TaskCancelled`. The work is over when that leaves it.
        """
        cancellation = self._signal.cancellation
        if cancellation is not None:
            raise self._backend.error(cancellation)

    @property
    def reason(self) -> str | None:
        """The reason that was given, if any; of a DEADLINE which limit it is."""
        return cancellation.reason if (cancellation := self._signal.cancellation) is not None else None

    @property
    def requested_by(self) -> str | None:
        """Who asked for it, if that is known."""
        return cancellation.requested_by if (cancellation := self._signal.cancellation) is not None else None

    @property
    def kind(self) -> CancelKind | None:
        """REQUESTED by a person; DEADLINE: it took longer than it may; SHUTDOWN of the worker, after which the work may
        go on elsewhere; LEASE_LOST."""
        return cancellation.kind if (cancellation := self._signal.cancellation) is not None else None

    def remaining(self) -> float | None:
        """Seconds until the process is killed, 0 at the least; None when it is not cancelled, or nobody kills it."""
        cancellation = self._signal.cancellation
        if cancellation is None or cancellation.deadline is None:
            return None
        return max(0.0, cancellation.deadline - time.time())

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it is cancelled, at most `timeout` seconds; whether it is."""
        return self._signal.wait(timeout)

    @property
    def state(self) -> State:
        """What is to outlive this process: see `State`. Its cleanup handler finds it on whichever worker.

        Raises `StateError` where it is not known for which step the token is.
        """
        if self._state is None:
            self._state = self._backend.state()
        return self._state

    def on_cancelled(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have `call` called as soon as it is cancelled, in another thread; at once if it is cancelled already.

        For what blocks: end a subprocess, cancel a query, close a connection. An error in it is logged. Returns a
        function that takes it back.
        """
        return self._signal.on_notified(call)

    @contextmanager
    def shield(self, name: str | None = None) -> Iterator[None]:
        """A safe point: as long as the block lasts interrupts wait; at its end the one that came is raised.

        It may be left and entered again, by a `yield` or an `await`. Of several, side by side in tasks and threads,
        the last one counts: at its end the op, or the task, is interrupted that they are part of.

        It does not hold off the kill at the end of the grace; the run's log names the shield then (`name`, or where
        it stands).
        """
        if name is None:
            # This generator is called by contextlib, twice.
            caller = sys._getframe(2)  # noqa: SLF001 - what the inspect module would do, without reading files
            name = f"{caller.f_code.co_name}, line {caller.f_lineno}"
        abandoned = False
        self._signal.open_shield(name)
        try:
            yield
        except GeneratorExit:
            abandoned = True
            raise
        finally:
            if self._signal.close_shield(name):
                self._backend.shields_ended(abandoned=abandoned)


class _NeverCancelled:
    """Work that nobody cancels."""

    def __init__(self, state: State | None) -> None:
        self._state = state

    def error(self, cancellation: Cancellation) -> BaseException:
        return TaskCancelled(cancellation.reason)

    def shields_ended(self, *, abandoned: bool) -> None:
        pass

    def state(self) -> State:
        return State() if self._state is None else self._state


_never: Final = CancelSignal()


def never(state: State | None = None) -> CancellationToken:
    """A token that is never cancelled."""
    return CancellationToken(_never, _NeverCancelled(state))
