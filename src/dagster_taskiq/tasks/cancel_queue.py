"""The cancel queue: requests sent, received, deleted, handed on. Knows no tasks and not who runs them."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dagster_taskiq.errors import DagsterTaskiqError, MessageUnreadable
from dagster_taskiq.messages import CancelRequest, StandingCancel, read_cancel
from dagster_taskiq.sqs.client import MAX_BATCH
from dagster_taskiq.sqs.queue import SQSQueue, batches, grouping, history


@dataclass(frozen=True, slots=True)
class ReceivedCancel:
    """A cancel message as one receive brought it. `sent_at` is in seconds since the epoch, by the clock of SQS."""

    request: CancelRequest
    message_id: str
    receipt_handle: str
    receive_count: int
    sent_at: float


@dataclass(frozen=True, slots=True)
class ReceivedStanding:
    """The same, of one that is about many tasks."""

    request: StandingCancel
    message_id: str
    receipt_handle: str
    receive_count: int
    sent_at: float


Received = ReceivedCancel | ReceivedStanding


class CancelQueue:
    """Cancel requests on one queue. On a FIFO queue each task id is a group, so that none can block another."""

    def __init__(self, queue: SQSQueue) -> None:
        self._queue = queue

    async def send(
        self,
        task_id: str,
        reason: str | None,
        requested_by: str | None,
        *,
        status_follows: bool = False,
        timed_out: bool = False,
    ) -> None:
        """Send one request. Raises a `DagsterTaskiqError`."""
        body = CancelRequest(task_id, reason, requested_by, time.time(), status_follows, timed_out).to_json()
        await self._queue.send(body, self._grouping(task_id))

    async def send_standing(self, request: StandingCancel) -> None:
        """Send one that is about many tasks. Raises a `DagsterTaskiqError`, also for a request that is not valid."""
        await self._queue.send(request.to_json(), grouping(self._queue.is_fifo, None))

    async def send_all(
        self,
        task_ids: Iterable[str],
        reason: str | None,
        requested_by: str | None,
        *,
        status_follows: bool = False,
        timed_out: bool = False,
    ) -> Mapping[str, str]:
        """Send many, ten to a request. Returns those that were not sent, with the reason; they do not stop the rest."""
        bodies: dict[str, str] = {}
        failed: dict[str, str] = {}
        for task_id in dict.fromkeys(task_ids):
            try:
                request = CancelRequest(task_id, reason, requested_by, time.time(), status_follows, timed_out)
                bodies[task_id] = request.to_json()
            except MessageUnreadable as error:
                failed[task_id] = str(error)
        for batch in batches(list(bodies)):
            messages = [(bodies[task_id], self._grouping(task_id)) for task_id in batch]
            try:
                refused = await self._queue.send_batch(messages)
            except DagsterTaskiqError as error:
                refused = dict.fromkeys(range(len(batch)), str(error))
            failed |= {batch[number]: why for number, why in refused.items()}
        return failed

    def _grouping(self, task_id: str) -> dict[str, str]:
        # A fresh deduplication id: SQS would silently drop a second request for the same task within five minutes.
        return grouping(self._queue.is_fifo, task_id) if self._queue.is_fifo else {}

    async def receive(self, *, wait_s: int, visibility_s: int) -> list[Received]:
        """One long poll. Unreadable messages are logged once and left to expire."""
        cancels: list[Received] = []
        for raw in await self._queue.receive(at_most=MAX_BATCH, wait_s=wait_s, visibility_s=visibility_s):
            try:
                request = read_cancel(raw["Body"])
            except MessageUnreadable as error:
                self._queue.log_unreadable(raw["MessageId"], error)
            else:
                known = raw["MessageId"], raw["ReceiptHandle"], *history(raw)
                if isinstance(request, CancelRequest):
                    cancels.append(ReceivedCancel(request, *known))
                else:
                    cancels.append(ReceivedStanding(request, *known))
        return cancels

    async def delete(self, cancels: Sequence[Received]) -> None:
        """Nobody needs them any more. Raises nothing of ours."""
        await self._queue.delete_all([cancel.receipt_handle for cancel in cancels])

    async def pause(self, seconds: Mapping[str, int]) -> None:
        """Let others have messages, by receipt, after so many seconds. Raises nothing of ours."""
        await self._queue.hide(seconds)

    async def hand_back(self, cancels: Sequence[Received]) -> None:
        """Let another worker have them at once. Raises nothing of ours."""
        await self._queue.hand_back([cancel.receipt_handle for cancel in cancels])
