"""Send work and cancels from threads that know no asyncio: one portal with one warm client.

Used by the launcher, whose methods are called from threads of the webserver and the daemon, and by the executor.
Imports taskiq when there is something to send: many who load the launcher never send anything.
"""

import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from taskiq import AsyncBroker, BrokerMessage

_T = TypeVar("_T")
_Broker = TypeVar("_Broker", bound="AsyncBroker")


class Producer(Generic[_Broker]):
    """A broker of one's own and the thread that it lives on; both are there from the first request on."""

    def __init__(self, make_broker: Callable[[], _Broker], *, name: str) -> None:
        """`name` is that of the thread."""
        self._make_broker = make_broker
        self._name = name
        self._lock = threading.Lock()
        self._resources = ExitStack()
        self._open: tuple[BlockingPortal, _Broker] | None = None

    def submit(self, request: Callable[[_Broker], Awaitable[_T]]) -> "Future[_T]":
        """Begin a request on the portal's thread."""
        with self._lock:
            if self._open is None:
                self._open = self._connect()
            portal, broker = self._open
        return portal.start_task_soon(request, broker)

    def close(self) -> None:
        """Close the client and end its thread; the next request opens another one."""
        with self._lock:
            self._open = None
            self._resources.close()

    def _connect(self) -> "tuple[BlockingPortal, _Broker]":
        from anyio.from_thread import start_blocking_portal

        portal = self._resources.enter_context(start_blocking_portal(name=self._name))
        broker = self._make_broker()
        self._resources.callback(portal.call, broker.shutdown)
        return portal, broker


def work_message(
    broker: "AsyncBroker", task_name: str, task_id: str, group: str | None, arguments: Mapping[str, Any]
) -> "BrokerMessage":
    """One piece of work as a message. `group`: the message group on a fair queue."""
    from taskiq import TaskiqMessage

    labels: dict[str, Any] = {"message_group": group} if group is not None else {}
    message = TaskiqMessage(task_id=task_id, task_name=task_name, labels=labels, args=[], kwargs=dict(arguments))
    return broker.formatter.dumps(message)
