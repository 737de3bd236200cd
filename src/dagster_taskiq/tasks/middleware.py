"""Code of the user's that is notified of cancellations of taskiq tasks. Knows middlewares; not how cancels travel."""

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, ParamSpec, TypeVar

from taskiq import AsyncTaskiqDecoratedTask, TaskiqMiddleware

from dagster_taskiq._lane import Lane
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
_Listener = TypeVar("_Listener", bound=Listener)
_Params = ParamSpec("_Params")
_Returned = TypeVar("_Returned")
LISTENER_S: Final = 10.0
_LANE: Final = Lane("listener for cancellations", LISTENER_S)


class CancellationMiddleware(TaskiqMiddleware):
    """Calls functions, or coroutine functions, when a cancellation is requested, delivered, and finished.

    `on_requested`: where `cancel_task` was called, as its message is being sent; it does not hold that up, and whether
    it was sent, `cancel_task` and `cancel_tasks` tell their caller. `on_delivered`: in the worker that runs the task,
    when it is interrupted. `on_finished`: there, when it has ended and its cleanup handlers have, too.
    A function is called in a thread. What they raise is logged, and changes nothing; they have ten seconds.
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
        if listener is not None:
            await _call(listener, event)


class CancellableTask(AsyncTaskiqDecoratedTask[_Params, _Returned]):
    """What `@broker.task` makes of a function: taskiq's task, and those who want to know when one is cancelled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.listeners: list[Listener] = []

    def on_cancelled(self, listener: _Listener) -> _Listener:
        """Decorator: have it called when a task of this kind was cancelled; see `on_task_cancelled` of the broker."""
        self.listeners.append(listener)
        return listener


async def notify_all(
    middlewares: Iterable[TaskiqMiddleware], event: CancellationEvent, listeners: Iterable[Listener] = ()
) -> None:
    """Notify those that want to know of cancellations; `listeners` only of a task that was cancelled in the end.

    They are called side by side, and nobody waits for longer than `LISTENER_S` seconds.
    """
    calls = [one.notify(event) for one in middlewares if isinstance(one, CancellationMiddleware)]
    if event.stage == "finished" and event.kind.ends_the_work and event.error is not None:
        calls += [_call(listener, event) for listener in listeners]
    await asyncio.gather(*calls)


async def _call(listener: Listener, event: CancellationEvent) -> None:
    about = {"task_id": event.task_id}
    running = asyncio.create_task(_failure_of(listener, event), name=f"tell of {event.task_id}")
    try:
        done, _ = await asyncio.wait({running}, timeout=LISTENER_S)
    except asyncio.CancelledError:
        running.cancel()
        raise
    if not done:
        running.cancel()  # and if it does not end then, it is left alone
        logger.warning("a listener for cancellations is not waited for any more", extra=about)
    elif (failure := running.result()) is not None:
        logger.error("a listener for cancellations failed", exc_info=failure, extra=about)


async def _failure_of(listener: Listener, event: CancellationEvent) -> BaseException | None:
    """What it has raised. What is no `Exception`, as of `sys.exit`, is not to end the worker."""
    try:
        if inspect.iscoroutinefunction(listener):
            await listener(event)
            return None
        result = await _LANE.call(listener, event)
        if inspect.isawaitable(result):
            await result
    except BaseException as error:  # noqa: BLE001 - it is logged, and changes nothing
        return error
    return None
