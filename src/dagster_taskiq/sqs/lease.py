"""Keep one received message invisible, and settle it once. Knows time and three calls; not SQS, not its meaning."""

import asyncio
import time
from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Final, Protocol

from dagster_taskiq._shield import shielded
from dagster_taskiq.errors import LeaseLost, QueueError
from dagster_taskiq.sqs.settlement import Settlement

logger = getLogger(__name__)

MAX_LEASE_S: Final = 43_200
"""SQS keeps a message invisible for twelve hours per receive at most; renewals do not extend that."""
RENEWALS: Final = 4
"""The visibility is renewed this many times before it would run out. Derived, so that it cannot be set wrong."""
_MARGIN_S: Final = 5
_SHORT_S: Final = 1.0
_JUST_NOW: Final = 0.05
"""A moment is skipped that is nearer than this share of the time between two."""
_DELETE_TRIES: Final = 5


class LeaseCalls(Protocol):
    """What a lease does with its message. Each call may raise `LeaseLost`, or a `QueueError` that may be temporary."""

    async def renew(self, timeout_s: int) -> None:
        """Hide it for `timeout_s` seconds from now."""

    async def delete(self) -> None:
        """Delete it, so that it is never received again."""

    async def hand_back(self, delay_s: int) -> None:
        """Make it visible to everybody after `delay_s` seconds."""


class Settle(Protocol):
    """Decide what happens to the message: a lease's `settle`."""

    async def __call__(self, settlement: Settlement, delay_s: int = 0) -> None:
        """Settle it; only the first call counts."""


class Lease:
    """One received message: renewed from receipt (`start`) until it is settled or lost.

    Lost means: the queue says so, or the visibility has run out by our own clock. A lost lease never touches the
    message again, because an old receipt may release or delete a message that another receiver has now.
    """

    def __init__(
        self,
        calls: LeaseCalls,
        *,
        visibility_timeout_s: float,
        renew_every_s: float | None = None,
        in_step_with: float | None = None,
        name: str = "message",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`in_step_with`: a moment of `clock`. Leases with the same one are renewed at the same moments."""
        self._calls = calls
        self._visibility_timeout_s = visibility_timeout_s
        self._renew_every_s = visibility_timeout_s / RENEWALS if renew_every_s is None else renew_every_s
        self._name = name
        self.about: Mapping[str, str | None] = {}
        """Facts for log lines about it, when it is known what the message is."""
        self._on_lost: Callable[[], None] | None = None
        self._clock = clock
        self._received_at = clock()
        self._in_step_with = self._received_at if in_step_with is None else in_step_with
        self._hidden_until = self._received_at + visibility_timeout_s
        self._stop = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None
        self._failing = False
        self._lost = False
        self._settled = False
        self.deleted = False
        """Whether the message is known to be gone, deleted by us."""

    @property
    def lost(self) -> bool:
        """Whether the message is no longer ours."""
        return self._lost

    @property
    def settled(self) -> bool:
        """Whether settling has begun."""
        return self._settled

    def start(self) -> "Lease":
        """Begin to renew, at receipt and not at the start of work: the timeout also runs while the message waits."""
        self._renewal = asyncio.create_task(self._keep(), name=f"renew lease of {self._name}")
        return self

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the lease is lost; at once when it is lost already."""
        self._on_lost = callback
        if self._lost:
            callback()

    async def settle(self, settlement: Settlement, delay_s: int = 0) -> None:
        """Settle the message; only the first call counts, and none after a loss. Never raises a `QueueError`.

        Continues to its end when the calling task is cancelled meanwhile.
        """
        if self._settled:
            return
        self._settled = True
        await shielded(self._settle(settlement, delay_s), name=f"settle {self._name}")

    async def _settle(self, settlement: Settlement, delay_s: int) -> None:
        await self._stop_renewal()
        if self._lost:
            return
        if settlement is Settlement.DELETE:
            await self._delete()
        elif settlement is Settlement.HAND_BACK:
            try:
                await self._calls.hand_back(delay_s)
            except LeaseLost:
                logger.info("message was gone when it was handed back", extra={"lease": self._name, **self.about})
            except QueueError as error:
                logger.warning("message could not be handed back; it becomes visible later by itself: %s", error)

    async def _stop_renewal(self) -> None:
        self._stop.set()
        if self._renewal is None:
            return
        # Wait for a renewal that was sent: if it arrived after the hand-back, it would hide the message again.
        await asyncio.wait({self._renewal}, timeout=3)
        self._renewal.cancel()
        await asyncio.wait({self._renewal})

    async def _delete(self) -> None:
        pause_s = 0.2
        for tries_left in reversed(range(_DELETE_TRIES)):
            try:
                await self._calls.delete()
            except LeaseLost as error:
                logger.warning("finished message was gone when it was deleted: %s", error)
            except QueueError as error:
                if not tries_left or self._clock() + pause_s >= self._hidden_until:
                    logger.error("finished message could not be deleted; it will be received again: %s", error)  # noqa: TRY400  the text is enough
                    return
                await asyncio.sleep(pause_s)
                pause_s *= 2
                continue
            else:
                self.deleted = True
            return

    async def _keep(self) -> None:
        try:
            wait_s = self._until_next_s()
            while not await self._stopped_within(min(wait_s, self._hidden_until - self._clock())):
                wait_s = self._until_next_s() if await self._renew() else min(self._renew_every_s, _SHORT_S)
                if self._clock() >= self._hidden_until:
                    raise LeaseLost(f"{self._name}: its invisibility ran out")  # noqa: TRY301  one place for a loss
        except LeaseLost as error:
            self._lose(error)
        except Exception as error:  # without renewals others will get the message: the lease is lost
            logger.exception("lease renewal failed", extra={"lease": self._name, **self.about})
            self._lose(error)

    def _until_next_s(self) -> float:
        every_s = self._renew_every_s
        if not every_s:
            return 0.0
        left_s = every_s - (self._clock() - self._in_step_with) % every_s
        return left_s if left_s > every_s * _JUST_NOW else left_s + every_s

    async def _renew(self) -> bool:
        now = self._clock()
        timeout_s = min(self._visibility_timeout_s, self._received_at + MAX_LEASE_S - _MARGIN_S - now)
        if timeout_s < 1 <= self._visibility_timeout_s:
            return True  # at the limit of SQS there is nothing to renew; the rest of the time runs out
        try:
            async with asyncio.timeout(max(0.0, self._hidden_until - now)):
                await self._calls.renew(int(timeout_s))
        except LeaseLost:
            raise
        except (QueueError, TimeoutError) as error:
            if not self._failing:
                logger.warning("lease not renewed, trying again: %s", error, extra={"lease": self._name, **self.about})
            self._failing = True
            return False
        self._failing = False
        self._hidden_until = now + timeout_s
        return True

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    def _lose(self, error: Exception) -> None:
        self._lost = True
        logger.warning("lease lost: %s", error)
        if self._on_lost is not None:
            self._on_lost()
