"""What launcher and executor share when they send to a route: is it there, and which ones are, if it is not.

Knows the producer of messages and the routing; not what is sent.
"""

import logging
from typing import TYPE_CHECKING, Final

from dagster_taskiq.errors import QueueError, UnknownRoute
from dagster_taskiq.storage.routing import Routing
from dagster_taskiq.tasks.producer import Producer, result_of

if TYPE_CHECKING:
    from dagster_taskiq.cancellable_broker import CancellableSQSBroker

logger = logging.getLogger(__name__)

_LIST_WITHIN_S: Final = 5.0


def unknown_route(
    producer: "Producer[CancellableSQSBroker]", routing: Routing, queue_url: str, route: str
) -> UnknownRoute:
    """The error for a route that has no queue, with those that have; `queue_url`: that of the unnamed one.

    SQS is asked for them. Without an answer, or the permission `sqs:ListQueues`, they are those that rules name and
    workers have served.
    """
    try:
        listing = producer.submit(lambda broker: broker.list_routes(queue_url), within_s=_LIST_WITHIN_S)
        existing = result_of(listing, _LIST_WITHIN_S)
        return UnknownRoute(route, existing)
    except (QueueError, TimeoutError, RuntimeError) as error:
        logger.warning("routes not listed: %s", str(error) or "no answer")
    try:
        return UnknownRoute(route, [known for known in routing.known_routes() if known != route])
    except Exception:  # whatever the database raises: the route is missing all the same
        logger.exception("the routes of the workers could not be read")
        return UnknownRoute(route, ())
