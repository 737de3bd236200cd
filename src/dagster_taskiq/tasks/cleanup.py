"""The cleanup handlers of a taskiq task, run after it was cancelled. Knows asyncio and threads; no queues."""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_taskiq._text import clean_text
from dagster_taskiq.cancellation.handlers import Handler
from dagster_taskiq.cancellation.state import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskCleanupContext:
    """What the cleanup handler of a taskiq task is given."""

    task_id: str
    task_name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    labels: Mapping[str, Any]
    state: State
    """What the task has kept in `token.state`; in the memory of this worker."""
    reason: str | None
    """The reason that the canceller gave, or None."""
    requested_by: str | None
    """Who asked for it, or None if that is not known."""
    attempt: int
    """Of this handler, from 1."""
    log: logging.Logger


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
            failure = clean_text(f"{type(error).__name__}: {error}")
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
