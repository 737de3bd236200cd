"""What becomes of a message: what the function returned, the table, or done. Without a queue."""

import asyncio
from dataclasses import dataclass, field

import pytest
from taskiq import TaskiqMessage, TaskiqResult
from taskiq.exceptions import NoResultError

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.errors import TaskCancelled
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.tasks.running_task import RunningTask, cancelled_result

pytestmark = pytest.mark.anyio

SHUTDOWN, DEADLINE, REQUESTED, LEASE_LOST = (Cancellation(kind, kind.name) for kind in CancelKind)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Settlements:
    """Records them."""

    calls: list[tuple[Settlement, int]] = field(default_factory=list)

    async def __call__(self, settlement: Settlement, delay_s: int = 0) -> None:
        self.calls.append((settlement, delay_s))


def work(*, awaits_signal: bool = False, settled: Settlements | None = None) -> RunningTask:
    return RunningTask("t", settle=settled or Settlements(), awaits_signal=awaits_signal)


def message() -> TaskiqMessage:
    return TaskiqMessage(task_id="t", task_name="n", labels={}, args=[], kwargs={})


@pytest.mark.parametrize(
    ("cancellations", "succeeded", "settlement", "finished"),
    [
        ([], True, Settlement.DELETE, True),
        ([], False, Settlement.DELETE, False),
        ([REQUESTED], False, Settlement.DELETE, True),
        ([SHUTDOWN], False, Settlement.HAND_BACK, False),
        ([LEASE_LOST], False, Settlement.LEAVE, False),
        ([DEADLINE], False, Settlement.DELETE, True),
        ([SHUTDOWN, DEADLINE], False, Settlement.DELETE, True),
        ([DEADLINE], True, Settlement.DELETE, True),
        ([SHUTDOWN, REQUESTED], False, Settlement.DELETE, True),
        ([REQUESTED, SHUTDOWN], False, Settlement.DELETE, True),
        ([REQUESTED, LEASE_LOST], False, Settlement.LEAVE, False),
        ([SHUTDOWN], True, Settlement.DELETE, True),
    ],
)
async def test_the_table(
    cancellations: list[Cancellation], succeeded: bool, settlement: Settlement, finished: bool
) -> None:
    running = work()
    for cancellation in cancellations:
        running.cancel(cancellation)
    running.end(succeeded=succeeded)
    assert running.verdict() == (settlement, 0)
    assert running.finished is finished


@pytest.mark.parametrize("outcome", [Settled(Settlement.HAND_BACK, 7), Settled(Settlement.DELETE)])
async def test_what_the_function_returns_wins_over_the_table_and_tells_nothing_of_others(outcome: Settled) -> None:
    async def decides() -> Settled:
        return outcome

    running = work(awaits_signal=True)
    running.cancel(REQUESTED)
    assert await running.observed(decides, None)() is None, "it is nobody's result"
    running.end(succeeded=True)
    assert running.verdict() == outcome
    assert not running.finished


async def test_what_never_ran_is_left() -> None:
    assert work().verdict() == (Settlement.LEAVE, 0)


async def test_a_cancel_after_the_end_changes_nothing_but_forbids_a_retry() -> None:
    running, sent = work(), message()
    running.attach(sent)
    running.end(succeeded=False)
    running.cancel(SHUTDOWN)
    assert running.cancellation is None
    assert running.verdict() == (Settlement.DELETE, 0)
    assert sent.labels["retry_on_error"] is False


async def test_cancelled_before_it_begins_it_is_dropped_unless_it_shall_see_for_itself() -> None:
    running = work()
    running.cancel(REQUESTED)
    assert running.dropped
    running = work(awaits_signal=True)
    running.cancel(REQUESTED)
    assert not running.dropped


async def test_the_function_is_interrupted_once() -> None:
    interrupts = 0
    begun = asyncio.Event()

    async def stubborn() -> None:
        nonlocal interrupts
        begun.set()
        for _ in range(2):
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                interrupts += 1

    running = work()
    inner = asyncio.create_task(running.observed(stubborn, None)())
    running.begin(inner)
    await begun.wait()
    running.cancel(SHUTDOWN)
    await asyncio.sleep(0)
    running.cancel(REQUESTED)
    await inner
    assert interrupts == 1
    assert running.cancellation is REQUESTED


async def test_work_that_awaits_its_signal_is_never_interrupted() -> None:
    begun, seen = asyncio.Event(), list[Cancellation | None]()

    async def look() -> None:
        begun.set()
        await running.signal.wait_async()
        seen.append(running.cancellation)

    for begins_first in (False, True):
        begun.clear()
        running = work(awaits_signal=True)
        inner = asyncio.create_task(running.observed(look, None)())
        running.begin(inner)
        if begins_first:
            await begun.wait()
        running.cancel(REQUESTED)
        await inner
    assert seen == [REQUESTED, REQUESTED]


async def test_an_early_acknowledgement_deletes_and_a_late_one_follows_the_verdict() -> None:
    settled = Settlements()
    running = work(settled=settled)
    await running.acknowledge()
    running.cancel(SHUTDOWN)
    running.end(succeeded=False)
    await running.acknowledge()
    assert settled.calls == [(Settlement.DELETE, 0), (Settlement.HAND_BACK, 0)]


async def test_what_others_are_told() -> None:
    def told(cancellation: Cancellation | None) -> TaskiqResult[object]:
        running = work()
        if cancellation is not None:
            running.cancel(cancellation)
        running.end(succeeded=False)
        return running.visible_result(cancelled_result(message()))

    error = told(REQUESTED).error
    assert isinstance(error, TaskCancelled)
    assert error.reason == "REQUESTED"
    assert isinstance(told(SHUTDOWN).error, NoResultError)
    assert isinstance(told(None).error, asyncio.CancelledError)


def test_a_sync_function_that_was_cancelled_while_it_waited_for_a_thread_does_not_begin() -> None:
    running = asyncio.run(_made())
    running.cancel(REQUESTED)
    with pytest.raises(TaskCancelled, match="REQUESTED"):
        running.observed(lambda: None, None)()


async def _made() -> RunningTask:
    return work()
