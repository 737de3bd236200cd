"""Listen to the cancel queue for one worker: whose cancel is it, and what becomes of its message.

Knows which ids to ask about and how cancels travel among competing workers; not how work is stopped.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Final, NoReturn, Protocol

from dagster_taskiq._retry import retry_async
from dagster_taskiq._shield import shielded
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.cancellation.words import THE_RUN
from dagster_taskiq.errors import QueueError
from dagster_taskiq.messages import CancelRequest
from dagster_taskiq.sqs.lease import Lease
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.tasks.cancel_queue import Received, ReceivedCancel, ReceivedStanding
from dagster_taskiq.tasks.held_cancels import HeldCancels
from dagster_taskiq.tasks.predicates import TaskView
from dagster_taskiq.tasks.standing_cancels import EVERY_S, StandingCancels

logger = getLogger(__name__)

SIT_OUT_S: Final = 0.5
LONGEST_SIT_OUT_S: Final = 5.0
_PATIENCE: Final = 20
_QUESTIONS: Final = 100
"""So many messages at most wait for an answer; about the others it is asked when they come back."""


_LOOKS: Final = 5
_LOOK_S: Final = 1
"""One second is enough for SQS to ask all of its servers, which it does not do without any waiting."""
_ROUND_S: Final = 10.0
"""A message that goes round comes to each worker more often than that, unless there are very many."""


class CancelSource(Protocol):
    """Where cancel messages come from."""

    async def receive_cancels(self, wait_s: int | None = None) -> list[Received]:
        """Wait for some, so many seconds at most. May raise a `QueueError`."""

    async def delete_cancels(self, cancels: Sequence[Received]) -> None:
        """Nobody needs them any more."""

    async def hand_back_cancels(self, cancels: Sequence[Received]) -> None:
        """Let another worker have them at once."""

    async def send_cancels(self, cancellations: Mapping[str, Cancellation]) -> None:
        """Send a cancel for each task id."""

    async def pause_cancels(self, seconds: Mapping[str, int]) -> None:
        """Let any worker have them later: after so many seconds, by receipt."""


class Tasks(Protocol):
    """The tasks of this worker: `RunningTasks`."""

    @property
    def finished(self) -> TTLCache[bool]:
        """Task ids whose work is known to be over."""

    def cancel(self, task_id: str, cancellation: Cancellation) -> bool:
        """Cancel a task, if it runs here; whether it does."""

    def cancel_all(self, cancellation_of: Callable[[TaskView], Cancellation | None]) -> Mapping[str, Cancellation]:
        """Cancel those for which there is a cancellation; returns these, by task id."""


class Cancels(Protocol):
    """Whatever listens to cancels, to those who work: `CancelListener`."""

    @property
    def listening(self) -> asyncio.Event:
        """Set when cancels are being received."""

    def cancelled_ahead(self, task_id: str, task: TaskView | None = None) -> Cancellation | None:
        """The cancel that was received before the work came, if there was one lately."""

    async def look(self) -> None:
        """Receive what is there now, for work that may have been cancelled in a worker that has died."""

    async def settled(self, task_id: str, *, over: bool) -> None:
        """Work of this worker is settled. `over`: nobody will work under its id again."""

    async def run(self) -> None:
        """Listen until cancelled."""


class CancelListener:
    """SQS gives a cancel to any worker: the owner takes it, everybody else hands it on.

    `is_over` answers for a task id whether its work is known to be finished, wherever it ran. It is asked beside the
    receiving, for one at a time, and must have a bound: the worker hears its own cancels meanwhile.

    `held`: where the queue alone knows of a cancellation, the owner keeps the message until the work is settled.
    `standing`: what is known here of cancels of many tasks; None: they are not for this worker.
    `comes_back_s`: after so many seconds the work of a worker that was killed has come again; until then its cancel is
    needed, however old it is.
    """

    def __init__(
        self,
        source: CancelSource,
        tasks: Tasks,
        *,
        cancel_ttl_s: float,
        is_over: Callable[[str], Awaitable[bool]] | None = None,
        held: HeldCancels | None = None,
        standing: StandingCancels | None = None,
        comes_back_s: float = 0.0,
        now: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.listening = asyncio.Event()
        self._source = source
        self._tasks = tasks
        self._cancel_ttl_s = cancel_ttl_s
        self._is_over = is_over
        self._held = held
        self._standing = standing
        self._comes_back_s = comes_back_s
        self._now = now
        self._uniform = uniform
        self._ahead: TTLCache[Cancellation] = TTLCache(ttl_s=cancel_ttl_s)
        self._seen: TTLCache[bool] = TTLCache(ttl_s=cancel_ttl_s)
        self._round: TTLCache[float] = TTLCache(ttl_s=_ROUND_S)
        """Since when a message has been going round: one that somebody has held begins anew."""
        self._over: TTLCache[bool] = TTLCache(ttl_s=cancel_ttl_s)
        """Messages, not tasks: for a task that was over, or not known, work may come later."""
        self._questions: asyncio.Queue[ReceivedCancel] = asyncio.Queue(_QUESTIONS)
        self._asked: set[str] = set()
        """The messages in `_questions`, and the one that is being asked about."""
        self._fails = False
        """Whether the last question had no answer: what has none after it is the same outage."""
        self._looking: asyncio.Task[None] | None = None

    def cancelled_ahead(self, task_id: str, task: TaskView | None = None) -> Cancellation | None:
        """The cancel that was received before the work came, if there was one lately."""
        ahead = self._ahead.get(task_id)
        if ahead is None and task is not None and self._standing is not None:
            ahead = self._standing.cancellation_of(task)
        return ahead

    async def look(self) -> None:
        """Receive what is on the cancel queue now, for work that may have been cancelled in a worker that has died.

        Those who ask at the same time share one look. Takes a few seconds at most; without an answer it is given up.
        """
        if self._held is None:
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="look for cancels")
        looking = self._looking  # by the time it has ended, somebody else may have begun another one
        await asyncio.wait({looking})
        if not looking.cancelled():
            looking.result()

    async def _look(self) -> None:
        known: set[str] = set()
        for _ in range(_LOOKS):
            try:
                received = await self._source.receive_cancels(_LOOK_S)
            except QueueError as error:
                logger.warning("cannot look for cancels of work that comes again, it begins: %s", error)
                return
            await shielded(self.handle(received), name="sort cancels")
            if {one.message_id for one in received} <= known:
                return
            known |= {one.message_id for one in received}

    async def settled(self, task_id: str, *, over: bool) -> None:
        """Work of this worker is settled. `over`: nobody will work under its id again, so nobody needs its cancels."""
        if self._held is None:
            return
        held = self._held.of(task_id)
        if held is not None and not over:
            self._ahead.add(task_id, _cancellation(held))
        await self._held.release(task_id, over=over)

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
            helpers = {asking} if self._looking is None else {asking, self._looking}
            for helper in helpers:
                helper.cancel()
            await asyncio.wait(helpers)

    async def handle(self, received: Sequence[Received]) -> float:
        """Take what is ours, hand on what is not; for how many seconds to sit out before the next receive."""
        # Ours first, and without awaiting anything: a cancel does not wait for the bookkeeping of others.
        single = [one for one in received if isinstance(one, ReceivedCancel)]
        ours = [one for one in single if self._tasks.cancel(one.request.task_id, _cancellation(one))]
        held, earlier = self._hold(ours)
        done = [one for one in single if one not in held and (one in ours or self._needs_nobody(one))]
        others = [one for one in single if one not in held and one not in done]
        again = [one for one in others if one.message_id in self._seen]
        for one in others:
            self._ahead.add(one.request.task_id, _cancellation(one))
            self._seen.add(one.message_id, True)
        for one in again:
            self._ask_about(one)
        standing = self._sort_standing([one for one in received if isinstance(one, ReceivedStanding)])
        await asyncio.gather(
            self._source.hand_back_cancels([*others, *standing.on, *standing.again]),
            self._source.delete_cancels([*done, *standing.over]),
            self._source.pause_cancels(standing.later),
            # If this worker dies before they have ended, others have to know of each: these are held, as any cancel is.
            self._source.send_cancels(standing.ours),
            *[lease.settle(Settlement.LEAVE) for lease in earlier],
        )
        # Polling at once would bring the same message to the same worker for ever; having seen it before, let it
        # visit the others. Meanwhile this worker is deaf, so it does so for no other reason.
        back: list[Received] = [*again, *standing.again]
        return max((self._sit_out_s(one) for one in back), default=0.0)

    def _sort_standing(self, received: Sequence[ReceivedStanding]) -> "_Standing":
        """Cancel those of our tasks that are meant, and see to it that all other workers hear of it, too."""
        sorted_ = _Standing()
        known = self._standing
        for one in received:
            if known is None:
                if self._seen.add(one.message_id, True):
                    logger.warning("a cancel of many tasks is not for workers of runs; it is left to expire")
                sorted_.later[one.receipt_handle] = EVERY_S
                continue
            new = known.see(one.message_id, one.request, _cancellation(one), one.sent_at)
            if new:
                sorted_.ours.update(self._tasks.cancel_all(known.cancellation_of))
            if known.is_over(one.message_id):
                sorted_.over.append(one)
            elif new:
                sorted_.on.append(one)
            elif known.spreads(one.message_id):
                sorted_.again.append(one)
            else:
                sorted_.later[one.receipt_handle] = known.pause_s(one.message_id, one.receive_count)
        return sorted_

    def _hold(self, ours: Sequence[ReceivedCancel]) -> tuple[Sequence[ReceivedCancel], Sequence[Lease]]:
        """Those that are held now, and the leases that they no longer have."""
        if self._held is None:
            return [], []
        kept, earlier = [], []
        for one in ours:
            if self._held.has_room(one):
                kept.append(one)
                earlier.append(self._held.hold(one))
        return kept, [lease for lease in earlier if lease is not None]

    def _needs_nobody(self, cancel: ReceivedCancel) -> bool:
        task_id = cancel.request.task_id
        if task_id in self._tasks.finished or cancel.message_id in self._over:
            return True
        now = self._now()
        since = self._round.get(cancel.message_id) or now
        self._round.add(cancel.message_id, since)
        if now - cancel.sent_at <= self._cancel_ttl_s or now - since < self._comes_back_s:
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

    def _sit_out_s(self, cancel: Received) -> float:
        # Many receives mean many workers: each has to stay away longer for the message to get round.
        longer = 1 + cancel.receive_count / _PATIENCE
        return min(LONGEST_SIT_OUT_S, SIT_OUT_S * longer) * self._uniform(0.5, 1.5)


@dataclass(frozen=True, slots=True)
class _Standing:
    """Standing cancels of one receive, by what becomes of their messages."""

    over: list[ReceivedStanding] = field(default_factory=list)
    on: list[ReceivedStanding] = field(default_factory=list)
    """Handed on at once."""
    again: list[ReceivedStanding] = field(default_factory=list)
    """The same, and this worker sits out, because it has seen it before."""
    later: dict[str, int] = field(default_factory=dict)
    """By receipt: hidden from all for so many seconds."""
    ours: dict[str, Cancellation] = field(default_factory=dict)
    """By task id: what they have cancelled here."""


def _cancellation(received: Received) -> Cancellation:
    request = received.request
    timed_out = isinstance(request, CancelRequest) and request.timed_out
    return Cancellation(
        # No other kind can be asked for: a worker knows by itself that it stops, or has lost a lease.
        kind=CancelKind.DEADLINE if timed_out else CancelKind.REQUESTED,
        reason=request.reason,
        # Of a step whose run's time is over: nobody has asked.
        requested_by=None if timed_out and request.requested_by == THE_RUN else request.requested_by,
        requested_at=request.requested_at,
        channel=CancelChannel.CANCEL_QUEUE,
        attempt=received.receive_count,
        status_follows=isinstance(request, CancelRequest) and request.status_follows,
    )
