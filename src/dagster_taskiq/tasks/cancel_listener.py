"""Listen to the cancel queue for one worker: whose cancel is it, and what becomes of its message.

Knows which ids to ask about and how cancels travel among competing workers; not how work is stopped.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from logging import getLogger
from typing import Final, NoReturn, Protocol

from dagster_taskiq._retry import retry_async
from dagster_taskiq._shield import shielded
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.errors import QueueError
from dagster_taskiq.tasks.cancel_queue import ReceivedCancel

logger = getLogger(__name__)

SIT_OUT_S: Final = 0.5
LONGEST_SIT_OUT_S: Final = 5.0
_PATIENCE: Final = 20
_QUESTIONS: Final = 100
"""So many messages at most wait for an answer; about the others it is asked when they come back."""


class CancelSource(Protocol):
    """Where cancel messages come from."""

    async def receive_cancels(self) -> list[ReceivedCancel]:
        """Wait for some. May raise a `QueueError`."""

    async def delete_cancels(self, cancels: Sequence[ReceivedCancel]) -> None:
        """Nobody needs them any more."""

    async def hand_back_cancels(self, cancels: Sequence[ReceivedCancel]) -> None:
        """Let another worker have them at once."""


class Tasks(Protocol):
    """The tasks of this worker: `RunningTasks`."""

    @property
    def finished(self) -> TTLCache[bool]:
        """Task ids whose work is known to be over."""

    def cancel(self, task_id: str, cancellation: Cancellation) -> bool:
        """Cancel a task, if it runs here; whether it does."""


class CancelListener:
    """SQS gives a cancel to any worker: the owner takes it, everybody else hands it on.

    `is_over` answers for a task id whether its work is known to be finished, wherever it ran. It is asked beside the
    receiving, for one at a time, and must have a bound: the worker hears its own cancels meanwhile.
    """

    def __init__(
        self,
        source: CancelSource,
        tasks: Tasks,
        *,
        cancel_ttl_s: float,
        is_over: Callable[[str], Awaitable[bool]] | None = None,
        now: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.listening = asyncio.Event()
        self._source = source
        self._tasks = tasks
        self._cancel_ttl_s = cancel_ttl_s
        self._is_over = is_over
        self._now = now
        self._uniform = uniform
        self._ahead: TTLCache[Cancellation] = TTLCache(ttl_s=cancel_ttl_s)
        self._seen: TTLCache[bool] = TTLCache(ttl_s=cancel_ttl_s)
        self._over: TTLCache[bool] = TTLCache(ttl_s=cancel_ttl_s)
        """Messages, not tasks: for a task that was over, or not known, work may come later."""
        self._questions: asyncio.Queue[ReceivedCancel] = asyncio.Queue(_QUESTIONS)
        self._asked: set[str] = set()
        """The messages in `_questions`, and the one that is being asked about."""
        self._fails = False
        """Whether the last question had no answer: what has none after it is the same outage."""

    def cancelled_ahead(self, task_id: str) -> Cancellation | None:
        """The cancel that was received before the work came, if there was one lately."""
        return self._ahead.get(task_id)

    async def run(self) -> None:
        """Listen until cancelled."""
        self.listening.set()
        asking = asyncio.create_task(self.ask(), name="ask whether tasks are over")
        try:
            while True:
                received = await retry_async(
                    self._source.receive_cancels, doing="receive cancel messages", on=QueueError
                )
                await asyncio.sleep(await shielded(self.handle(received), name="sort cancels"))
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def handle(self, received: Sequence[ReceivedCancel]) -> float:
        """Take what is ours, hand on what is not; for how many seconds to sit out before the next receive."""
        # Ours first, and without awaiting anything: a cancel does not wait for the bookkeeping of others.
        ours = {one.message_id for one in received if self._tasks.cancel(one.request.task_id, _cancellation(one))}
        done = [one for one in received if one.message_id in ours or self._needs_nobody(one)]
        others = [one for one in received if one not in done]
        again = [one for one in others if one.message_id in self._seen]
        for one in others:
            self._ahead.add(one.request.task_id, _cancellation(one))
            self._seen.add(one.message_id, True)
        for one in again:
            self._ask_about(one)
        await asyncio.gather(self._source.hand_back_cancels(others), self._source.delete_cancels(done))
        # Polling at once would bring the same message to the same worker for ever; having seen it before, let it
        # visit the others. Meanwhile this worker is deaf, so it does so for no other reason.
        return max((self._sit_out_s(one) for one in again), default=0.0)

    def _needs_nobody(self, cancel: ReceivedCancel) -> bool:
        task_id = cancel.request.task_id
        if task_id in self._tasks.finished or cancel.message_id in self._over:
            return True
        if self._now() - cancel.sent_at <= self._cancel_ttl_s:
            return False
        logger.info("cancel message that nobody claimed is dropped", extra={"task_id": task_id})
        self._ahead.add(task_id, _cancellation(cancel))
        return True

    def _ask_about(self, cancel: ReceivedCancel) -> None:
        if self._is_over is not None and cancel.message_id not in self._asked and not self._questions.full():
            self._asked.add(cancel.message_id)
            self._questions.put_nowait(cancel)

    async def ask(self) -> NoReturn:
        """Find out, one by one, which messages are about tasks that are over: such a message is then deleted."""
        while True:
            cancel = await self._questions.get()
            try:
                if self._is_over is not None and await self._is_over(cancel.request.task_id):
                    self._over.add(cancel.message_id, True)
                self._fails = False
            except Exception as error:  # noqa: BLE001 - whoever cannot answer is asked again when the message comes back
                if not self._fails:
                    logger.warning("cannot find out whether cancelled tasks are over, trying again: %s", error)
                self._fails = True
            finally:
                self._asked.discard(cancel.message_id)

    def _sit_out_s(self, cancel: ReceivedCancel) -> float:
        # Many receives mean many workers: each has to stay away longer for the message to get round.
        longer = 1 + cancel.receive_count / _PATIENCE
        return min(LONGEST_SIT_OUT_S, SIT_OUT_S * longer) * self._uniform(0.5, 1.5)


def _cancellation(received: ReceivedCancel) -> Cancellation:
    request = received.request
    return Cancellation(
        kind=CancelKind.REQUESTED,
        reason=request.reason,
        requested_by=request.requested_by,
        requested_at=request.requested_at,
        channel=CancelChannel.CANCEL_QUEUE,
        attempt=received.receive_count,
        status_follows=request.status_follows,
    )
