"""Send work and cancels from threads that know no asyncio: one event loop in a thread of its own, one warm client.

Used by the launcher, whose methods are called from threads of the webserver and the daemon, and by the executor.
Imports taskiq when there is something to send: many who load the launcher never send anything.
"""

import asyncio
import atexit
import os
import selectors
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from logging import getLogger
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, Self, TypeVar

from dagster_taskiq.queue_names import DEFAULT_ROUTE

if TYPE_CHECKING:
    from taskiq import AsyncBroker, BrokerMessage

logger = getLogger(__name__)

_T = TypeVar("_T")
_Broker = TypeVar("_Broker", bound="Sender")
REQUEST_TIMEOUT_S: Final = 10
"""No request takes longer, whatever the endpoint does."""
_MOST_BROKERS: Final = 50
_LAST_REQUESTS_S: Final = 0.5
_WAIT_S: Final = 0.5
_CLOSE_TIMEOUT_S: Final = 1.0


class Sender(Protocol):
    """What it needs of a broker."""

    async def shutdown(self) -> None:
        """Close the client."""

    def use_client_of(self, other: Self) -> None:
        """From now on, send over the other one's client, which is closed by that."""


class Producer(Generic[_Broker]):
    """A broker for each route, one client for all of them, and their thread; each is there from its first request on.

    The thread never keeps a program from ending, whether or not `close` was called. A forked process opens its own.
    """

    def __init__(self, make_broker: Callable[[str], _Broker], *, name: str) -> None:
        """`make_broker` is given the route. `name` is that of the thread."""
        self._make_broker = make_broker
        self._name = name
        self._lock = threading.Lock()
        self._open: _Connection[_Broker] | None = None
        self._stop_when_dropped: weakref.finalize[..., Producer[_Broker]] | None = None
        _producers.add(self)

    def submit(
        self,
        request: Callable[[_Broker], Awaitable[_T]],
        *,
        route: str = DEFAULT_ROUTE,
        within_s: float | None = None,
    ) -> "Future[_T]":
        """Begin a request of that route's broker.

        Its future has a `TimeoutError` when it has taken so many seconds; then it is over. `within_s`: default
        `REQUEST_TIMEOUT_S`.
        """
        with self._lock:
            if self._open is None:
                self._open = _Connection(self._name)
                # For who drops a producer and does not close it. At exit there is `_close_all`, which also waits.
                self._stop_when_dropped = weakref.finalize(self, self._open.stop)
                self._stop_when_dropped.atexit = False
            broker = self._open.broker(route, self._make_broker)
            return self._open.submit(request, broker, REQUEST_TIMEOUT_S if within_s is None else within_s)

    def close(self) -> None:
        """Close the client and end its thread, within 1.5 s; the next request opens another one."""
        with self._lock:
            connection = self._release()
        if connection is not None:
            connection.stop()
            connection.join()

    def forget(self) -> None:
        """In a forked process: the thread is not here, and the sockets are the parent's."""
        self._lock = threading.Lock()
        connection = self._release()
        if connection is not None:
            connection.abandon()

    def _release(self) -> "_Connection[_Broker] | None":
        if self._stop_when_dropped is not None:
            self._stop_when_dropped.detach()
        connection, self._open = self._open, None
        return connection


class _Connection(Generic[_Broker]):
    """An event loop in a daemon thread, and the brokers whose one client belongs to it.

    It does not know who makes them, because it outlives a producer that was dropped.
    """

    def __init__(self, name: str) -> None:
        self._first: _Broker | None = None
        """It has the client."""
        self._brokers: dict[str, _Broker] = {}
        """By route, the one that was used last at the end."""
        # Not epoll: a fork shares that with its parent, so whatever it closes would be lost to the parent, too.
        self._loop = asyncio.SelectorEventLoop(selectors.PollSelector())
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def broker(self, route: str, make_broker: Callable[[str], _Broker]) -> _Broker:
        """That of the route. Not from two threads at the same time."""
        broker = self._brokers.pop(route, None)
        if broker is None:
            broker = make_broker(route)
            if self._first is None:
                self._first = broker
            else:  # opening another one would take as long as the first
                broker.use_client_of(self._first)
        self._brokers[route] = broker
        if len(self._brokers) > _MOST_BROKERS:  # names of routes come from tags: there may be any number of them
            self._brokers.pop(next(iter(self._brokers)))
        return broker

    def submit(self, request: Callable[[_Broker], Awaitable[_T]], broker: _Broker, within_s: float) -> "Future[_T]":
        return asyncio.run_coroutine_threadsafe(self._bounded(request, broker, within_s), self._loop)

    async def _bounded(self, request: Callable[[_Broker], Awaitable[_T]], broker: _Broker, within_s: float) -> _T:
        async with asyncio.timeout(within_s):
            return await request(broker)

    def stop(self) -> None:
        """Have the thread end soon. From any thread; more than once; after its end."""
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(_LAST_REQUESTS_S + _CLOSE_TIMEOUT_S)

    def abandon(self) -> None:
        """In a forked process, which cannot close what is the parent's: say nothing of what was not closed."""
        self._loop.set_exception_handler(lambda *_: None)

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._until_stopped())
        finally:
            self._loop.close()

    async def _until_stopped(self) -> None:
        await self._stopping.wait()
        try:
            if requests := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(requests, timeout=_LAST_REQUESTS_S)
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                for request in requests:
                    request.cancel()
                await asyncio.gather(*requests, return_exceptions=True)
                if self._first is not None:
                    await self._first.shutdown()
        except Exception as error:  # noqa: BLE001 - there is nobody who could do better
            logger.debug("client not closed: %r", error)


_producers: "weakref.WeakSet[Producer[Any]]" = weakref.WeakSet()


def _forget_all() -> None:
    for producer in [*_producers]:
        producer.forget()


def _close_all() -> None:
    # While threads still run. Later, when the interpreter finalizes, a daemon thread is frozen where it stands, and
    # whoever waited for it would wait for ever.
    for producer in [*_producers]:
        producer.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)


def result_of(request: "Future[_T]", within_s: float | None = None) -> _T:
    """What a request answers, or raises; `TimeoutError` after its bound, as in `submit`. Ctrl-C ends the wait soon.

    It waits in pieces: CPython loses the wake-up of a signal that comes just before a wait on a lock begins, and would
    handle that signal when the wait is over (seen once in forty times on a busy machine).
    """
    until = time.monotonic() + (REQUEST_TIMEOUT_S if within_s is None else within_s)
    while not request.done() and (left_s := until - time.monotonic()) > 0:
        wait({request}, timeout=min(_WAIT_S, left_s))
    return request.result(0)


def work_message(
    broker: "AsyncBroker", task_name: str, task_id: str, group: str | None, arguments: Mapping[str, Any]
) -> "BrokerMessage":
    """One piece of work as a message. `group`: the message group on a fair queue."""
    from taskiq import TaskiqMessage

    labels: dict[str, Any] = {"message_group": group} if group is not None else {}
    message = TaskiqMessage(task_id=task_id, task_name=task_name, labels=labels, args=[], kwargs=dict(arguments))
    return broker.formatter.dumps(message)
