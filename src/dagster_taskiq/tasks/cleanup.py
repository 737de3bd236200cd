"""`cancellation_token()` in a taskiq task, and its cleanup handlers. Knows asyncio and threads; no queues."""

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from dagster_taskiq.cancellation.handlers import Handler
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.cancellation.token import CancellationToken, Cause, Signal
from dagster_taskiq.errors import TaskCancelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskCleanupContext:
    """What the cleanup handler of a taskiq task is told."""

    task_id: str
    task_name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    labels: Mapping[str, Any]
    state: State
    """What the task has kept in `token.state`; in the memory of this worker."""
    reason: str | None
    """What the canceller said, or None."""
    requested_by: str | None
    """Who asked for it, or None if that is not known."""
    attempt: int
    """Of this handler, from 1."""
    log: logging.Logger


class TaskToken:
    """The token of one task, made when it is asked for; and the shield that it may hold up."""

    def __init__(self, interrupt: Callable[[], None]) -> None:
        """`interrupt` cancels the task."""
        self._interrupt = interrupt
        self._signal: Signal | None = None
        self._cancellation: Cancellation | None = None
        self._shielded = False
        self._held_back = False
        self.kept = State()

    def get(self) -> CancellationToken:
        """See `cancellation_token`."""
        if self._signal is None:
            self._signal = Signal()
            if self._cancellation is not None:
                self.tell(self._cancellation)
        return CancellationToken(self._signal, self)

    def tell(self, cancellation: Cancellation) -> None:
        """The task is cancelled."""
        self._cancellation = cancellation
        if self._signal is None:
            return
        self._signal.record(Cause(cancellation.kind, cancellation.reason, cancellation.requested_by))
        # Callbacks may block, and the worker's loop must not.
        threading.Thread(target=self._signal.notify, name="cancellation callbacks", daemon=True).start()

    def interrupt(self) -> None:
        """Now, or at the end of the shield."""
        if self._shielded:
            self._held_back = True
        else:
            self._interrupt()

    # What surrounds the token: see `token.TokenBackend`.

    def error(self, cause: Cause) -> BaseException:
        """A coroutine gets what asyncio would give it."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return TaskCancelled(cause.reason)
        return asyncio.CancelledError(cause.reason)

    def holding_interrupts(self) -> AbstractContextManager[None]:
        """A function in a thread is not interrupted anyway."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return nullcontext()
        return self._holding_interrupts()

    @contextmanager
    def _holding_interrupts(self) -> Iterator[None]:
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
            held_back, self._held_back = self._held_back, False
            if held_back:
                raise asyncio.CancelledError(self._cancellation.reason if self._cancellation is not None else None)

    def state(self) -> State:
        """For as long as this worker has the task."""
        return self.kept


async def clean_up_task(handlers: Sequence[Handler], describe: Callable[[int], TaskCleanupContext]) -> tuple[str, ...]:
    """Run the handlers, side by side; one line for each that has no attempt left.

    A plain function runs in a thread, which cannot be stopped: after its timeout it is no longer waited for.
    """
    failures = await asyncio.gather(*[_see_through(handler, describe) for handler in handlers])
    return tuple(failure for failure in failures if failure is not None)


async def _see_through(handler: Handler, describe: Callable[[int], TaskCleanupContext]) -> str | None:
    most = 1 + (handler.retry_policy.max_retries if handler.retry_policy is not None else 0)
    failure = ""
    for attempt in range(1, most + 1):
        context = describe(attempt)
        began = time.monotonic()
        try:
            async with asyncio.timeout(handler.timeout_s):
                await _call(handler, context)
        except TimeoutError:
            failure = f"it took longer than its timeout of {handler.timeout_s:g} s"
        except Exception as error:  # noqa: BLE001 - whatever it is, the attempt has failed
            failure = f"{type(error).__name__}: {error}"
        else:
            seconds = time.monotonic() - began
            logger.info("cleanup %s of task %s succeeded (%.1f s)", handler.name, context.task_id, seconds)
            return None
        logger.warning("cleanup %s of task %s failed (attempt %d): %s", handler.name, context.task_id, attempt, failure)
        if attempt < most and handler.retry_policy is not None:
            await asyncio.sleep(float(handler.retry_policy.calculate_delay(attempt)))
    return f"{handler.name}: {failure}"


async def _call(handler: Handler, context: TaskCleanupContext) -> None:
    if inspect.iscoroutinefunction(handler.call):
        await handler.call(context)
    else:
        await asyncio.to_thread(handler.call, context)
