"""The cleanup handlers of a taskiq task, run after it was cancelled. Knows how each is run; no queues."""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from dagster_taskiq._attempt_limit import HARD_TIMEOUT_S, too_long
from dagster_taskiq._lane import Lane
from dagster_taskiq._text import clean_text
from dagster_taskiq.cancellation.handlers import Handler, RetryPolicyLike
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.tasks.handler_process import HandlerFailed, call_in_process, packed, why_not_alone

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
    """Run the handlers, side by side; one line for each that has no attempt left. Must run inside `shielded`.

    A plain function runs in a process of its own, which is ended when it does not react to its timeout. One that
    another process could not find by its name runs in a thread, and is no longer waited for after its timeout.
    """
    failures = await asyncio.gather(*[_see_through(handler, describe) for handler in handlers])
    return tuple(failure for failure in failures if failure is not None)


def warn_of_threads(handlers: Sequence[Handler], task_name: str) -> None:
    """Log once of each handler that will have to run in a thread, and why."""
    for handler in handlers:
        if inspect.iscoroutinefunction(handler.call) or (why := why_not_alone(handler.call)) is None:
            continue
        if handler.identity not in _warned_of:
            _warned_of.add(handler.identity)
            text = "cleanup %s of task %s will run in a thread, which cannot be stopped at its timeout, because %s"
            logger.warning(text, handler.name, task_name, why)


_warned_of: Final[set[str]] = set()


async def _see_through(handler: Handler, describe: Callable[[int], TaskCleanupContext]) -> str | None:
    most = 1 + (handler.retry_policy.max_retries if handler.retry_policy is not None else 0)
    failure = ""
    for attempt in range(1, most + 1):
        context = describe(attempt)
        began = time.monotonic()
        try:
            await _call(handler, context)
        except HandlerFailed as error:
            failure = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the attempt has failed
            failure = _in_words(error)
        else:
            seconds = time.monotonic() - began
            logger.info("cleanup %s of task %s succeeded (%.1f s)", handler.name, context.task_id, seconds)
            return None
        logger.warning("cleanup %s of task %s failed (attempt %d): %s", handler.name, context.task_id, attempt, failure)
        if attempt < most and handler.retry_policy is not None:
            await asyncio.sleep(_delay_s(handler.retry_policy, attempt, handler.name))
    return f"{handler.name}: {failure}"


def _delay_s(policy: RetryPolicyLike, attempt: int, handler: str) -> float:
    try:
        return float(policy.calculate_delay(attempt))
    except Exception:  # one of the user's own: the handler is tried again all the same
        logger.exception("the retry policy of cleanup %s does not tell how long to wait", handler)
        return 0.0


async def _call(handler: Handler, context: TaskCleanupContext) -> None:
    if inspect.iscoroutinefunction(handler.call):
        await _limited(handler.call(context), handler.timeout_s)
        return
    given = _packed(context) if why_not_alone(handler.call) is None else None
    if given is not None:
        about = {"task_id": context.task_id, "handler": handler.name}
        await call_in_process(
            handler.call, given, context.state, timeout_s=handler.timeout_s, log=context.log, about=about
        )
        return
    lane = Lane(f"cleanup {handler.name} of task {context.task_id}", handler.timeout_s)
    try:
        await lane.call(_in_thread, handler.call, context)
    except TimeoutError:
        raise HandlerFailed(too_long(handler.timeout_s)) from None
    finally:
        lane.close()


async def _limited(coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> None:
    """Await it; cancel it at its timeout, and go on without it when it does not end then. Raises `HandlerFailed`."""
    running = asyncio.create_task(_in_task(coroutine))
    done, _ = await asyncio.wait({running}, timeout=timeout_s)
    if not done:
        running.cancel()
        await asyncio.wait({running}, timeout=HARD_TIMEOUT_S)
        raise HandlerFailed(too_long(timeout_s))
    if (failure := running.result()) is not None:
        raise HandlerFailed(failure)


async def _in_task(coroutine: Coroutine[Any, Any, Any]) -> str | None:
    """How it has failed, if it has. What is no `Exception`, as of `sys.exit`, is not to end the worker."""
    try:
        await coroutine
    except BaseException as error:  # noqa: BLE001 - the attempt has failed
        return _in_words(error)
    return None


def _in_thread(call: Callable[..., Any], context: TaskCleanupContext) -> None:
    """As `_in_task`. And a `TimeoutError` of the handler's own is not that of its limit."""
    try:
        call_handler(call, context)
    except BaseException as error:
        raise HandlerFailed(_in_words(error)) from error


def _in_words(error: BaseException) -> str:
    return clean_text(f"{type(error).__name__}: {error}")


def _packed(context: TaskCleanupContext) -> str | None:
    given = {one.name: getattr(context, one.name) for one in fields(context) if one.name not in ("state", "log")}
    try:
        return packed(given)
    except Exception as error:  # noqa: BLE001 - whatever the task's arguments are
        text = "the arguments of task %s cannot be given to another process; its cleanup runs in a thread: %r"
        logger.warning(text, context.task_id, error)
        return None


def call_handler(call: Callable[..., Any], context: TaskCleanupContext) -> None:
    """Call it; a coroutine that it returns is run to its end. Not in an event loop."""
    result = call(context)
    if inspect.isawaitable(result):
        asyncio.run(_await(result))


async def _await(result: Any) -> None:
    await result
