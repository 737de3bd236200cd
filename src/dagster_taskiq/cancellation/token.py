"""The token: is this work cancelled, why, by whom, and how long has it left? Answered without I/O.

Knows threads; neither Dagster nor taskiq nor processes: what surrounds the work says what an interrupt is there.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Final, Protocol

from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.errors import TaskCancelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cause:
    """Why work is cancelled, as far as its own process knows. `kill_at`: seconds since the epoch, if that is known."""

    kind: CancelKind
    reason: str | None = None
    requested_by: str | None = None
    kill_at: float | None = None


class Signal:
    """The cancellation of the work of this process, from wherever it is heard: once set it stays."""

    def __init__(self) -> None:
        self.cancelled = False
        self.cause: Cause | None = None
        self.on_shield: Callable[[str], None] = lambda _: None
        """Called with the name of the shield that a cancellation finds closed."""
        self._happened = threading.Event()
        self._lock = threading.RLock()
        self._callbacks: dict[object, Callable[[], object]] = {}
        self._shields: list[str] = []

    def record(self, cause: Cause) -> None:
        """Take it in. Without a lock: a signal handler may call this, in the middle of anything."""
        if self.cause is None or cause.kind > self.cause.kind:
            self.cause = cause
        self.cancelled = True

    def notify(self) -> None:
        """After `note`, and never in a signal handler: wake who waits, and call back."""
        self._happened.set()
        with self._lock:
            callbacks, self._callbacks = list(self._callbacks.values()), {}
            shield = self._shields[-1] if self._shields else None
        if shield is not None:
            self.on_shield(shield)
        for call in callbacks:
            _call(call)

    def wait(self, timeout: float | None) -> bool:
        """Until it happens."""
        return self._happened.wait(timeout) or self.cancelled

    def when_announced(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have it called once. Returns what takes that back."""
        key = object()
        with self._lock:
            late = self._happened.is_set()
            if not late:
                self._callbacks[key] = call
        if late:
            _call(call)

        def forget() -> None:
            with self._lock:
                self._callbacks.pop(key, None)

        return forget

    @contextmanager
    def shielded(self, name: str) -> Iterator[bool]:
        """As long as this lasts there is a shield of that name. Yields whether it is the outermost one."""
        with self._lock:
            outermost = not self._shields
            self._shields.append(name)
        try:
            if self.cancelled:
                self.on_shield(name)
            yield outermost
        finally:
            with self._lock:
                self._shields.remove(name)


def _call(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:
        logger.exception("a callback of a cancellation token failed")


class TokenBackend(Protocol):
    """What is around the work: an op of Dagster's, a task of taskiq's, nothing."""

    def error(self, cause: Cause) -> BaseException:
        """What `raise_if_cancelled` raises."""

    def holding_interrupts(self) -> AbstractContextManager[None]:
        """As long as it lasts interrupts wait; at its end it raises the one that came."""

    def state(self) -> State:
        """Where `token.state` is kept."""


class CancellationToken:
    """Whether the work that holds it is cancelled. All but `state` is answered at once, from memory.

    Outside the workers of this package it is never cancelled, and its state is not kept.
    """

    __slots__ = ("_signal", "_state", "_surroundings")

    def __init__(self, signal: Signal, surroundings: TokenBackend) -> None:
        """Made by `current_token.cancellation_token`."""
        self._signal = signal
        self._surroundings = surroundings
        self._state: State | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether the work is to end. Once true it stays true."""
        return self._signal.cancelled

    def raise_if_cancelled(self) -> None:
        """Do nothing, or raise what an interrupt raises here.

        In an op: `OpCancelled`; in a coroutine: `asyncio.CancelledError`; in a taskiq task that is a plain function:
        `TaskCancelled`. The work is over when that leaves it.
        """
        if self._signal.cancelled:
            raise self._surroundings.error(self._signal.cause or Cause(CancelKind.SHUTDOWN))

    @property
    def reason(self) -> str | None:
        """What the person said who asked for it, if anything."""
        return self._signal.cause.reason if self._signal.cause is not None else None

    @property
    def requested_by(self) -> str | None:
        """Who asked for it, if that is known."""
        return self._signal.cause.requested_by if self._signal.cause is not None else None

    @property
    def kind(self) -> CancelKind | None:
        """REQUESTED by a person; SHUTDOWN of the worker, after which the work may go on elsewhere; LEASE_LOST."""
        return self._signal.cause.kind if self._signal.cause is not None else None

    def remaining(self) -> float | None:
        """Seconds until the process is killed, 0 at the least; None when it is not cancelled, or nobody kills it."""
        cause = self._signal.cause
        return None if cause is None or cause.kill_at is None else max(0.0, cause.kill_at - time.time())

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it is cancelled, at most `timeout` seconds; whether it is."""
        return self._signal.wait(timeout)

    @property
    def state(self) -> State:
        """What is to outlive this process: see `State`. Its cleanup handler finds it on whichever worker."""
        if self._state is None:
            self._state = self._surroundings.state()
        return self._state

    def on_cancelled(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have `call` called as soon as it is cancelled, in another thread; at once if it is cancelled already.

        For what blocks: end a subprocess, cancel a query, close a connection. An error in it is logged. Returns a
        function that takes it back.
        """
        return self._signal.when_announced(call)

    @contextmanager
    def shield(self, name: str | None = None) -> Iterator[None]:
        """A safe point: as long as the block lasts interrupts wait; at its end the one that came is raised.

        It does not hold off the kill at the end of the grace; the run's log names the shield then (`name`, or where
        it stands).
        """
        if name is None:
            # This generator is called by contextlib, twice.
            caller = sys._getframe(2)  # noqa: SLF001 - what the inspect module would do, without reading files
            name = f"{caller.f_code.co_name}, line {caller.f_lineno}"
        with (
            self._signal.shielded(name) as outermost,
            self._surroundings.holding_interrupts() if outermost else nullcontext(),
        ):
            yield


class _Nothing:
    """Work that nobody cancels."""

    def __init__(self, state: State | None) -> None:
        self._state = state

    def error(self, cause: Cause) -> BaseException:
        return TaskCancelled(cause.reason)

    def holding_interrupts(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> State:
        return State() if self._state is None else self._state


Provider = Callable[[], CancellationToken | None]
_providers: Final[list[Provider]] = []
_never: Final = Signal()


def provide(provider: Provider) -> Callable[[], None]:
    """Have `provided` ask it, before all others. Returns what takes that back."""
    _providers.append(provider)

    def forget() -> None:
        with suppress(ValueError):
            _providers.remove(provider)

    return forget


def provided() -> CancellationToken | None:
    """The token of whoever provides one here."""
    for provider in reversed(_providers):
        token = provider()
        if token is not None:
            return token
    return None


def never(state: State | None = None) -> CancellationToken:
    """A token that is never cancelled."""
    return CancellationToken(_never, _Nothing(state))
