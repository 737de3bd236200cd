"""A receiver at work inside a test, and looking at queues from outside."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from taskiq.brokers.inmemory_broker import InmemoryResultBackend

from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.cancellable_receiver import CancellableReceiver, ReceiverHooks
from dagster_taskiq.queue_names import cancel_queue_url
from tests.support.moto import REGION, sqs_client

IN_FLIGHT = "ApproximateNumberOfMessagesNotVisible"
VISIBLE = "ApproximateNumberOfMessages"


def broker_for(queue_url: str, endpoint: str, **options: Any) -> CancellableSQSBroker:
    """A broker that polls briefly (moto is deaf for a blocked FIFO group until the poll ends)."""
    options = {"wait_time": 1, "max_messages": 1, "endpoint_url": endpoint, **options}
    broker = CancellableSQSBroker(queue_url, REGION, **options)
    broker.with_result_backend(InmemoryResultBackend())
    return broker


@asynccontextmanager
async def working(
    broker: CancellableSQSBroker,
    hooks: ReceiverHooks | None = None,
    **options: Any,
) -> AsyncIterator[CancellableReceiver]:
    """A receiver that listens; at the end it finishes its work."""
    receiver = CancellableReceiver(broker, hooks=hooks, **{"max_async_tasks": 4, **options})
    finish = asyncio.Event()
    listening = asyncio.create_task(receiver.listen(finish), name="listen")
    ready = asyncio.create_task(receiver.listening.wait())
    try:
        async with asyncio.timeout(20):
            await asyncio.wait({listening, ready}, return_when=asyncio.FIRST_COMPLETED)
        yield receiver
    finally:
        ready.cancel()
        finish.set()
        try:
            async with asyncio.timeout(20):
                await listening
        finally:
            await broker.shutdown()


def leftovers() -> list[str]:
    """The names of asyncio tasks of ours that still run."""
    ours = ("renew", "task ", "hear", "settle", "conclude", "receive", "last receive", "lease lost", "hand back")
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(ours)]


class Outside:
    """What somebody sees who only looks at the queues."""

    def __init__(self, queue_url: str, endpoint: str) -> None:
        self.queue_url = queue_url
        self.cancel_url = cancel_queue_url(queue_url)
        self._client = sqs_client(endpoint)

    def counts(self, url: str) -> tuple[int, int]:
        """Visible, in flight."""
        known = self._client.get_queue_attributes(QueueUrl=url, AttributeNames=[VISIBLE, IN_FLIGHT])["Attributes"]
        return int(known[VISIBLE]), int(known[IN_FLIGHT])

    def work(self) -> tuple[int, int]:
        """Work messages: visible, in flight."""
        return self.counts(self.queue_url)

    def cancels(self) -> tuple[int, int]:
        """Cancel messages: visible, in flight."""
        return self.counts(self.cancel_url)

    def send(self, url: str, body: str, key: str = "x") -> None:
        """Send anything."""
        group = (
            {"MessageGroupId": key, "MessageDeduplicationId": f"{key}-{hash(body)}"} if url.endswith(".fifo") else {}
        )
        self._client.send_message(QueueUrl=url, MessageBody=body, **group)

    def receive(self, url: str, count: int = 10) -> list[Any]:
        """Take messages, without waiting."""
        answer = self._client.receive_message(QueueUrl=url, MaxNumberOfMessages=count, AttributeNames=["All"])
        return list(answer.get("Messages", []))

    def delete(self, url: str, message: Any) -> None:
        """Delete a message that was received."""
        self._client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
