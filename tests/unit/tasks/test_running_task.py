"""What becomes of a message: the work's wish, the table, or done. Without a queue."""

import asyncio
from dataclasses import dataclass, field

import pytest
from taskiq import TaskiqMessage, TaskiqResult
from taskiq.exceptions import NoResultError

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.errors import TaskCancelled
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.tasks.running_task import RunningTask, cancelled_result

pytestmark = pytest.mark.anyio

SHUTDOWN, REQUESTED, LEASE_LOST = (Cancellation(kind, kind.name) for kind in CancelKind)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Settled:
    """Notes settlements."""

    calls: list[tuple[Settlement, int]] = field(default_factory=list)

    async def __call__(self, settlement: Settlement, delay_s: int = 0) -> None:
        self.calls.append((settlement, delay_s))


def work(*, start_cancelled: bool = False, settled: Settled | None = None) -> RunningTask:
    return RunningTask("t", receive_count=1, settle=settled or Settled(), start_cancelled=start_cancelled)


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


async def test_a_wish_wins_over_the_table_and_says_nothing_of_others() -> None:
    running = work()
    running.cancel(REQUESTED)
    running.settle_as(Settlement.HAND_BACK, 7)
    running.end(succeeded=False)
    assert running.verdict() == (Settlement.HAND_BACK, 7)
    running.settle_as(Settlement.DELETE)
    assert running.verdict() == (Settlement.DELETE, 0)
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
    running = work(start_cancelled=True)
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


async def test_work_that_shall_see_for_itself_is_not_interrupted_before_it_begins() -> None:
    seen: list[bool] = []

    async def look() -> None:
        seen.append(running.cancellation is not None)

    running = work(start_cancelled=True)
    inner = asyncio.create_task(running.observed(look, None)())
    running.begin(inner)
    running.cancel(REQUESTED)
    await inner
    assert seen == [True]


async def test_an_early_acknowledgement_deletes_and_a_late_one_follows_the_verdict() -> None:
    settled = Settled()
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
        return running.told(cancelled_result(message()))

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
