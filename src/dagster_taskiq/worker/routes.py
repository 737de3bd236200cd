"""The routes that a worker serves: a broker for each of their queues, the queues of one kind received as one.

Knows brokers, cancel listeners and settings; not what is done with a message.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from dagster_taskiq.cancellable_broker import CancellableSQSBroker, LeasedMessage, hand_back
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.errors import QueueError, QueueMissing, UnknownRoute
from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.tasks.cancel_listener import CancelListener, Cancels
from dagster_taskiq.tasks.predicates import TaskView
from dagster_taskiq.tasks.preferred_queues import PreferredQueues
from dagster_taskiq.tasks.running_tasks import RunningTasks


class RoutesBroker(CancellableSQSBroker):
    """That of the preferred route, which receives for the others, too: one receiver, and so one set of slots."""

    others: Sequence[CancellableSQSBroker] = ()
    """In order of preference."""

    async def listen(self) -> AsyncGenerator[LeasedMessage, None]:
        """Yield work messages of all routes, those of a preferred one first; each is leased from receipt."""
        if not self.others:
            messages = super().listen()
        else:
            queues = [broker.receive_work for broker in (self, *self.others)]
            messages = PreferredQueues(
                queues, hand_back, free=lambda: self.free_slots(), may_receive=self.may_receive
            ).messages()
        async with aclosing(messages):
            async for message in messages:
                yield message


@dataclass(frozen=True, slots=True)
class Served:
    """The queues of a worker, whatever it serves. `runs`, `steps`: what receives them; None: it takes none."""

    settings: Settings
    """Those of the unnamed route."""
    runs: RoutesBroker | None
    steps: RoutesBroker | None

    @classmethod
    def of(cls, settings: Settings) -> "Served":
        """What these settings say."""
        runs = _broker(settings, lambda of_route: of_route.queue_url) if settings.max_concurrent_runs else None
        steps = _broker(settings, lambda of_route: of_route.steps_queue_url) if settings.max_concurrent_steps else None
        return cls(settings, runs, steps)

    @property
    def queue(self) -> str:
        """The name of the preferred route's work queue, by which fleets are told apart where something is measured."""
        return queue_name(self.settings.of_route(self.settings.serves[0]).queue_url)

    @property
    def receiving(self) -> Sequence[RoutesBroker]:
        """One for runs, one for steps."""
        return [broker for broker in (self.runs, self.steps) if broker is not None]

    @property
    def brokers(self) -> Sequence[CancellableSQSBroker]:
        """One for each queue."""
        return [one for broker in self.receiving for one in (broker, *broker.others)]

    def hold_runs_until(self, may_receive: Callable[[], Awaitable[None]]) -> None:
        """Have it awaited before runs are received."""
        if self.runs is not None:
            for broker in (self.runs, *self.runs.others):
                broker.may_receive = may_receive

    def route_of_steps_queue(self, queue_url: str) -> str:
        """The route that a step came on."""
        by_url = {self.settings.of_route(route).steps_queue_url: route for route in self.settings.serves}
        return by_url.get(queue_url, DEFAULT_ROUTE)

    async def check(self) -> None:
        """Ask for every queue once. Raises `UnknownRoute`, `QueueMissing`, `QueueUnreachable` or `AccessDenied`."""
        checks = [self._check(broker) for broker in self.brokers]
        for error in await asyncio.gather(*checks, return_exceptions=True):
            if error is not None:
                raise error

    async def _check(self, broker: CancellableSQSBroker) -> None:
        try:
            await broker.check_queues()
        except QueueMissing as error:
            route = next(one for one in self.settings.serves if self._has(one, broker))
            if route == DEFAULT_ROUTE:
                raise
            existing: Sequence[str] = ()
            with suppress(QueueError):  # it is only for the text
                existing = await broker.list_routes(self.settings.queue_url)
            raise UnknownRoute(route, existing) from error

    def _has(self, route: str, broker: CancellableSQSBroker) -> bool:
        return self.settings.of_route(route).cancel_queue_url == broker.cancel_queue_url

    def listener(self, tasks: RunningTasks, is_over: Callable[[str], Awaitable[bool]]) -> Cancels | None:
        """What listens to the cancel queue of each route; None when cancellation is off."""
        if not self.settings.enable_cancellation:
            return None
        # Any of a route's brokers: its queues share one cancel queue.
        sources = {broker.cancel_queue_url: broker for broker in self.brokers}.values()
        ttl_s = self.settings.cancel_ttl
        listeners = [CancelListener(source, tasks, cancel_ttl_s=ttl_s, is_over=is_over) for source in sources]
        return listeners[0] if len(listeners) == 1 else CancelListeners(listeners)


class CancelListeners:
    """Several as one: the cancel of a task may come on any of their queues."""

    def __init__(self, listeners: Sequence[CancelListener]) -> None:
        self.listening = asyncio.Event()
        self._listeners = listeners

    def cancelled_ahead(self, task_id: str, task: TaskView | None = None) -> Cancellation | None:
        """The cancel that was received before the work came, if there was one lately."""
        return next(self._ahead(task_id, task), None)

    def _ahead(self, task_id: str, task: TaskView | None) -> Iterator[Cancellation]:
        for listener in self._listeners:
            ahead = listener.cancelled_ahead(task_id, task)
            if ahead is not None:
                yield ahead

    async def look(self) -> None:
        """Receive what is on the cancel queues now."""
        await asyncio.gather(*[listener.look() for listener in self._listeners])

    async def settled(self, task_id: str, *, over: bool) -> None:
        """Work of this worker is settled."""
        await asyncio.gather(*[listener.settled(task_id, over=over) for listener in self._listeners])

    async def run(self) -> None:
        """Listen until cancelled."""
        async with asyncio.TaskGroup() as group:
            for listener in self._listeners:
                group.create_task(listener.run(), name="listen to cancels of a route")
            for listener in self._listeners:
                await listener.listening.wait()
            self.listening.set()


def _broker(settings: Settings, queue_of: Callable[[Settings], str]) -> RoutesBroker:
    preferred, *others = [settings.of_route(route) for route in settings.serves]
    broker = RoutesBroker.from_settings(preferred, queue_of(preferred))
    broker.others = [CancellableSQSBroker.from_settings(one, queue_of(one)) for one in others]
    for one in (broker, *broker.others):
        one.is_worker_process = True
    return broker
