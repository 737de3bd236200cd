"""Queues for operators: create them, read their status; and our own identity. Knows attributes, not messages."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from dagster_taskiq.errors import AccessDenied, QueueMissing
from dagster_taskiq.queue_names import (
    DEFAULT_ROUTE,
    cancel_queue_url,
    is_fifo,
    is_route,
    queue_name,
    route_queue_url,
    steps_queue_url,
)
from dagster_taskiq.sqs.client import check_endpoint
from dagster_taskiq.sqs.errors import is_missing_permission, translated
from dagster_taskiq.sqs.probe import _WITHIN_S

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient


async def identity(region_name: str) -> str:
    """The ARN of the credentials. Raises `AccessDenied` or another `QueueError` with the reason."""
    import aioboto3

    with translated("AWS STS", region_name):
        async with asyncio.timeout(_WITHIN_S), aioboto3.Session().client("sts", region_name=region_name) as sts:
            return str((await sts.get_caller_identity())["Arn"])


_PAGE: Final = 1_000
_MOST_PAGES: Final = 10
CANCEL_VISIBILITY_S: Final = 5
CANCEL_RETENTION_S: Final = 600
WORK_RETENTION_S: Final = 1_209_600
"""Fourteen days, the longest that SQS allows: a message that it drops is a run that never starts."""


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """One queue as it is now. Counts are approximations by SQS; `warnings` are sentences for people."""

    role: str
    url: str
    exists: bool
    fifo: bool
    visible: int = 0
    in_flight: int = 0
    delayed: int = 0
    visibility_timeout_s: int = 0
    retention_s: int = 0
    has_redrive: bool = False
    warnings: tuple[str, ...] = ()
    known: bool = True
    """False: this role may not read the queue's attributes, so that the numbers mean nothing."""
    route: str = DEFAULT_ROUTE

    @property
    def name(self) -> str:
        """The queue's name."""
        return queue_name(self.url)


def queue_urls(queue_url: str) -> Mapping[str, str]:
    """Role to URL of the queues that belong together: work, steps, cancels."""
    return {"work": queue_url, "steps": steps_queue_url(queue_url), "cancels": cancel_queue_url(queue_url)}


async def create_queues(client: "SQSClient", queue_url: str, *, visibility_timeout_s: int = 30) -> tuple[str, ...]:
    """Create the queues that do not exist; existing ones are not changed. Returns the names of the new ones."""
    created = []
    for role, url in queue_urls(queue_url).items():
        check_endpoint(client, url)
        with translated(url, client.meta.region_name):
            try:
                await client.get_queue_url(QueueName=queue_name(url))
            except client.exceptions.QueueDoesNotExist:
                attributes = _attributes(role, visibility_timeout_s, fifo=is_fifo(url))
                await client.create_queue(QueueName=queue_name(url), Attributes=attributes)
                created.append(queue_name(url))
    return tuple(created)


async def list_routes(client: "SQSClient", queue_url: str) -> tuple[str, ...]:
    """The routes of a deployment that have all of their queues, by name; `queue_url`: that of the unnamed route.

    Raises `AccessDenied` without the permission `sqs:ListQueues`, or another `QueueError`.
    """
    check_endpoint(client, queue_url)
    base = queue_name(queue_url).removesuffix(".fifo")
    names: set[str] = set()
    with translated(queue_url, client.meta.region_name):
        token: dict[str, Any] = {}
        for _ in range(_MOST_PAGES):
            page = await client.list_queues(QueueNamePrefix=base, MaxResults=_PAGE, **token)
            names |= {queue_name(url) for url in page.get("QueueUrls", [])}
            if not page.get("NextToken"):
                break
            token = {"NextToken": page["NextToken"]}
    words = {name.removesuffix(".fifo").removeprefix(f"{base}-") for name in names}
    routes = (route for route in {*words} - {base} if is_route(route) and route != DEFAULT_ROUTE)
    urls = {DEFAULT_ROUTE: queue_url} | {route: route_queue_url(queue_url, route) for route in sorted(routes)}
    return tuple(route for route, url in urls.items() if {queue_name(one) for one in queue_urls(url).values()} <= names)


def _attributes(role: str, visibility_timeout_s: int, *, fifo: bool) -> dict[Any, str]:
    attributes = {
        "ReceiveMessageWaitTimeSeconds": "20",
        "VisibilityTimeout": str(visibility_timeout_s),
        "MessageRetentionPeriod": str(WORK_RETENTION_S),
    }
    if role == "cancels":
        # No redrive policy: every hand-back counts as a receive, so a dead-letter queue would take live cancels.
        attributes |= {"VisibilityTimeout": str(CANCEL_VISIBILITY_S), "MessageRetentionPeriod": str(CANCEL_RETENTION_S)}
    if fifo:
        attributes |= {
            "FifoQueue": "true",
            "DeduplicationScope": "messageGroup",
            "FifoThroughputLimit": "perMessageGroupId",
        }
    return attributes


async def queue_status(client: "SQSClient", queue_url: str, route: str = DEFAULT_ROUTE) -> tuple[QueueStatus, ...]:
    """The status of work, steps and cancel queue of a route. One that does not exist or may not be read is no error.

    `queue_url`: that of the unnamed route.
    """
    urls = queue_urls(route_queue_url(queue_url, route))
    return tuple([replace(await _status(client, role, url), route=route) for role, url in urls.items()])


async def _status(client: "SQSClient", role: str, url: str) -> QueueStatus:
    check_endpoint(client, url)
    try:
        with translated(url, client.meta.region_name):
            answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
    except QueueMissing as error:
        return QueueStatus(role, url, exists=False, fifo=is_fifo(url), warnings=(str(error),))
    except AccessDenied as error:
        if not is_missing_permission(error):
            raise
        why = f"{queue_name(url)}: this role may not read its attributes (a launcher need not read those of steps)"
        return QueueStatus(role, url, exists=True, fifo=is_fifo(url), warnings=(why,), known=False)
    known: dict[Any, str] = dict(answer.get("Attributes", {}))
    counts: dict[str, Any] = {field: int(known.get(attribute, 0)) for attribute, field in _COUNTS.items()}
    fifo, redrive = known.get("FifoQueue") == "true", bool(known.get("RedrivePolicy"))
    status = QueueStatus(role, url, exists=True, fifo=fifo, has_redrive=redrive, warnings=(), **counts)
    return replace(status, warnings=_warnings(status))


_COUNTS: Final = {
    "ApproximateNumberOfMessages": "visible",
    "ApproximateNumberOfMessagesNotVisible": "in_flight",
    "ApproximateNumberOfMessagesDelayed": "delayed",
    "VisibilityTimeout": "visibility_timeout_s",
    "MessageRetentionPeriod": "retention_s",
}


def _warnings(status: QueueStatus) -> tuple[str, ...]:
    found = []
    if status.fifo != is_fifo(status.url):
        found.append(f"{status.name}: FIFO queues, and no others, have names that end in .fifo; sending will fail")
    if status.role == "cancels" and status.has_redrive:
        found.append(f"{status.name}: remove its RedrivePolicy; it takes cancel messages that workers hand on")
    if status.role == "cancels" and status.visibility_timeout_s > 30:
        found.append(
            f"{status.name}: lower its VisibilityTimeout to {CANCEL_VISIBILITY_S} s; a lost poll hides cancels so long"
        )
    if status.role == "cancels" and status.retention_s > 3_600:
        found.append(
            f"{status.name}: lower its MessageRetentionPeriod to {CANCEL_RETENTION_S} s; old cancels only cost"
        )
    return tuple(found)
