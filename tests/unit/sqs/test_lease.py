"""A lease keeps its message until it is settled once, and never touches it after a loss."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from tests.support.eventually import eventually

from dagster_taskiq.errors import LeaseLost, QueueUnreachable
from dagster_taskiq.sqs.lease import Lease
from dagster_taskiq.sqs.settlement import Settlement

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Message:
    """A message that keeps a record, and answers as told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.called = asyncio.Condition()
        self.renewing: Callable[[], Awaitable[None]] | None = None
        self.failures: list[Exception] = []

    async def _note(self, call: str) -> None:
        async with self.called:
            self.calls.append(call)
            self.called.notify_all()

    async def renew(self, timeout_s: int) -> None:
        await self._note(f"renew {timeout_s}")
        if self.renewing is not None:
            await self.renewing()

    async def delete(self) -> None:
        await self._note("delete")
        if self.failures:
            raise self.failures.pop(0)

    async def hand_back(self, delay_s: int) -> None:
        await self._note(f"hand back {delay_s}")
        if self.failures:
            raise self.failures.pop(0)

    async def until(self, count: int, prefix: str = "renew") -> None:
        async with asyncio.timeout(10), self.called:
            await self.called.wait_for(lambda: sum(call.startswith(prefix) for call in self.calls) >= count)


def lease_of(message: Message, visibility_timeout_s: float = 30, renew_every_s: float = 0.01) -> Lease:
    return Lease(message, visibility_timeout_s=visibility_timeout_s, renew_every_s=renew_every_s)


def settlements(message: Message) -> list[str]:
    return [call for call in message.calls if not call.startswith("renew")]


async def test_it_renews_from_receipt_until_it_is_settled() -> None:
    message = Message()
    lease = lease_of(message).start()
    await message.until(3)
    await lease.settle(Settlement.DELETE)
    renewals = message.calls.count("renew 30")
    await asyncio.sleep(0.05)
    assert message.calls.count("renew 30") == renewals
    assert message.calls[-1] == "delete"


@pytest.mark.parametrize(
    ("settlement", "calls"),
    [(Settlement.DELETE, ["delete"]), (Settlement.HAND_BACK, ["hand back 7"]), (Settlement.LEAVE, [])],
)
async def test_only_the_first_settlement_counts(settlement: Settlement, calls: list[str]) -> None:
    message = Message()
    lease = lease_of(message).start()
    await lease.settle(settlement, 7)
    await lease.settle(Settlement.DELETE)
    await lease.settle(Settlement.HAND_BACK)
    assert settlements(message) == calls


async def test_a_lost_lease_says_so_once_and_never_touches_the_message_again() -> None:
    message = Message()
    lost: list[str] = []

    async def gone() -> None:
        raise LeaseLost("gone")

    message.renewing = gone
    lease = lease_of(message).start()
    await message.until(1)
    lease.when_lost(lambda: lost.append("lost"))
    await eventually(lambda: lost, "the loss is told")
    await lease.settle(Settlement.HAND_BACK)
    await lease.settle(Settlement.DELETE)
    assert message.calls == ["renew 30"]
    assert lost == ["lost"]
    assert lease.lost


async def test_who_asks_late_still_learns_of_the_loss() -> None:
    message = Message()

    async def gone() -> None:
        raise LeaseLost("gone")

    message.renewing = gone
    lease = lease_of(message).start()
    await eventually(lambda: lease.lost, "the lease is lost")
    lost: list[str] = []
    lease.when_lost(lambda: lost.append("lost"))
    assert lost == ["lost"]


async def test_a_passing_failure_does_not_lose_the_lease() -> None:
    message = Message()
    failures = 3

    async def sometimes() -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise QueueUnreachable("try again")

    message.renewing = sometimes
    lease = lease_of(message).start()
    await message.until(5)
    assert not lease.lost
    await lease.settle(Settlement.DELETE)
    assert settlements(message) == ["delete"]


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_lasting_failure_loses_it_when_the_visibility_has_run_out(hangs: bool) -> None:
    message = Message()
    lost = asyncio.Event()

    async def never() -> None:
        if hangs:
            await asyncio.Event().wait()
        raise QueueUnreachable("down")

    message.renewing = never
    lease = lease_of(message, visibility_timeout_s=0.2)
    lease.when_lost(lost.set)
    began = asyncio.get_running_loop().time()
    lease.start()
    async with asyncio.timeout(10):
        await lost.wait()
    assert asyncio.get_running_loop().time() - began >= 0.19
    await lease.settle(Settlement.DELETE)
    assert settlements(message) == []


async def test_a_renewal_that_breaks_is_a_loss(caplog: pytest.LogCaptureFixture) -> None:
    message = Message()
    lost = asyncio.Event()

    async def broken() -> None:
        raise ZeroDivisionError

    message.renewing = broken
    lease = lease_of(message)
    lease.when_lost(lost.set)
    lease.start()
    async with asyncio.timeout(10):
        await lost.wait()
    assert "lease renewal failed" in caplog.messages


async def test_after_twelve_hours_nothing_is_renewed_any_more() -> None:
    message = Message()
    now = 0.0
    lost = asyncio.Event()

    async def later() -> None:
        nonlocal now
        now += 20

    message.renewing = later
    lease = Lease(message, visibility_timeout_s=30, renew_every_s=0, clock=lambda: now)
    lease.when_lost(lost.set)
    now = 43_170.0 - 20
    lease._hidden_until = now + 30
    lease.start()
    await message.until(2)
    now = 43_200.0
    async with asyncio.timeout(10):
        await lost.wait()
    assert message.calls == ["renew 30", "renew 25"]
    await lease.settle(Settlement.LEAVE)


async def test_a_hand_back_waits_for_the_renewal_under_way() -> None:
    message = Message()
    renewing, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        renewing.set()
        await go_on.wait()
        message.calls.append("renewed")

    message.renewing = slow
    lease = lease_of(message).start()
    await renewing.wait()
    settling = asyncio.create_task(lease.settle(Settlement.HAND_BACK))
    await asyncio.sleep(0.01)
    go_on.set()
    await settling
    assert message.calls == ["renew 30", "renewed", "hand back 0"]


@pytest.mark.parametrize("failure", [LeaseLost("gone"), QueueUnreachable("down")])
async def test_a_hand_back_that_fails_raises_nothing(failure: Exception) -> None:
    message = Message()
    message.failures = [failure]
    await lease_of(message).start().settle(Settlement.HAND_BACK)
    assert settlements(message) == ["hand back 0"]


async def test_a_delete_is_tried_again() -> None:
    message = Message()
    message.failures = [QueueUnreachable("down")]
    await lease_of(message).start().settle(Settlement.DELETE)
    assert settlements(message) == ["delete", "delete"]


async def test_a_delete_that_never_works_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    message = Message()
    message.failures = [QueueUnreachable("down")] * 9
    await lease_of(message, visibility_timeout_s=0.5, renew_every_s=5).start().settle(Settlement.DELETE)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_settling_goes_on_when_the_caller_is_cancelled() -> None:
    message = Message()
    message.failures = [QueueUnreachable("down")]
    lease = lease_of(message).start()
    settling = asyncio.create_task(lease.settle(Settlement.DELETE))
    await message.until(1, "delete")
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert settlements(message) == ["delete", "delete"]
