"""Cancel messages from a worker to the workers of every route, whichever routes it serves itself."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence

from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.cancellation.words import THE_RUN
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.queue_names import is_route
from dagster_taskiq.settings import Settings

logger = logging.getLogger(__name__)


async def cancel_tasks(settings: Settings, brokers: Iterable[CancellableSQSBroker], routes: Mapping[str, str]) -> None:
    """Send a cancel message for each task id, to its route; what cannot be sent is left to the status pollers.

    `brokers`: those of the worker, at least one, with open clients, over which it also sends to other routes.
    """
    if not settings.enable_cancellation:
        return
    open_ones = {broker.cancel_queue_url: broker for broker in brokers}
    by_route: dict[str, list[str]] = {}
    for task_id, route in routes.items():
        by_route.setdefault(route, []).append(task_id)
    await asyncio.gather(*[_cancel(settings, open_ones, *group) for group in by_route.items()])


async def _cancel(
    settings: Settings, brokers: Mapping[str, CancellableSQSBroker], route: str, task_ids: Sequence[str]
) -> None:
    if not is_route(route):
        logger.warning("cancel messages not sent: %r is not the name of a route", route)
        return
    of_route = settings.of_route(route)
    broker = brokers.get(of_route.cancel_queue_url)
    if broker is None:
        broker = CancellableSQSBroker.from_settings(of_route, of_route.steps_queue_url)
        broker.use_client_of(next(iter(brokers.values())))
    try:
        failed = (await broker.cancel_tasks(task_ids, requested_by=THE_RUN)).failed
    except DagsterTaskiqError as error:
        failed = {"all": str(error)}
    if failed:
        logger.warning("cancel messages not sent, the status watch does it: %s", next(iter(failed.values())))
