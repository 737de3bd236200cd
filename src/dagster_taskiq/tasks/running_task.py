"""One piece of work in this worker, from receipt until settled. Knows its cancellation, its task and its settlement.

Knows neither queues nor what the work does: the receiver hands it a way to settle.
"""

import asyncio
import functools
import inspect
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextvars import ContextVar
from logging import Filter, LogRecord, getLogger
from typing import Any

from taskiq import TaskiqMessage, TaskiqResult
from taskiq.exceptions import NoResultError

from dagster_taskiq import _log_context
from dagster_taskiq.cancellation.handlers import Handler, handlers_of
from dagster_taskiq.cancellation.model import CancelKind, Cancellation, stronger
from dagster_taskiq.cancellation.token import CancellationToken, provide
from dagster_taskiq.errors import TaskCancelled
from dagster_taskiq.sqs.lease import Settle
from dagster_taskiq.sqs.settlement import AFTER_CANCEL, Settlement
from dagster_taskiq.tasks.cleanup import TaskCleanupContext, TaskToken, clean_up_task

logger = getLogger(__name__)

CURRENT: ContextVar["RunningTask"] = ContextVar("dagster_taskiq_running")


def current_work() -> "RunningTask":
    """The work that calls this, from inside a task function. Raises `LookupError` anywhere else."""
    return CURRENT.get()


class RunningTask:
    """One piece of work in this worker, from receipt until settled. `received_at`: seconds since the epoch."""

    def __init__(self, task_id: str, *, receive_count: int, settle: Settle, start_cancelled: bool = False) -> None:
        self.task_id = task_id
        self.received_at = time.time()
        self.sent_at = 0.0
        """0: not known."""
        self.receive_count = receive_count
        self.about = {"task_id": task_id, **_log_context.current()}
        """What lines of the log about it shall say, from wherever they come."""
        self.cancellation: Cancellation | None = None
        self.settled = asyncio.Event()
        self.succeeded = False
        self.unsettled_unless_told = False
        self._settle = settle
        self._start_cancelled = start_cancelled
        self._message: TaskiqMessage | None = None
        self._inner: asyncio.Task[Any] | None = None
        self._interruptible = True
        self._begun = False
        self._over = False
        self._wish: tuple[Settlement, int] | None = None
        self.when_cancelled: Callable[[Cancellation], None] = lambda _: None
        """Called when the work is cancelled, once, by `cancel`."""
        self.handlers: tuple[Handler, ...] = ()
        """The cleanup handlers of the task function, if it has begun."""
        self.token = TaskToken(self._cancel_inner)

    @property
    def message(self) -> TaskiqMessage | None:
        """The message that middlewares look at; None before the task is about to begin."""
        return self._message

    @property
    def over(self) -> bool:
        """Whether the task function has ended: a cancellation then changes nothing."""
        return self._over

    @property
    def dropped(self) -> bool:
        """Whether it was cancelled before it began, and is not to begin."""
        return self.cancellation is not None and not self._begun and not self._start_cancelled

    @property
    def finished(self) -> bool:
        """Whether nobody will ever work under this id again, so that a cancel for it has no addressee.

        Not known of a task that failed, because it may have been sent again under its id; nor of work with a wish,
        because it may have given way to the same work elsewhere.
        """
        requested = self.cancellation is not None and self.cancellation.kind is CancelKind.REQUESTED
        over = self._wish is None and self.verdict()[0] is Settlement.DELETE
        return over and (self.succeeded or requested)

    def settle_as(self, settlement: Settlement, delay_s: int = 0) -> None:
        """What the work itself wants to become of its message; wins over the table."""
        self._wish = (settlement, delay_s)

    def verdict(self) -> tuple[Settlement, int]:
        """What becomes of the message: the work's wish, else the table, else it is done."""
        if self._wish is not None:
            return self._wish
        if self.cancellation is not None and not self.succeeded:
            return AFTER_CANCEL[self.cancellation.kind], 0
        if not self._over or self.unsettled_unless_told:
            return Settlement.LEAVE, 0
        return Settlement.DELETE, 0

    async def acknowledge(self) -> None:
        """What taskiq calls when it is time to acknowledge; before the end, that is what the task asked for."""
        if self._over:
            await self._settle(*self.verdict())
        else:
            await self._settle(Settlement.DELETE)

    async def settle(self) -> None:
        """Carry out the verdict."""
        await self._settle(*self.verdict())

    def cancel(self, cancellation: Cancellation) -> None:
        """Interrupt the task function, once; a later, stronger cancellation only takes over as the reason."""
        self._forbid_retry()
        if self._over:
            return
        first = self.cancellation is None
        self.cancellation = stronger(self.cancellation, cancellation)
        if first:
            logger.info("Cancelling task %s", self.task_id, extra=self.about)
            self.token.tell(cancellation)
            self.when_cancelled(cancellation)
            self._interrupt()

    def attach(self, message: TaskiqMessage) -> None:
        """The message that middlewares will look at, as it is after they had their say."""
        self._message = message
        if self.cancellation is not None:
            self._forbid_retry()

    def begin(self, inner: "asyncio.Task[Any]") -> None:
        """The task that runs the function (and resolves its dependencies first)."""
        self._inner = inner

    def end(self, *, succeeded: bool) -> None:
        """The function has ended."""
        self._over = True
        self.succeeded = succeeded

    def told(self, result: TaskiqResult[Any]) -> TaskiqResult[Any]:
        """The result as others shall see it: a cancelled task says so; one that is not over has none."""
        if self.cancellation is not None and isinstance(result.error, asyncio.CancelledError):
            result.error = TaskCancelled(self.cancellation.reason)
        if self.verdict()[0] is not Settlement.DELETE and not self.unsettled_unless_told:
            result.error = NoResultError()
        return result

    def observed(self, target: Callable[..., Any], executor: Executor | None) -> Callable[..., Any]:
        """The task function, log_context when it begins and ends.

        A function in a thread cannot be interrupted: it looks at `current_work().cancellation` itself, and the
        message stays ours until it has ended. One in a process pool cannot even look.
        """
        if inspect.iscoroutinefunction(target):
            return self._observed_coroutine(target)
        self._interruptible = False
        return target if isinstance(executor, ProcessPoolExecutor) else self._observed_function(target)

    def _observed_coroutine(self, target: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(target)
        async def observed(*args: Any, **kwargs: Any) -> Any:
            self._begin(target)
            try:
                return await target(*args, **kwargs)
            finally:
                self._over = True

        return observed

    def _observed_function(self, target: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(target)
        def observed(*args: Any, **kwargs: Any) -> Any:
            if self.dropped:
                raise TaskCancelled(self.cancellation.reason if self.cancellation else None)
            self._begin(target)
            try:
                return target(*args, **kwargs)
            finally:
                self._over = True

        return observed

    def _begin(self, target: Callable[..., Any]) -> None:
        self._begun = True
        self.handlers = handlers_of(target)

    async def clean_up(self) -> tuple[str, ...]:
        """Run the cleanup handlers, if somebody has asked for the end of the task; which of them failed, and why."""
        cancellation, message = self.cancellation, self._message
        if cancellation is None or cancellation.kind is not CancelKind.REQUESTED or message is None:
            return ()

        def describe(attempt: int) -> TaskCleanupContext:
            return TaskCleanupContext(
                task_id=self.task_id,
                task_name=message.task_name,
                args=message.args,
                kwargs=message.kwargs,
                labels=message.labels,
                state=self.token.kept,
                reason=cancellation.reason,
                requested_by=cancellation.requested_by,
                attempt=attempt,
                log=logger,
            )

        return await clean_up_task(self.handlers, describe)

    def _interrupt(self) -> None:
        if self._inner is None:
            return  # not started yet: `dropped` says what then
        if not self._interruptible:
            text = "task %s is a sync function and ends when it looks at its cancellation"
            logger.info(text, self.task_id, extra=self.about)
        elif self._begun or not self._start_cancelled:
            self.token.interrupt()

    def _cancel_inner(self) -> None:
        if self._inner is not None:
            self._inner.cancel()

    def _forbid_retry(self) -> None:
        # Retry middlewares look at this label of the message, and would send the task again.
        if self._message is not None:
            self._message.labels["retry_on_error"] = False


def _token_of_task() -> CancellationToken | None:
    running = CURRENT.get(None)
    return running.token.get() if running is not None else None


provide(_token_of_task)


class CancelledIsNoError(Filter):
    """Keeps taskiq from logging an error with a traceback for each task that was cancelled because somebody asked."""

    def filter(self, record: LogRecord) -> bool:
        """Whether to log it."""
        running = CURRENT.get(None)
        error = record.exc_info[1] if record.exc_info else None
        return running is None or running.cancellation is None or not isinstance(error, asyncio.CancelledError)


def cancelled_result(message: TaskiqMessage) -> TaskiqResult[Any]:
    """What taskiq makes of a task function that was cancelled."""
    return TaskiqResult(
        is_err=True, return_value=None, execution_time=0, error=asyncio.CancelledError(), labels=message.labels
    )
