"""Delete what nobody came to delete: rows of workers and runs that are long gone. Knows the storage; not the work."""

import asyncio
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn

from dagster import DagsterInstance

from dagster_taskiq._lane import Lane
from dagster_taskiq.storage.claims import forget_old_claims
from dagster_taskiq.storage.fleet import forget_old_stops
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import forget_old_step_claims
from dagster_taskiq.storage.step_state import forget_old_states

logger = logging.getLogger(__name__)

_EVERY_S: Final = 6 * 3_600
"""And at the start of each worker."""


async def keep_house(instance: DagsterInstance, heartbeats: Heartbeats) -> NoReturn:
    """Until cancelled. `heartbeats`: decides which workers are dead. What fails is logged, and tried again later."""
    lane = Lane("the database, for housekeeping")
    try:
        while True:
            for clear in _what_to_clear(instance, heartbeats):
                try:
                    await lane.call(clear)
                except Exception as error:  # noqa: BLE001 - whatever the storage raises; the others are to be cleared
                    logger.warning("what is long over could not be deleted: %r", error)
            await asyncio.sleep(_EVERY_S * random.uniform(0.5, 1.5))  # noqa: S311 - not all at once
    finally:
        lane.close()


def _what_to_clear(instance: DagsterInstance, heartbeats: Heartbeats) -> list[Callable[[], None]]:
    return [
        heartbeats.forget_the_long_dead,
        partial(forget_old_states, instance),
        partial(forget_old_stops, instance),
        partial(forget_old_claims, instance, heartbeats),
        partial(forget_old_step_claims, instance, heartbeats),
    ]
