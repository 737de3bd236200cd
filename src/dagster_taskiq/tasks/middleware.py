"""Code of the user's that is notified of cancellations of taskiq tasks. Knows middlewares; not how cancels travel."""

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from taskiq import TaskiqMiddleware

from dagster_taskiq.cancellation.model import CancelKind

logger = logging.getLogger(__name__)

Stage = Literal["requested", "delivered", "finished"]


@dataclass(frozen=True, slots=True)
class CancellationEvent:
    """One stage of one cancellation. `at`: seconds since the epoch."""

    stage: Stage
    task_id: str
    kind: CancelKind = CancelKind.REQUESTED
    reason: str | None = None
    requested_by: str | None = None
    task_name: str | None = None
    """Known from `delivered` on, if the task had begun by then."""
    error: BaseException | None = None
    """At `finished`: the error in the task's result; None: it had finished its work all the same."""
    at: float = field(default_factory=time.time)


Listener = Callable[[CancellationEvent], Awaitable[None] | None]


class CancellationMiddleware(TaskiqMiddleware):
    """Calls functions, or coroutine functions, when a cancellation is requested, delivered, and finished.

    `on_requested`: where `cancel_task` was called, as its message is being sent; a coroutine function does not hold
    that up, and whether it was sent, `cancel_task` and `cancel_tasks` tell their caller. `on_delivered`: in the worker
    that runs the task, when it is interrupted. `on_finished`: there, when it has ended and its cleanup handlers have,
    too.
    What they raise is logged, and changes nothing.
    """

    def __init__(
        self,
        *,
        on_requested: Listener | None = None,
        on_delivered: Listener | None = None,
        on_finished: Listener | None = None,
    ) -> None:
        super().__init__()
        self._listeners = {"requested": on_requested, "delivered": on_delivered, "finished": on_finished}

    async def notify(self, event: CancellationEvent) -> None:
        """Call whoever wants to know of it. Never raises."""
        listener = self._listeners[event.stage]
        if listener is None:
            return
        try:
            result = listener(event)
            if inspect.isawaitable(result):
                await result
        except Exception:
            logger.exception("a listener for cancellations failed", extra={"task_id": event.task_id})


async def notify_all(middlewares: Iterable[TaskiqMiddleware], event: CancellationEvent) -> None:
    """Notify those that want to know of cancellations."""
    for middleware in middlewares:
        if isinstance(middleware, CancellationMiddleware):
            await middleware.notify(event)
