"""One task in this worker, from receipt until settled. Knows its cancellation, its function and its settlement.

Knows neither queues nor what the task does: the receiver hands it a way to settle.
"""

import asyncio
import enum
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from logging import Filter, LogRecord, getLogger
from typing import Any, Final

from taskiq import TaskiqMessage, TaskiqResult
from taskiq.exceptions import NoResultError

from dagster_taskiq import _log_context
from dagster_taskiq.cancellation.current import TASK_TOKEN
from dagster_taskiq.cancellation.handlers import Handler, handlers_of
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.errors import TaskCancelled
from dagster_taskiq.sqs.lease import Settle
from dagster_taskiq.sqs.settlement import AFTER_CANCEL, Settled, Settlement
from dagster_taskiq.sqs.unusable import LONGEST_PAUSE_OF_WORK_S, LONGEST_PAUSE_S
from dagster_taskiq.tasks.cancel_report import OUTCOME_LABEL, TaskCancelOutcome
from dagster_taskiq.tasks.cleanup import TaskCleanupContext, clean_up_task, warn_of_threads
from dagster_taskiq.tasks.predicates import SENT_AT_LABEL, TaskView
from dagster_taskiq.tasks.task_token import TaskToken

logger = getLogger(__name__)

SAVED_WITHIN_S: Final = 60.0
CURRENT_TASK: ContextVar["RunningTask"] = ContextVar("dagster_taskiq_running_task")


def current_task() -> "RunningTask":
    """The task that calls this, from inside its function. Raises `LookupError` anywhere else."""
    return CURRENT_TASK.get()


class Phase(enum.Enum):
    """How far a task has come."""

    RECEIVED = "its function has not begun"
    BEGUN = "its function runs"
    RETURNED = "its function has ended, and taskiq has not reported how"
    SUCCEEDED = "its function has returned a result"
    FAILED = "its function has raised an error, or never begun"


_BEFORE_THE_END = frozenset({Phase.RECEIVED, Phase.BEGUN})


class RunningTask:
    """One task in this worker, from receipt until settled. `sent_at`: seconds since the epoch; 0: not known.

    `awaits_signal`: the function looks at `signal` by itself. Then it is never interrupted, and it begins also when it
    was cancelled before. Any other function is interrupted as asyncio does it, once.
    """

    def __init__(
        self,
        task_id: str,
        *,
        settle: Settle,
        receive_count: int = 1,
        sent_at: float = 0.0,
        queue_url: str = "",
        view: TaskView | None = None,
        awaits_signal: bool = False,
        on_cancelled: Callable[["RunningTask", Cancellation], None] = lambda *_: None,
        on_unusable: Callable[[str, int], Settled] = lambda *_: Settled(Settlement.LEAVE),
    ) -> None:
        """`on_cancelled` is called once, when the task is cancelled; `on_unusable`: see `unusable`.

        `view`: for cancels of many tasks, which ask what it is. Others are not asked.
        """
        self.task_id = task_id
        self.sent_at = sent_at
        self.queue_url = queue_url
        """Of the queue that its message came from; empty when there is no message."""
        self.view = view
        self.receive_count = receive_count
        self.about = {"task_id": task_id, **_log_context.current()}
        self.about.pop("worker", None)  # whoever logs for this task is on the same one
        """What every line of the log about it has in `extra`."""
        self.signal = CancelSignal()
        self.phase = Phase.RECEIVED
        self.outcome: Settled | None = None
        """What the function has returned, if it decides for itself what becomes of its message."""
        self.acknowledges_itself = False
        """Whether the message is to be left when nobody has acknowledged it."""
        self.settled = asyncio.Event()
        self.telling: asyncio.Task[None] | None = None
        """While those are told who want to know of its cancellation."""
        self.handlers: tuple[Handler, ...] = ()
        """The cleanup handlers of the task function, if it has begun."""
        self.token = TaskToken(self.signal, self._cancel_coroutine)
        self._settle = settle
        self._awaits_signal = awaits_signal
        self._on_cancelled = on_cancelled
        self._on_unusable = on_unusable
        self._limit: asyncio.Timeout | None = None
        self._message: TaskiqMessage | None = None
        self._coroutine: asyncio.Task[Any] | None = None
        self._is_sync = False

    @property
    def cancellation(self) -> Cancellation | None:
        """The strongest so far."""
        return self.signal.cancellation

    @property
    def message(self) -> TaskiqMessage | None:
        """The message that middlewares look at; None before the task is about to begin."""
        return self._message

    @property
    def over(self) -> bool:
        """Whether the task function has ended: a cancellation then changes nothing."""
        return self.phase not in _BEFORE_THE_END

    @property
    def dropped(self) -> bool:
        """Whether it was cancelled before it began, and is not to begin."""
        return self.signal.is_set and self.phase is Phase.RECEIVED and not self._awaits_signal

    @property
    def finished(self) -> bool:
        """Whether nobody will ever work under this id again, so that a cancel for it has no addressee.

        Not known of a task that failed, because it may have been sent again under its id; nor of one that has decided
        for itself, because it may have given way to the same work elsewhere.
        """
        ended = self.cancellation is not None and self.cancellation.kind.ends_the_work
        over = self.outcome is None and self.verdict().settlement is Settlement.DELETE
        return over and (self.phase is Phase.SUCCEEDED or ended)

    def verdict(self) -> Settled:
        """What becomes of the message: what the function has returned, else the table, else it is done."""
        if self.outcome is not None:
            return self.outcome
        if self.cancellation is not None and self.phase is not Phase.SUCCEEDED:
            return AFTER_CANCEL[self.cancellation.kind]
        if not self.over or self.acknowledges_itself:
            return Settled(Settlement.LEAVE)
        return Settled(Settlement.DELETE)

    def unusable(self, why: str) -> Settled:
        """For a function that finds that its message asks for nothing sensible: it is to come ever more rarely."""
        return self._on_unusable(why, LONGEST_PAUSE_S)

    def failing(self, why: str) -> Settled:
        """The same, for work that could not even begin, and may do so later."""
        return self._on_unusable(why, LONGEST_PAUSE_OF_WORK_S)

    async def acknowledge(self) -> None:
        """What taskiq calls when it is time to acknowledge; before the end, that is what the task asked for."""
        limit, self._limit = self._limit, None  # SQS has its own patience
        if limit is not None:
            limit.reschedule(None)
        await self._settle(*(self.verdict() if self.over else Settled(Settlement.DELETE)))
        self._limit = limit
        if self.over:
            self.saves()

    @asynccontextmanager
    async def saved_in_time(self) -> AsyncIterator[None]:
        """As long as this lasts, what comes after `saves` has a minute: or else a dead backend would keep a slot."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._limit = limit
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            text = "the result of a task is not saved: its result backend, or a middleware, has not answered for %.0f s"
            logger.error(text, SAVED_WITHIN_S, extra=self.about)  # noqa: TRY400 - where it hangs says nothing of us
        finally:
            self._limit = None

    def saves(self) -> None:
        """All is over but what middlewares and the result backend do with the result."""
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + SAVED_WITHIN_S)

    async def settle(self) -> None:
        """Carry out the verdict."""
        await self._settle(*self.verdict())

    def cancel(self, cancellation: Cancellation) -> None:
        """Interrupt the task function, once; a later, stronger cancellation only takes over as the reason."""
        self._forbid_retry()
        if self.over:
            return
        first = not self.signal.is_set
        self.signal.record(cancellation)
        if first:
            logger.info("Cancelling task %s", self.task_id, extra=self.about)
            self.signal.notify(in_background=True)
            self._on_cancelled(self, cancellation)
            self._interrupt()

    def attach(self, message: TaskiqMessage) -> None:
        """The message that middlewares will look at, as it is after they have changed it."""
        self._message = message
        if self.view is not None and self.view.sent_at:
            message.labels[SENT_AT_LABEL] = self.view.sent_at
        if self.signal.is_set:
            self._forbid_retry()

    def may_have_begun(self, target: Callable[..., Any]) -> None:
        """Before it begins here: if its message comes again, its cleanup handlers may be due without a beginning."""
        if self.receive_count > 1:
            self.handlers = handlers_of(target)

    def begin(self, coroutine: "asyncio.Task[Any]") -> None:
        """The asyncio task that runs the function (and resolves its dependencies first)."""
        self._coroutine = coroutine

    def end(self, *, succeeded: bool) -> None:
        """The function has ended."""
        self.phase = Phase.SUCCEEDED if succeeded else Phase.FAILED

    def visible_result(self, result: TaskiqResult[Any]) -> TaskiqResult[Any]:
        """The result as others see it: a cancelled task has `TaskCancelled`, one that is not over has none."""
        if self.cancellation is not None and isinstance(result.error, asyncio.CancelledError):
            result.error = TaskCancelled(self.cancellation.reason)
        if self.verdict().settlement is not Settlement.DELETE and not self.acknowledges_itself:
            result.error = NoResultError()
        elif self.cancellation is not None and self.cancellation.kind.ends_the_work:
            result.labels[OUTCOME_LABEL] = self._cancel_outcome.name
        return result

    @property
    def _cancel_outcome(self) -> TaskCancelOutcome:
        if self.phase is Phase.SUCCEEDED:
            return TaskCancelOutcome.FINISHED
        if self._coroutine is None and self.receive_count == 1:
            return TaskCancelOutcome.WAITING
        return TaskCancelOutcome.RUNNING

    @contextmanager
    def entered(self) -> Iterator[None]:
        """As long as this lasts, `current_task` is this one, and `cancellation_token` gives its token."""
        current, token = CURRENT_TASK.set(self), TASK_TOKEN.set(self.token.get)
        try:
            yield
        finally:
            TASK_TOKEN.reset(token)
            CURRENT_TASK.reset(current)

    def observed(self, target: Callable[..., Any], executor: Executor | None) -> Callable[..., Any]:
        """The task function, whose beginning, end and outcome are recorded here.

        A function in a thread cannot be interrupted: it looks at its token itself, and the message stays ours until it
        has ended. One in a process pool cannot even look.
        """
        if inspect.iscoroutinefunction(target):
            return self._observed_coroutine(target)
        self._is_sync = True
        if isinstance(executor, ProcessPoolExecutor):
            self.handlers = handlers_of(target)  # nobody here sees it begin
            return target
        return self._observed_function(target)

    def _observed_coroutine(self, target: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(target)
        async def observed(*args: Any, **kwargs: Any) -> Any:
            self.token.belongs_here()
            self._record_beginning(target)
            try:
                result = await target(*args, **kwargs)
            finally:
                self.phase = Phase.RETURNED
            if isinstance(result, Settled):
                self.outcome = result
                return None
            return result

        return observed

    def _observed_function(self, target: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(target)
        def observed(*args: Any, **kwargs: Any) -> Any:
            if self.dropped:
                raise TaskCancelled(self.cancellation.reason if self.cancellation else None)
            self._record_beginning(target)
            try:
                return target(*args, **kwargs)
            finally:
                self.phase = Phase.RETURNED

        return observed

    def _record_beginning(self, target: Callable[..., Any]) -> None:
        self.phase = Phase.BEGUN
        self.handlers = handlers_of(target)
        warn_of_threads(self.handlers, self._message.task_name if self._message is not None else self.task_id)

    async def clean_up(self) -> tuple[str, ...]:
        """Run the cleanup handlers, if somebody has asked for the end of the task; which of them failed, and why."""
        cancellation, message = self.cancellation, self._message
        if cancellation is None or not cancellation.kind.ends_the_work or message is None:
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
        if self._coroutine is None or self._awaits_signal:
            return  # what has not started yet: then `dropped` decides
        if self._is_sync:
            text = "task %s is a sync function and ends when it looks at its cancellation"
            logger.info(text, self.task_id, extra=self.about)
        else:
            self.token.interrupt()

    def _cancel_coroutine(self) -> None:
        if self._coroutine is not None:
            self._coroutine.cancel()

    def _forbid_retry(self) -> None:
        # Retry middlewares look at this label of the message, and would send the task again.
        if self._message is not None:
            self._message.labels["retry_on_error"] = False


class CancelledIsNoError(Filter):
    """Keeps taskiq from logging an error with a traceback for each task that was cancelled because somebody asked."""

    def filter(self, record: LogRecord) -> bool:
        """Whether to log it."""
        task = CURRENT_TASK.get(None)
        error = record.exc_info[1] if record.exc_info else None
        return task is None or not task.signal.is_set or not isinstance(error, asyncio.CancelledError)


def cancelled_result(message: TaskiqMessage) -> TaskiqResult[Any]:
    """What taskiq makes of a task function that was cancelled."""
    return TaskiqResult(
        is_err=True, return_value=None, execution_time=0, error=asyncio.CancelledError(), labels=message.labels
    )
