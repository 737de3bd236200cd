"""A taskiq broker over SQS whose tasks can be cancelled: leased work messages, and the cancel queue beside them.

Knows taskiq's messages and the two queues; no Dagster, no processes, and not what a worker does with a cancellation.
The envelope on the wire is that of `taskiq_aws.SQSBroker`, so each of the two can feed the other.
"""

import asyncio
import base64
import functools
import json
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import ConfigDict
from taskiq import AckableMessage, BrokerMessage
from taskiq.abc.result_backend import AsyncResultBackend
from taskiq.acks import AckController
from taskiq_aws import SQSBroker

from dagster_taskiq import queue_names
from dagster_taskiq._retry import retry_async
from dagster_taskiq._shield import shielded
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.errors import AccessDenied, MessageTooLarge, QueueError
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.admin import CANCEL_VISIBILITY_S, list_routes
from dagster_taskiq.sqs.client import MAX_BATCH, Connection
from dagster_taskiq.sqs.errors import MAX_MESSAGE_BYTES, is_missing_permission
from dagster_taskiq.sqs.lease import Lease, Settle
from dagster_taskiq.sqs.queue import Receipt, SQSQueue, grouping, history
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.sqs.unusable import UnusableMessages
from dagster_taskiq.tasks.cancel_queue import CancelQueue, Received
from dagster_taskiq.tasks.cancel_queue import ReceivedCancel as ReceivedCancel
from dagster_taskiq.tasks.canceller import Canceller
from dagster_taskiq.tasks.middleware import CancellableTask, Listener
from dagster_taskiq.tasks.predicates import Predicates

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient
    from types_aiobotocore_sqs.type_defs import MessageTypeDef

logger = getLogger(__name__)

_ATTRIBUTES: Final = 512
"""Bytes of a message in a batch beside its body: group and deduplication ids of 128 each, and room."""


class LeasedMessage(AckableMessage):
    """A work message, ours until its lease is settled; `ack` deletes it. `sent_at`: seconds since the epoch."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    lease: Lease
    message_id: str
    queue_url: str
    receive_count: int = 1
    sent_at: float = 0.0


class CancellableSQSBroker(SQSBroker, Canceller):  # type: ignore[misc]  # taskiq_aws has no type marker
    """`taskiq_aws.SQSBroker` with one warm client, renewed leases, FIFO and fair queues, and cancellation."""

    def __init__(
        self,
        queue_url: str,
        aws_region: str | None = None,
        max_messages: int = 10,
        wait_time: int = 20,
        task_id_generator: Callable[[], str] | None = None,
        result_backend: AsyncResultBackend[Any] | None = None,
        *,
        endpoint_url: str | None = None,
        enable_cancellation: bool = True,
        visibility_timeout_s: int = 30,
        cancel_visibility_timeout_s: int = CANCEL_VISIBILITY_S,
        cancel_queue_url: str | None = None,
    ) -> None:
        # taskiq warns of the last two as deprecated, but only when they are not None.
        super().__init__(queue_url, aws_region, max_messages, wait_time, task_id_generator, result_backend)
        # Several work queues may share one cancel queue.
        self.cancel_queue_url = cancel_queue_url or queue_names.cancel_queue_url(queue_url)
        self.endpoint_url = endpoint_url
        self.enable_cancellation = enable_cancellation
        self.visibility_timeout_s = visibility_timeout_s
        # A cancel that a killed worker had is to be visible before the work is.
        self.cancel_visibility_timeout_s = min(cancel_visibility_timeout_s, max(1, visibility_timeout_s // 2))
        self._connection: Connection | None = None
        self._lender: CancellableSQSBroker | None = None
        self._work = SQSQueue(queue_url, self._client)
        self._cancel_queue = SQSQueue(self.cancel_queue_url, self._client)
        self._cancels = CancelQueue(self._cancel_queue)
        self.unusable = UnusableMessages(visibility_timeout_s)
        """Work messages that nobody can use, as far as this broker has received them."""
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._made_at = time.monotonic()
        self.decorator_class = CancellableTask
        self.cancelled_listeners: list[Listener] = []
        self.predicates = Predicates()
        """What `predicate` has registered."""
        self.free_slots: Callable[[], int] = lambda: MAX_BATCH
        """How many messages the receiver takes, now. No more are received: what waits for a slot waits in SQS."""
        self.may_receive: Callable[[], Awaitable[Any]] | None = None
        """Awaited before work is received: until it returns, everything waits in SQS."""

    @classmethod
    def from_settings(cls, settings: Settings, queue_url: str) -> Self:
        """A broker for the work queue or the steps queue; cancels go over the one cancel queue for both."""
        return cls(
            queue_url,
            settings.region_name,
            max_messages=settings.max_number_of_messages,
            wait_time=settings.wait_time_seconds,
            endpoint_url=settings.endpoint_url,
            enable_cancellation=settings.enable_cancellation,
            visibility_timeout_s=settings.visibility_timeout_seconds,
            cancel_queue_url=settings.cancel_queue_url,
        )

    def use_client_of(self, other: Self) -> None:
        """From now on, use the other one's client. It has to live on the same event loop, and is to be closed last."""
        self._lender = other

    async def _client(self) -> "SQSClient":
        if self._lender is not None:
            return await self._lender._client()  # noqa: SLF001 - of another one of these
        # Another event loop needs another client: a client's sockets belong to the loop that opened them.
        if self._connection is None or self._connection.loop is not asyncio.get_running_loop():
            self._connection = Connection(self.aws_region, self.endpoint_url)
        return await self._connection.client()

    async def startup(self) -> None:
        """Open the client, so that the first message does not wait for it."""
        await self._client()
        await super().startup()

    async def shutdown(self) -> None:
        """Leave what is still leased to the queue, and close the client."""
        try:
            await super().shutdown()
        finally:
            for lease in list(self._leases):
                await lease.settle(Settlement.LEAVE)
            connection, self._connection = self._connection, None
            if connection is not None and connection.loop is asyncio.get_running_loop():
                await connection.close()

    async def check_queues(self) -> None:
        """Ask for the queues once. Raises `QueueMissing`, `QueueUnreachable` or `AccessDenied`, with a clear line.

        A role without the permission to ask (`sqs:GetQueueAttributes`) can still work: that is only a warning.
        """
        for queue in (self._work, self._cancel_queue) if self.enable_cancellation else (self._work,):
            try:
                await queue.check()
            except AccessDenied as error:
                if not is_missing_permission(error):
                    raise
                logger.warning("queue not checked: %s", error)

    async def list_routes(self, queue_url: str) -> tuple[str, ...]:
        """The routes that have all of their queues; `queue_url`: that of the unnamed one. Raises a `QueueError`."""
        return await list_routes(await self._client(), queue_url)

    async def kick(self, message: BrokerMessage) -> None:
        """Send a task. Raises `MessageTooLarge` or a `QueueError`."""
        await self._work.send(_envelope(message), self._grouping(message))
        logger.debug("task sent", extra={"task_id": message.task_id})

    async def kick_all(self, messages: Sequence[BrokerMessage]) -> dict[str, str]:
        """Send many tasks, as many to a request as fit. Returns the ids of those that SQS refused, with the reason.

        Raises `MessageTooLarge` before any is sent, and a `QueueError` when a request fails: what was sent by then
        stays sent.
        """
        refused: dict[str, str] = {}
        for batch in _batches([(message, _envelope(message)) for message in messages]):
            answer = await self._work.send_batch([(body, self._grouping(message)) for message, body in batch])
            refused |= {batch[number][0].task_id: why for number, why in answer.items()}
        return refused

    def _grouping(self, message: BrokerMessage) -> dict[str, str]:
        if not self._work.is_fifo:
            return grouping(False, message.labels.get("message_group"))
        # A group for each task: no task waits for another. A retry keeps the task id, and must not be taken for a
        # duplicate of the first try.
        retries = message.labels.get("_retries")
        return grouping(True, message.task_id, f"{message.task_id}-retry-{retries}" if retries else message.task_id)

    async def listen(self) -> AsyncGenerator[LeasedMessage, None]:
        """Yield work messages, each leased from receipt. A receive that fails is tried again for ever.

        When the generator is closed, what it has received and not yielded is handed back.
        """
        waiting: deque[LeasedMessage] = deque()
        try:
            while True:
                waiting.extend(await self.receive_work(self.free_slots))
                while waiting:
                    yield waiting.popleft()
        finally:
            await shielded(hand_back(waiting), name="hand back unstarted work")

    async def receive_work(self, at_most: Callable[[], int]) -> list[LeasedMessage]:
        """One long poll, of as many messages as that says when it begins; each is leased. Tried again for ever."""
        received = await retry_async(functools.partial(self._receive, at_most), doing="receive work", on=QueueError)
        hidden: dict[str, int] = {}
        messages = [message for raw in received if (message := self._leased(raw, hidden)) is not None]
        try:
            await self._work.hide(hidden)
        except asyncio.CancelledError:
            await shielded(hand_back(messages), name="hand back unstarted work")
            raise
        return messages

    async def _receive(self, at_most: Callable[[], int]) -> "Sequence[MessageTypeDef]":
        if self.may_receive is not None:
            await self.may_receive()
        count = max(1, min(self.max_messages, at_most()))
        return await self._work.receive(at_most=count, wait_s=self.wait_time, visibility_s=self.visibility_timeout_s)

    def _leased(self, raw: "MessageTypeDef", hidden: dict[str, int]) -> LeasedMessage | None:
        """The message, with its lease; None when it is unreadable, and then its receipt is added to `hidden`."""
        message_id = raw["MessageId"]
        try:
            data = base64.b64decode(json.loads(raw["Body"])["message"], validate=True)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            hidden[raw["ReceiptHandle"]] = self.unusable.add(message_id, f"unreadable ({error!r})", history(raw)[0])
            return None
        receipt = Receipt(self._work, raw["ReceiptHandle"])
        lease = Lease(
            receipt,
            visibility_timeout_s=self.visibility_timeout_s,
            in_step_with=self._made_at,
            name=message_id,
        ).start()
        self._leases.add(lease)
        receive_count, sent_at = history(raw)
        return LeasedMessage(
            data=data,
            ack=functools.partial(lease.settle, Settlement.DELETE),
            lease=lease,
            message_id=message_id,
            queue_url=self.queue_url,
            receive_count=receive_count,
            sent_at=sent_at,
        )

    async def receive_cancels(self, wait_s: int | None = None) -> list[Received]:
        """Wait for cancel messages (one long poll, of `wait_time` seconds unless given).

        Unreadable ones are logged once and left to expire.
        """
        wait_s = self.wait_time if wait_s is None else min(wait_s, self.wait_time)
        return await self._cancels.receive(wait_s=wait_s, visibility_s=self.cancel_visibility_timeout_s)

    def lease_of_cancel(self, cancel: ReceivedCancel) -> Lease:
        """A lease that keeps a cancel message from others; to be started."""
        lease = Lease(
            Receipt(self._cancel_queue, cancel.receipt_handle),
            visibility_timeout_s=self.cancel_visibility_timeout_s,
            renew_every_s=self.cancel_visibility_timeout_s / 2,
            in_step_with=self._made_at,
            name=f"cancel message {cancel.message_id}",
        )
        self._leases.add(lease)
        return lease

    async def delete_cancels(self, cancels: Sequence[Received]) -> None:
        """Nobody needs them any more. A failure is logged: they come again, and are deleted then."""
        await self._cancels.delete(cancels)

    async def hand_back_cancels(self, cancels: Sequence[Received]) -> None:
        """Let another worker have them at once. A failure is logged: they come back by themselves."""
        await self._cancels.hand_back(cancels)

    async def send_cancels(self, cancellations: Mapping[str, Cancellation]) -> None:
        """Send a cancel for each task id, on behalf of whoever has asked for it. A failure is logged."""
        by_cause: dict[tuple[str | None, str | None], list[str]] = {}
        for task_id, one in cancellations.items():
            by_cause.setdefault((one.reason, one.requested_by), []).append(task_id)
        for (reason, requested_by), task_ids in by_cause.items():
            if failed := await self._cancels.send_all(task_ids, reason, requested_by):
                logger.warning("%d cancels not sent: %s", len(failed), next(iter(failed.values())))

    async def pause_cancels(self, seconds: Mapping[str, int]) -> None:
        """Let any worker have them later: after so many seconds, by receipt. A failure means: earlier."""
        await self._cancels.pause(seconds)


def _envelope(message: BrokerMessage) -> str:
    envelope = {
        "task_id": message.task_id,
        "task_name": message.task_name,
        "message": base64.b64encode(message.message).decode(),
        "labels": message.labels,
    }
    body = json.dumps(envelope)
    if len(body) > MAX_MESSAGE_BYTES:  # it is ASCII: a character is a byte
        raise MessageTooLarge(
            f"task {message.task_id}: a message of {len(body):,} bytes is over the SQS limit of"
            f" {MAX_MESSAGE_BYTES:,}; pass a reference to the data instead"
        )
    return body


def _batches(messages: Iterable[tuple[BrokerMessage, str]]) -> Iterator[list[tuple[BrokerMessage, str]]]:
    """Ten at the most, and together not over the limit of SQS, which is the same for one message and for a batch."""
    batch: list[tuple[BrokerMessage, str]] = []
    for message in messages:
        size = sum(len(body) + _ATTRIBUTES for _, body in [*batch, message])
        if len(batch) == MAX_BATCH or (batch and size > MAX_MESSAGE_BYTES):
            yield batch
            batch = []
        batch.append(message)
    if batch:
        yield batch


async def hand_back(messages: Iterable[LeasedMessage]) -> None:
    """Let anybody have them at once."""
    await asyncio.gather(*[message.lease.settle(Settlement.HAND_BACK) for message in messages])


def settling(message: bytes | AckableMessage) -> Settle:
    """How to settle a message; without a lease, all that can be done is to acknowledge it."""
    if isinstance(message, LeasedMessage):
        return message.lease.settle
    acks = AckController(message.ack if isinstance(message, AckableMessage) else None)

    async def settle(settlement: Settlement, delay_s: int = 0) -> None:
        if settlement is Settlement.DELETE and acks.is_ackable:
            await acks.ack()

    return settle
