"""Run something to its end, also when the task that waits for it is cancelled. A leaf; knows only asyncio."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def shielded(body: Coroutine[Any, Any, _T], *, name: str, on_cancel: Callable[[], None] | None = None) -> _T:
    """Await `body` in a task of its own; cancelling the caller, however often, does not interrupt it.

    The cancellation is raised afterwards. With `on_cancel` that callable is called instead, at once and for each
    cancellation. The cancellation then counts as done when `body` returns: it is not raised again.
    """
    task = asyncio.create_task(body, name=name)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            if on_cancel is None:
                cancelled = error
            else:
                on_cancel()
    if cancelled is not None:
        raise cancelled
    return task.result()
