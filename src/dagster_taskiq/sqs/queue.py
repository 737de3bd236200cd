"""The requests to one SQS queue, with our errors. Knows receipts and batches, not what messages mean."""

import asyncio
import hashlib
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dagster_taskiq._shield import shielded
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.queue_names import is_fifo
from dagster_taskiq.sqs.client import MAX_BATCH
from dagster_taskiq.sqs.errors import translated

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient
    from types_aiobotocore_sqs.type_defs import MessageTypeDef

logger = getLogger(__name__)

_LAST_RECEIVE_S: Final = 2.0
_GROUP_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_T = TypeVar("_T")


class SQSQueue:
    """One queue, by its URL; `client` returns the warm client of the running event loop."""

    def __init__(self, url: str, client: Callable[[], Awaitable["SQSClient"]]) -> None:
        self.url = url
        self.is_fifo = is_fifo(url)
        self._client = client
        self._unreadable: TTLCache[bool] = TTLCache()

    async def send(self, body: str, grouping: Mapping[str, Any]) -> None:
        """Send one message. Raises a `QueueError` or `MessageTooLarge`."""
        client = await self._client()
        with translated(self.url, client.meta.region_name):
            await client.send_message(QueueUrl=self.url, MessageBody=body, **grouping)

    async def send_batch(self, bodies: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[int, str]:
        """Send up to ten; returns the numbers of those that SQS refused, with the reason. Raises a `QueueError`."""
        entries: list[Any] = [
            {"Id": str(number), "MessageBody": body, **grouping} for number, (body, grouping) in enumerate(bodies)
        ]
        client = await self._client()
        with translated(self.url, client.meta.region_name):
            answer = await client.send_message_batch(QueueUrl=self.url, Entries=entries)
        return {int(one["Id"]): one.get("Message") or one["Code"] for one in answer.get("Failed", [])}

    async def receive(self, *, at_most: int, wait_s: int, visibility_s: int) -> "list[MessageTypeDef]":
        """One long poll. When it is cancelled, messages that still come within two seconds are handed back."""
        client = await self._client()
        with translated(self.url, client.meta.region_name):
            request = client.receive_message(
                QueueUrl=self.url,
                MaxNumberOfMessages=at_most,
                WaitTimeSeconds=wait_s,
                VisibilityTimeout=visibility_s,
                AttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
            )
            receive = asyncio.ensure_future(request)
            try:
                return (await asyncio.shield(receive)).get("Messages", [])
            except asyncio.CancelledError:
                await shielded(self._last(receive, min(_LAST_RECEIVE_S, wait_s)), name="last receive")
                raise

    async def _last(self, receive: "asyncio.Future[Any]", within_s: float) -> None:
        # An aborted long poll can hide a message for a visibility timeout: give it a moment to end.
        await asyncio.wait({receive}, timeout=within_s)
        if not receive.done():
            receive.cancel()
            await asyncio.wait({receive})
        if not receive.cancelled() and receive.exception() is None:
            await self.hand_back([raw["ReceiptHandle"] for raw in receive.result().get("Messages", [])])

    async def change_visibility(self, receipt_handle: str, timeout_s: int) -> None:
        """Hide one received message for `timeout_s` seconds from now. Raises `LeaseLost` or another `QueueError`."""
        client = await self._client()
        with translated(self.url, client.meta.region_name, receipt=True):
            await client.change_message_visibility(
                QueueUrl=self.url, ReceiptHandle=receipt_handle, VisibilityTimeout=timeout_s
            )

    async def delete(self, receipt_handle: str) -> None:
        """Delete one received message. Raises `LeaseLost` or another `QueueError`."""
        client = await self._client()
        with translated(self.url, client.meta.region_name, receipt=True):
            await client.delete_message(QueueUrl=self.url, ReceiptHandle=receipt_handle)

    async def delete_all(self, receipt_handles: Sequence[str]) -> None:
        """Delete many. A failure is logged: they are received again, and can be deleted then."""
        for batch in batches(receipt_handles):
            entries: list[Any] = [{"Id": str(n), "ReceiptHandle": handle} for n, handle in enumerate(batch)]
            try:
                client = await self._client()
                with translated(self.url, client.meta.region_name, receipt=True):
                    answer = await client.delete_message_batch(QueueUrl=self.url, Entries=entries)
            except DagsterTaskiqError as error:
                logger.warning("messages not deleted: %s", error)
            else:
                _log_refused("deleted", answer.get("Failed", []))

    async def hand_back(self, receipt_handles: Sequence[str]) -> None:
        """Make many visible at once. A failure is logged: they become visible later by themselves."""
        for batch in batches(receipt_handles):
            entries: list[Any] = [
                {"Id": str(n), "ReceiptHandle": handle, "VisibilityTimeout": 0} for n, handle in enumerate(batch)
            ]
            try:
                client = await self._client()
                with translated(self.url, client.meta.region_name, receipt=True):
                    answer = await client.change_message_visibility_batch(QueueUrl=self.url, Entries=entries)
            except DagsterTaskiqError as error:
                logger.warning("messages not handed back: %s", error)
            else:
                _log_refused("handed back", answer.get("Failed", []))

    async def check(self) -> None:
        """Check that the queue is there. Raises `QueueMissing`, `QueueUnreachable` or `AccessDenied`."""
        client = await self._client()
        with translated(self.url, client.meta.region_name):
            await client.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])

    def log_unreadable(self, message_id: str, error: Exception) -> None:
        """Log once for each message that it stays until it expires."""
        if self._unreadable.add(message_id, True):
            logger.warning("%s: unreadable message %s is left to expire: %s", self.url, message_id, error)


class Receipt:
    """One received message: the three calls that its lease needs."""

    def __init__(self, queue: SQSQueue, receipt_handle: str) -> None:
        self._queue = queue
        self._handle = receipt_handle

    async def renew(self, timeout_s: int) -> None:
        """Hide it for `timeout_s` seconds from now."""
        await self._queue.change_visibility(self._handle, timeout_s)

    async def delete(self) -> None:
        """Delete it, so that it is never received again."""
        await self._queue.delete(self._handle)

    async def hand_back(self, delay_s: int) -> None:
        """Make it visible after `delay_s` seconds."""
        await self._queue.change_visibility(self._handle, delay_s)


def history(raw: "MessageTypeDef") -> tuple[int, float]:
    """How often the message was received, and when it was sent (seconds since the epoch)."""
    attributes = raw.get("Attributes", {})
    return int(attributes.get("ApproximateReceiveCount", 1)), int(attributes.get("SentTimestamp", 0)) / 1000


def grouping(is_fifo: bool, group: object, once: str | None = None) -> dict[str, str]:
    """The group and deduplication ids of a message; `once` is a new id unless given."""
    if is_fifo:
        once = uuid.uuid4().hex if once is None else group_id(once)
        return {"MessageGroupId": group_id(str(group or once)), "MessageDeduplicationId": once}
    return {"MessageGroupId": group_id(str(group))} if group else {}


def group_id(text: str) -> str:
    """The text as a message group or deduplication id: at most 128 printable ASCII characters, one id for each text."""
    if _GROUP_ID.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
    return re.sub(r"[^\x21-\x7e]", "_", text)[:95] + "-" + digest


def batches(items: Sequence[_T]) -> list[Sequence[_T]]:
    """The items in batches of the size that SQS accepts."""
    return [items[start : start + MAX_BATCH] for start in range(0, len(items), MAX_BATCH)]


def _log_refused(verb: str, refused: Sequence[Mapping[str, Any]]) -> None:
    for one in refused:
        logger.info("message not %s (%s): another receiver may have it", verb, one.get("Code"))
