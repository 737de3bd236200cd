"""The requests to one SQS queue, with our errors. Knows receipts and batches, not what messages mean."""

import asyncio
import hashlib
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from logging import getLogger
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from dagster_taskiq._shield import shielded
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.queue_names import is_fifo
from dagster_taskiq.sqs.client import MAX_BATCH, check_endpoint
from dagster_taskiq.sqs.errors import refusal, translated

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient
    from types_aiobotocore_sqs.type_defs import BatchResultErrorEntryTypeDef, MessageTypeDef

logger = getLogger(__name__)

ANSWER_S: Final = 5.0
"""SQS answers within milliseconds. What has not come by then is asked for once more, on another connection."""
_TRIES: Final = 2
_POLL_MARGIN_S: Final = 5.0
_SOON_S: Final = 1.0
_ON_ITS_WAY_S: Final = 0.2
_TOGETHER_S: Final = 0.02
_GROUP_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_T = TypeVar("_T")


class SQSQueue:
    """One queue, by its URL; `client` returns the warm client of the running event loop."""

    def __init__(self, url: str, client: Callable[[], Awaitable["SQSClient"]]) -> None:
        self.url = url
        self.is_fifo = is_fifo(url)
        self._client = client
        self.renewals = Renewals(self)
        self._unreadable: TTLCache[bool] = TTLCache()

    async def _ask(
        self,
        request: "Callable[[SQSClient], Awaitable[_T]]",
        *,
        within_s: float | None = None,
        tries: int = _TRIES,
        receipt: bool = False,
    ) -> _T:
        """What SQS answers. Raises a `QueueError`, also when there is no answer within so many seconds and tries."""
        within_s = ANSWER_S if within_s is None else within_s
        client = await self._client()
        check_endpoint(client, self.url)
        with translated(self.url, client.meta.region_name, receipt=receipt):
            for _ in range(tries - 1):
                with suppress(TimeoutError):
                    async with asyncio.timeout(within_s):
                        return await request(client)
            async with asyncio.timeout(within_s):
                return await request(client)

    async def send(self, body: str, grouping: Mapping[str, Any]) -> None:
        """Send one message. Raises a `QueueError` or `MessageTooLarge`."""
        await self._ask(lambda client: client.send_message(QueueUrl=self.url, MessageBody=body, **grouping))

    async def send_batch(self, bodies: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[int, str]:
        """Send up to ten; returns the numbers of those that SQS refused, with the reason. Raises a `QueueError`."""
        entries: list[Any] = [
            {"Id": str(number), "MessageBody": body, **grouping} for number, (body, grouping) in enumerate(bodies)
        ]
        answer = await self._ask(lambda client: client.send_message_batch(QueueUrl=self.url, Entries=entries))
        return {int(one["Id"]): one.get("Message") or one["Code"] for one in answer.get("Failed", [])}

    async def receive(self, *, at_most: int, wait_s: int, visibility_s: int) -> "list[MessageTypeDef]":
        """One long poll. When it is cancelled, messages that still come within a moment are handed back.

        Nobody can end a long poll at SQS. One that would end by itself within a second is awaited. Any other is given a
        moment for an answer that is on its way, and then dropped: a message that SQS takes for it in just that moment
        is not lost, but hidden for `visibility_s`.
        """
        began = monotonic()
        receive = asyncio.create_task(
            self._ask(
                lambda client: client.receive_message(
                    QueueUrl=self.url,
                    MaxNumberOfMessages=at_most,
                    WaitTimeSeconds=wait_s,
                    VisibilityTimeout=visibility_s,
                    AttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
                ),
                within_s=wait_s + _POLL_MARGIN_S,
                tries=1,
            ),
            name=f"poll {self.url}",
        )
        try:
            return (await asyncio.shield(receive)).get("Messages", [])
        except asyncio.CancelledError:
            left_s = began + wait_s - monotonic()
            await shielded(self._last(receive, _SOON_S if left_s <= _SOON_S else _ON_ITS_WAY_S), name="last receive")
            raise

    async def _last(self, receive: "asyncio.Task[Any]", within_s: float) -> None:
        await asyncio.wait({receive}, timeout=within_s)
        receive.cancel()
        await asyncio.wait({receive})
        if not receive.cancelled() and receive.exception() is None:
            await self.hand_back([raw["ReceiptHandle"] for raw in receive.result().get("Messages", [])])

    async def change_visibility(self, receipt_handle: str, timeout_s: int) -> None:
        """Hide one received message for `timeout_s` seconds from now. Raises `LeaseLost` or another `QueueError`."""
        await self._ask(
            lambda client: client.change_message_visibility(
                QueueUrl=self.url, ReceiptHandle=receipt_handle, VisibilityTimeout=timeout_s
            ),
            receipt=True,
        )

    async def change_visibilities(
        self, wanted: Sequence[tuple[str, int]]
    ) -> "Mapping[int, BatchResultErrorEntryTypeDef]":
        """The same for up to ten, by receipt and seconds; what was refused, by number. Raises a `QueueError`."""
        entries: list[Any] = [
            {"Id": str(number), "ReceiptHandle": handle, "VisibilityTimeout": timeout_s}
            for number, (handle, timeout_s) in enumerate(wanted)
        ]
        answer = await self._ask(
            lambda client: client.change_message_visibility_batch(QueueUrl=self.url, Entries=entries), receipt=True
        )
        return {int(one["Id"]): one for one in answer.get("Failed", [])}

    async def delete(self, receipt_handle: str) -> None:
        """Delete one received message. Raises `LeaseLost` or another `QueueError`."""
        await self._ask(
            lambda client: client.delete_message(QueueUrl=self.url, ReceiptHandle=receipt_handle), receipt=True
        )

    async def delete_all(self, receipt_handles: Sequence[str]) -> None:
        """Delete many. A failure is logged: they are received again, and can be deleted then."""
        for batch in batches(receipt_handles):
            await self._delete_batch([{"Id": str(n), "ReceiptHandle": handle} for n, handle in enumerate(batch)])

    async def _delete_batch(self, entries: list[Any]) -> None:
        try:
            answer = await self._ask(
                lambda client: client.delete_message_batch(QueueUrl=self.url, Entries=entries), receipt=True
            )
        except DagsterTaskiqError as error:
            logger.warning("messages not deleted: %s", error)
        else:
            _log_refused("deleted", answer.get("Failed", []))

    async def hand_back(self, receipt_handles: Sequence[str]) -> None:
        """Make many visible at once. A failure is logged: they become visible later by themselves."""
        for batch in batches(receipt_handles):
            try:
                refused = await self.change_visibilities([(handle, 0) for handle in batch])
            except DagsterTaskiqError as error:
                logger.warning("messages not handed back: %s", error)
            else:
                _log_refused("handed back", [*refused.values()])

    async def hide(self, seconds: Mapping[str, int]) -> None:
        """Hide messages, by receipt, for so long. A failure is ignored: they come again earlier."""
        for batch in batches([*seconds.items()]):
            with suppress(DagsterTaskiqError):
                await self.change_visibilities(batch)

    async def check(self) -> None:
        """Check that the queue is there. Raises `QueueMissing`, `QueueUnreachable` or `AccessDenied`."""
        await self._ask(lambda client: client.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"]))

    async def retention_s(self) -> int:
        """For how many seconds it keeps a message. Raises a `QueueError`."""
        name: Literal["MessageRetentionPeriod"] = "MessageRetentionPeriod"
        answer = await self._ask(lambda client: client.get_queue_attributes(QueueUrl=self.url, AttributeNames=[name]))
        return int(answer["Attributes"][name])

    def log_unreadable(self, message_id: str, error: Exception) -> None:
        """Log once for each message that it stays until it expires."""
        if self._unreadable.add(message_id, True):
            logger.warning("%s: unreadable message %s is left to expire: %s", self.url, message_id, error)


class Renewals:
    """Sends the renewals that are due at the same moment together, ten in a request."""

    def __init__(self, queue: SQSQueue) -> None:
        self._queue = queue
        self._due: list[tuple[str, int, asyncio.Future[None]]] = []
        self._requests: set[asyncio.Task[None]] = set()

    async def renew(self, receipt_handle: str, timeout_s: int) -> None:
        """Hide one message for `timeout_s` seconds from now. Raises `LeaseLost` or another `QueueError`."""
        loop = asyncio.get_running_loop()
        renewed: asyncio.Future[None] = loop.create_future()
        self._due.append((receipt_handle, timeout_s, renewed))
        if len(self._due) == 1:
            loop.call_later(_TOGETHER_S, self._send)
        await renewed

    def _send(self) -> None:
        due, self._due = [one for one in self._due if not one[2].done()], []
        for batch in batches(due):
            request = asyncio.create_task(self._send_batch(batch), name="renew leases")
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)

    async def _send_batch(self, batch: Sequence[tuple[str, int, "asyncio.Future[None]"]]) -> None:
        whole: Exception | None = None
        refused: Mapping[int, BatchResultErrorEntryTypeDef] = {}
        try:
            refused = await self._queue.change_visibilities([(handle, timeout_s) for handle, timeout_s, _ in batch])
        except Exception as error:  # noqa: BLE001 - it is for those who wait
            whole = error
        for number, (_, _, renewed) in enumerate(batch):
            if renewed.done():
                continue
            if why := whole or (refusal(self._queue.url, refused[number]) if number in refused else None):
                renewed.set_exception(why)
            else:
                renewed.set_result(None)


class Receipt:
    """One received message: the three calls that its lease needs."""

    def __init__(self, queue: SQSQueue, receipt_handle: str) -> None:
        self._queue = queue
        self._handle = receipt_handle

    async def renew(self, timeout_s: int) -> None:
        """Hide it for `timeout_s` seconds from now."""
        await self._queue.renewals.renew(self._handle, timeout_s)

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
