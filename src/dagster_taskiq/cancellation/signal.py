"""The cancellation of one piece of work, as a signal: once set it stays set, and the strongest request counts.

Threads wait for it with `wait`, coroutines with `wait_async`. Knows threads and asyncio; not what the work is.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from dagster_taskiq.cancellation.model import CancelKind, Cancellation, stronger

logger = logging.getLogger(__name__)


class CancelSignal:
    """Set by whoever receives a cancellation, read by the work and by those who supervise it; from any thread."""

    def __init__(self, *, on_shield: Callable[[str], None] = lambda _: None) -> None:
        """`on_shield` is called with the name of the shield that a cancellation finds closed."""
        self.cancellation: Cancellation | None = None
        """The strongest so far; None: the work is not cancelled."""
        self._on_shield = on_shield
        self._happened = threading.Event()
        self._lock = threading.RLock()
        self._waiters: dict[object, Callable[[], object]] = {}
        self._callbacks: dict[object, Callable[[], object]] = {}
        self._shields: list[str] = []
        self._known_before_shields = False

    @property
    def is_set(self) -> bool:
        """Whether the work is cancelled."""
        return self.cancellation is not None

    @property
    def is_notified(self) -> bool:
        """Whether those who wait for it were told."""
        return self._happened.is_set()

    @property
    def is_shutdown(self) -> bool:
        """Whether the work is cancelled, and the worker's shutdown is the only reason so far."""
        return self.cancellation is not None and self.cancellation.kind is CancelKind.SHUTDOWN

    def set(self, cancellation: Cancellation, *, in_background: bool = False) -> None:
        """`record` and `notify`; not in a signal handler."""
        self.record(cancellation)
        self.notify(in_background=in_background)

    def record(self, cancellation: Cancellation) -> None:
        """Keep it, if it is stronger than what was there. Takes no lock, so a signal handler may call this."""
        self.cancellation = stronger(self.cancellation, cancellation)

    def notify(self, *, in_background: bool = False) -> None:
        """After `record`: wake those who wait, and call back. Never in a signal handler.

        `in_background`: call back in a thread of its own, because users' callbacks may block.
        """
        self._happened.set()
        with self._lock:
            waiters, callbacks = list(self._waiters.values()), list(self._callbacks.values())
            self._waiters.clear()
            self._callbacks.clear()
        shield = self._last_shield()
        for wake in waiters:
            _call(wake)
        if shield is not None:
            self._on_shield(shield)
        if callbacks and in_background:
            threading.Thread(target=_call_all, args=(callbacks,), name="cancellation callbacks", daemon=True).start()
        else:
            _call_all(callbacks)

    def wait(self, timeout: float | None) -> bool:
        """Block until it is set, at most `timeout` seconds; whether it is."""
        return self._happened.wait(timeout) or self.is_set

    async def wait_async(self) -> None:
        """Return once it is set and notified."""
        loop, happened = asyncio.get_running_loop(), asyncio.Event()
        forget = self._register(self._waiters, lambda: loop.call_soon_threadsafe(happened.set))
        try:
            await happened.wait()
        finally:
            forget()

    def on_notified(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have it called once; at once if it is set already. Returns what takes that back."""
        return self._register(self._callbacks, call)

    def _register(self, calls: dict[object, Callable[[], object]], call: Callable[[], object]) -> Callable[[], None]:
        key = object()
        with self._lock:
            late = self._happened.is_set()
            if not late:
                calls[key] = call
        if late:
            _call(call)

        def forget() -> None:
            with self._lock:
                calls.pop(key, None)

        return forget

    @contextmanager
    def also_set_by(self, other: "CancelSignal") -> Iterator[None]:
        """As long as this lasts, it is set when the other one is."""
        forget = other.on_notified(lambda: self.set(other.cancellation) if other.cancellation is not None else None)
        try:
            yield
        finally:
            forget()

    @property
    def has_shields(self) -> bool:
        """Whether a shield is open, in any thread or coroutine of the work. A signal handler may ask."""
        return bool(self._shields)

    @property
    def came_while_shielded(self) -> bool:
        """Whether it was set after the first of the shields was opened that are, or were last, open at one time."""
        return self.is_set and not self._known_before_shields

    def _last_shield(self) -> str | None:
        with self._lock:
            return self._shields[-1] if self._shields else None

    def open_shield(self, name: str) -> None:
        """One more shield. The others may be anywhere: side by side, around it, in a generator that waits."""
        with self._lock:
            if not self._shields:
                self._known_before_shields = self.is_set
            self._shields.append(name)
        if self.is_set:
            self._on_shield(name)

    def close_shield(self, name: str) -> bool:
        """One of that name less; whether none is open any more."""
        with self._lock:
            self._shields.remove(name)
            return not self._shields


class PartSignal(CancelSignal):
    """Of a part of the work, which can be cancelled alone, and is with the whole. The shields are the whole's."""

    def __init__(self, whole: CancelSignal) -> None:
        """It is set as soon as `whole` is, and of both cancellations the stronger one counts."""
        self._whole = whole
        super().__init__(on_shield=whole._on_shield)  # noqa: SLF001 - its own kind
        this = weakref.ref(self)
        whole.on_notified(lambda: part.notify() if (part := this()) is not None else None)

    @property
    def cancellation(self) -> Cancellation | None:
        """The stronger one of its own and of the whole."""
        whole = self._whole.cancellation
        return self.own if whole is None else stronger(self.own, whole)

    @cancellation.setter
    def cancellation(self, own: Cancellation | None) -> None:
        self.own = own
        """That of the part alone."""

    def record(self, cancellation: Cancellation) -> None:
        """As that of the whole, for the part alone."""
        self.own = stronger(self.own, cancellation)

    @property
    def has_shields(self) -> bool:
        """See the whole."""
        return self._whole.has_shields

    @property
    def came_while_shielded(self) -> bool:
        """See the whole."""
        return self._whole.came_while_shielded

    def _last_shield(self) -> str | None:
        return self._whole._last_shield()  # noqa: SLF001 - its own kind

    def open_shield(self, name: str) -> None:
        """See the whole."""
        self._whole.open_shield(name)
        if self.own is not None and not self._whole.is_set:
            self._on_shield(name)

    def close_shield(self, name: str) -> bool:
        """See the whole."""
        return self._whole.close_shield(name)


def _call_all(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        _call(call)


def _call(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:
        logger.exception("a callback of a cancellation failed")
