"""Send work and cancels from threads that know no asyncio: one portal with one warm client.

Used by the launcher, whose methods are called from threads of the webserver and the daemon, and by the executor.
"""

import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from taskiq import AsyncBroker, BrokerMessage, TaskiqMessage

from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.settings import Settings

_T = TypeVar("_T")


class Sender:
    """A broker of one's own and the thread that it lives on; both are there from the first request on."""

    def __init__(self, settings: Settings, queue_url: str, *, name: str) -> None:
        self._settings = settings
        self._queue_url = queue_url
        self._name = name
        self._lock = threading.Lock()
        self._resources = ExitStack()
        self._open: tuple[BlockingPortal, CancellableSQSBroker] | None = None

    def ask(self, request: Callable[[CancellableSQSBroker], Awaitable[_T]]) -> "Future[_T]":
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

    def _connect(self) -> tuple[BlockingPortal, CancellableSQSBroker]:
        portal = self._resources.enter_context(start_blocking_portal(name=self._name))
        broker = broker_for(self._settings, self._queue_url)
        self._resources.callback(portal.call, broker.shutdown)
        return portal, broker


def broker_for(settings: Settings, queue_url: str) -> CancellableSQSBroker:
    """A broker for the work queue or the steps queue; cancels go over the one cancel queue for both."""
    return CancellableSQSBroker(
        queue_url,
        settings.region_name,
        max_messages=settings.max_number_of_messages,
        wait_time=settings.wait_time_seconds,
        endpoint_url=settings.endpoint_url,
        enable_cancellation=settings.enable_cancellation,
        visibility_timeout_s=settings.visibility_timeout_seconds,
        cancel_queue_url=settings.cancel_queue_url,
    )


def task(
    broker: AsyncBroker, name: str, task_id: str, group: str | None, arguments: Mapping[str, Any]
) -> BrokerMessage:
    """One piece of work as a message. `group`: the message group on a fair queue."""
    labels: dict[str, Any] = {"message_group": group} if group is not None else {}
    message = TaskiqMessage(task_id=task_id, task_name=name, labels=labels, args=[], kwargs=dict(arguments))
    return broker.formatter.dumps(message)
