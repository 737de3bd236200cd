"""How Dagster interrupts code in this process, and what we change in that."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.execution.plan import compute
from dagster._utils.interrupts import (
    _replace_interrupt_signal,
    capture_interrupts,
    check_captured_interrupt,
    raise_interrupts_as,
)

__all__ = [
    "DagsterExecutionInterruptedError",
    "capture_interrupts",
    "check_captured_interrupt",
    "raise_interrupts_as",
    "watch_interrupts",
]


def watch_interrupts(on_interrupt: Callable[[], None], is_cancelled: Callable[[], bool]) -> None:
    """Have `on_interrupt` called whenever an interrupt is about to be raised in this process, in the signal handler.

    And have ops that are coroutines cancelled as asyncio does it, at the `await` where they stand: Dagster raises its
    interrupt in the event loop, so the coroutine would never be resumed, and none of its `finally` blocks run. A
    cancellation that leaves the coroutine becomes the interrupt that Dagster expects; `is_cancelled` tells it from one
    of the coroutine's own.
    """

    # Dagster's signal handler creates this error exactly when it interrupts code (while interrupts are only captured
    # it sets a flag instead), so its constructor is the one place that knows.
    def __init__(self: DagsterExecutionInterruptedError, *args: object) -> None:  # noqa: N807
        on_interrupt()
        BaseException.__init__(self, *args)

    def results(context: Any, async_results: Any) -> Iterator[Any]:
        while True:
            try:
                yield _run_interruptibly(context.event_loop, anext(async_results), on_interrupt, is_cancelled)
            except StopAsyncIteration:
                return

    DagsterExecutionInterruptedError.__init__ = __init__  # type: ignore[method-assign, assignment]
    compute.gen_from_async_gen = results  # type: ignore[assignment]


def _run_interruptibly(
    loop: asyncio.AbstractEventLoop,
    awaitable: Any,
    on_interrupt: Callable[[], None],
    is_cancelled: Callable[[], bool],
) -> Any:
    task: asyncio.Future[Any] = asyncio.ensure_future(awaitable, loop=loop)
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        on_interrupt()
        if not interrupted:
            interrupted = True
            loop.call_soon_threadsafe(task.cancel)  # which also wakes the loop

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread():
        _replace_interrupt_signal(interrupt)
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError:
        if interrupted or is_cancelled():
            raise DagsterExecutionInterruptedError from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            _replace_interrupt_signal(before)
