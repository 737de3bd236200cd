"""Waiting for events inside an event loop: bounded, and telling what was awaited when it does not come."""

import asyncio
from collections.abc import Callable


async def eventually(look: Callable[[], object], description: str, *, within: float = 40.0) -> None:
    """Return once `look` is truthy. Fails after `within` seconds."""
    try:
        async with asyncio.timeout(within):
            while not look():  # noqa: ASYNC110  what is looked at has no event of its own
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {within:g} s: {description}; last seen: {look()!r}") from None
