"""Claims that could not be released when it was time: they are released as soon as the database answers again.

As long as this worker lives, nobody else takes what it has claimed. Knows callables; not what a claim is.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import NoReturn

from dagster_taskiq._lane import Lane
from dagster_taskiq._retry import retry_async
from dagster_taskiq.dagster_compat.storage import outages

logger = logging.getLogger(__name__)


class LateReleases:
    """Whatever was added, one after the other, until it has been done."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._waiting: asyncio.Queue[Callable[[], object]] = asyncio.Queue()

    def add(self, release: Callable[[], object]) -> None:
        """Have it called later, in a thread. It must be harmless when the claim has become another one meanwhile."""
        self._waiting.put_nowait(release)

    async def run(self) -> NoReturn:
        """Release until cancelled."""
        while True:
            release = await self._waiting.get()
            try:
                await retry_async(
                    lambda release=release: self._lane.call(release),  # type: ignore[misc]
                    doing="release a claim",
                    on=(*outages(), TimeoutError),
                )
            except Exception:  # the next ones are to be released all the same
                logger.exception("a claim could not be released")
