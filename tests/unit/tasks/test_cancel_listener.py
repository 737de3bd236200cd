"""Whose cancel is it, and what becomes of its message: every case, without a queue and without waiting."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import pytest
from tests.support.eventually import eventually

from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.errors import QueueUnreachable
from dagster_taskiq.messages import CancelRequest, StandingCancel
from dagster_taskiq.sqs.lease import Lease
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.tasks.cancel_listener import LONGEST_SIT_OUT_S, SIT_OUT_S, CancelListener
from dagster_taskiq.tasks.cancel_queue import Received, ReceivedCancel, ReceivedStanding
from dagster_taskiq.tasks.held_cancels import HeldCancels
from dagster_taskiq.tasks.predicates import Predicates, TaskView
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.tasks.running_tasks import RunningTasks
from dagster_taskiq.tasks.standing_cancels import EVERY_S, StandingCancels

pytestmark = pytest.mark.anyio

NOW = 1_000_000.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Queue:
    """A cancel queue that gives what it is told to, and keeps a record."""

    def __init__(self) -> None:
        self.deleted: list[str] = []
        self.handed_back: list[str] = []
        self.paused: dict[str, int] = {}
        self.sent: list[str] = []
        self.receives: list[list[Received] | Exception] = []

    async def receive_cancels(self, wait_s: int | None = None) -> list[Received]:
        if not self.receives:
            await asyncio.Event().wait()
        answer = self.receives.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def delete_cancels(self, cancels: Sequence[Received]) -> None:
        self.deleted += [cancel.message_id for cancel in cancels]

    async def hand_back_cancels(self, cancels: Sequence[Received]) -> None:
        self.handed_back += [cancel.message_id for cancel in cancels]

    async def pause_cancels(self, seconds: Mapping[str, int]) -> None:
        self.paused |= seconds

    async def send_cancels(self, cancellations: Mapping[str, Cancellation]) -> None:
        self.sent += cancellations


class Here:
    """The worker: which tasks it runs, and what it was told to cancel."""

    def __init__(self, *running: str) -> None:
        self.running = running
        self.cancelled: dict[str, Cancellation] = {}
        self.finished: TTLCache[bool] = TTLCache()
        self.views: list[TaskView] = []

    def cancel(self, task_id: str, cancellation: Cancellation) -> bool:
        if task_id not in self.running:
            return False
        self.cancelled[task_id] = cancellation
        return True

    def cancel_all(self, cancellation_of: Callable[[TaskView], Cancellation | None]) -> dict[str, Cancellation]:
        meant = {view.task_id: cancellation_of(view) for view in self.views}
        self.cancelled |= (new := {task_id: one for task_id, one in meant.items() if one is not None})
        return new


def cancel_of(
    task_id: str, *, receive_count: int = 1, age_s: float = 0, message_id: str | None = None
) -> ReceivedCancel:
    request = CancelRequest(task_id, "why", "who", NOW - age_s)
    return ReceivedCancel(request, message_id or f"m-{task_id}", "receipt", receive_count, NOW - age_s)


class Over:
    """The injected question, counted."""

    def __init__(self, answer: bool | Exception) -> None:
        self.answer = answer
        self.asked = 0

    async def __call__(self, task_id: str) -> bool:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def listener(queue: Queue, here: Here, is_over: Over | None = None) -> CancelListener:
    return CancelListener(
        queue,
        here,
        cancel_ttl_s=120,
        is_over=is_over,
        now=lambda: NOW,
        uniform=lambda low, high: (low + high) / 2,
    )


async def test_one_that_took_too_long_learns_that() -> None:
    here = Here("t")
    late = ReceivedCancel(CancelRequest("t", "why", timed_out=True), "m", "receipt", 1, NOW)
    await listener(Queue(), here).handle([late])
    assert (here.cancelled["t"].kind, here.cancelled["t"].reason) == (CancelKind.DEADLINE, "why")


async def test_the_owner_cancels_and_deletes() -> None:
    queue, here = Queue(), Here("t")
    assert await listener(queue, here).handle([cancel_of("t", receive_count=3)]) == 0
    assert queue.deleted == ["m-t"]
    heard = here.cancelled["t"]
    assert (heard.kind, heard.reason, heard.requested_by) == (CancelKind.REQUESTED, "why", "who")
    assert (heard.channel, heard.attempt, heard.requested_at) == (CancelChannel.CANCEL_QUEUE, 3, NOW)


async def test_anybody_else_hands_it_on_at_once_and_sits_out_only_when_it_comes_back() -> None:
    queue, here = Queue(), Here()
    listening = listener(queue, here)
    assert await listening.handle([cancel_of("t")]) == 0
    assert await listening.handle([cancel_of("u")]) == 0
    assert await listening.handle([cancel_of("t", receive_count=2)]) == pytest.approx(SIT_OUT_S * 1.1)
    assert await listening.handle([cancel_of("t", receive_count=9_999)]) == LONGEST_SIT_OUT_S
    assert queue.handed_back == ["m-t", "m-u", "m-t", "m-t"]
    assert queue.deleted == []


async def test_it_is_remembered_for_work_that_comes_later() -> None:
    listening = listener(Queue(), Here())
    await listening.handle([cancel_of("t")])
    ahead = listening.cancelled_ahead("t")
    assert ahead is not None
    assert ahead.reason == "why"
    assert listening.cancelled_ahead("u") is None


async def test_what_finished_here_needs_no_cancel() -> None:
    queue, here = Queue(), Here()
    listening = listener(queue, here)
    here.finished.add("t", True)
    assert await listening.handle([cancel_of("t")]) == 0
    assert queue.deleted == ["m-t"]


async def test_what_nobody_claims_is_deleted_in_the_end_and_remembered() -> None:
    queue = Queue()
    listening = listener(queue, Here())
    assert await listening.handle([cancel_of("t", age_s=121)]) == 0
    assert queue.deleted == ["m-t"]
    assert listening.cancelled_ahead("t") is not None


async def test_an_old_cancel_of_running_work_still_counts() -> None:
    here = Here("t")
    await listener(Queue(), here).handle([cancel_of("t", age_s=500)])
    assert "t" in here.cancelled


class Kept:
    """What the lease of a held message does with it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def renew(self, timeout_s: int) -> None:
        self.calls.append("renew")

    async def delete(self) -> None:
        self.calls.append("delete")

    async def hand_back(self, delay_s: int) -> None:
        self.calls.append("hand back")


@pytest.mark.parametrize(("over", "call"), [(True, "delete"), (False, "hand back")])
async def test_the_owner_keeps_the_cancel_until_its_work_is_settled(over: bool, call: str) -> None:
    queue, kept = Queue(), Kept()
    held = HeldCancels(lambda _: Lease(kept, visibility_timeout_s=30, renew_every_s=0.01))
    listening = CancelListener(queue, Here("t"), cancel_ttl_s=120, held=held, now=lambda: NOW)
    await listening.handle([cancel_of("t")])
    await eventually(lambda: "renew" in kept.calls, "it is kept")
    await listening.handle([cancel_of("t")])  # it has come again, so the first receipt is of no use
    assert (queue.deleted, queue.handed_back) == ([], [])
    assert set(kept.calls) == {"renew"}
    await listening.settled("t", over=over)
    assert kept.calls.count(call) == 1
    assert set(kept.calls) == {"renew", call}
    await listening.settled("t", over=over)
    assert kept.calls.count(call) == 1


async def test_of_many_cancels_of_one_task_a_few_are_held() -> None:
    queue, leases = Queue(), list[Lease]()

    def lease_of(_: ReceivedCancel) -> Lease:
        leases.append(Lease(Kept(), visibility_timeout_s=30))
        return leases[-1]

    listening = CancelListener(queue, Here("t"), cancel_ttl_s=120, held=HeldCancels(lease_of), now=lambda: NOW)
    for first in range(0, 100, 10):
        await listening.handle([cancel_of("t", message_id=f"m-{number}") for number in range(first, first + 10)])
    assert (len(leases), len(queue.deleted), queue.handed_back) == (3, 97, [])
    await listening.handle([cancel_of("t", message_id="m-0")])  # a new receipt of one that is held
    assert (len(leases), len(queue.deleted)) == (4, 97)
    await listening.settled("t", over=True)


async def test_an_old_cancel_that_was_held_stays_until_the_work_has_come_again() -> None:
    queue, now = Queue(), NOW
    listening = CancelListener(queue, Here(), cancel_ttl_s=120, comes_back_s=40, now=lambda: now)
    for _ in range(9):
        await listening.handle([cancel_of("t", age_s=500)])
        now += 5
    assert (queue.deleted, len(queue.handed_back)) == (["m-t"], 8)
    assert listening.cancelled_ahead("t") is not None


async def test_a_look_ends_when_it_brings_nothing_new() -> None:
    queue = Queue()
    held = HeldCancels(lambda _: Lease(Kept(), visibility_timeout_s=30))
    listening = CancelListener(queue, Here(), cancel_ttl_s=120, held=held, now=lambda: NOW)
    queue.receives = [[cancel_of("u")], [cancel_of("u"), cancel_of("t")], [cancel_of("t")], [cancel_of("v")]]
    await asyncio.gather(listening.look(), listening.look())
    assert listening.cancelled_ahead("t") is not None
    assert len(queue.receives) == 1
    queue.receives = [QueueUnreachable("down")]
    await listening.look()
    queue.receives = []
    looking = asyncio.create_task(CancelListener(queue, Here(), cancel_ttl_s=120).look())
    await asyncio.wait({looking}, timeout=5)
    assert looking.done()  # without a queue that alone knows of cancellations there is nothing to look for


async def test_whoever_looks_while_others_come_and_go_is_answered() -> None:
    queue = Queue()
    queue.receives = [[]] * 100
    listening = CancelListener(queue, Here(), cancel_ttl_s=120, held=HeldCancels(lambda _: pytest.fail("not ours")))
    looks = []
    for _ in range(50):  # one begins at each turn of the loop, so some of them just after the end of another one
        looks.append(asyncio.create_task(listening.look()))
        await asyncio.sleep(0)
    assert await asyncio.gather(*looks, return_exceptions=True) == [None] * len(looks)


def standing_of(group: str, *, age_s: float, receive_count: int) -> ReceivedStanding:
    request = StandingCancel("group", group, reason="why", requested_by="who")
    return ReceivedStanding(request, f"m-{group}", f"r-{group}", receive_count, NOW - age_s)


async def test_a_standing_cancel_is_handed_on_to_all_and_then_comes_rarely() -> None:
    queue, here, now = Queue(), Here(), NOW
    here.views = [TaskView("t", "n", {"group": "a"}, NOW - 1), TaskView("u", "n", {"group": "b"}, NOW - 1)]
    standing = StandingCancels(Predicates(), now=lambda: now)
    listening = CancelListener(queue, here, cancel_ttl_s=120, standing=standing, now=lambda: now)
    assert await listening.handle([standing_of("a", age_s=0, receive_count=1)]) == 0
    assert [(task_id, cancelled.reason) for task_id, cancelled in here.cancelled.items()] == [("t", "why")]
    assert await listening.handle([standing_of("a", age_s=0, receive_count=2)]) > 0
    assert (queue.handed_back, queue.sent) == (["m-a", "m-a"], ["t"])
    assert await listening.handle([standing_of("a", age_s=6, receive_count=3), cancel_of("v")]) > 0
    now += 6
    assert await listening.handle([standing_of("a", age_s=0, receive_count=4)]) == 0
    assert queue.paused == {"r-a": EVERY_S}
    assert listening.cancelled_ahead("w", TaskView("w", "n", {"group": "a"}, NOW - 9)) is not None
    assert listening.cancelled_ahead("w", TaskView("w", "n", {"group": "a"}, NOW + 9)) is None
    now += 601
    await listening.handle([standing_of("a", age_s=0, receive_count=5)])
    assert queue.deleted == ["m-a"]


async def test_standing_cancels_send_one_cancel_for_each_task_that_they_stop() -> None:
    async def settle(settlement: Settlement, delay_s: int = 0) -> None:
        pass

    queue, here = Queue(), RunningTasks()
    for task_id, cause in (("t", None), ("u", CancelKind.SHUTDOWN), ("v", CancelKind.REQUESTED)):
        view = TaskView(task_id, "n", {"group": "a"}, NOW - 1)
        here.add(task := RunningTask(task_id, settle=settle, view=view))
        if cause is not None:
            task.cancel(Cancellation(cause))
    standing = StandingCancels(Predicates(), now=lambda: NOW)
    listening = CancelListener(queue, here, cancel_ttl_s=120, standing=standing, now=lambda: NOW)
    for group in "abcd":
        await listening.handle([standing_of(group, age_s=0, receive_count=1)])
    assert queue.sent == ["t", "u"]
    assert [task.cancellation and task.cancellation.kind for task in here.values()] == [CancelKind.REQUESTED] * 3


async def test_workers_of_runs_do_not_know_standing_cancels(caplog: pytest.LogCaptureFixture) -> None:
    queue, here = Queue(), Here()
    here.views = [TaskView("t", "n", {"group": "a"})]
    listening = listener(queue, here)
    for count in (1, 2):
        assert await listening.handle([standing_of("a", age_s=0, receive_count=count)]) == 0
    assert (here.cancelled, queue.paused) == ({}, {"r-a": EVERY_S})
    assert len(caplog.messages) == 1


async def test_it_asks_whether_work_is_over_only_when_a_message_comes_back() -> None:
    queue, over = Queue(), Over(True)
    listening = listener(queue, Here(), over)
    asking = asyncio.create_task(listening.ask())
    await listening.handle([cancel_of("t")])
    await asyncio.sleep(0)
    assert over.asked == 0
    await listening.handle([cancel_of("t", receive_count=2)])
    await eventually(lambda: over.asked == 1, "it is asked")
    assert queue.deleted == []
    assert await listening.handle([cancel_of("t", receive_count=3)]) == 0
    assert queue.deleted == ["m-t"]
    asking.cancel()


async def test_who_cannot_answer_is_asked_again_later_and_that_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    queue, over = Queue(), Over(RuntimeError("database is away"))
    listening = listener(queue, Here(), over)
    asking = asyncio.create_task(listening.ask())
    for tries in (0, 1, 2):
        await listening.handle([cancel_of("t")])
        await eventually(lambda tries=tries: over.asked == tries, "it is asked")  # type: ignore[misc]
    assert queue.handed_back == ["m-t", "m-t", "m-t"]
    assert caplog.messages == ["cannot find out whether cancelled tasks are over, trying again: database is away"]
    assert "Traceback" not in caplog.text
    asking.cancel()


async def test_an_answer_that_never_comes_makes_no_worker_deaf() -> None:
    asked: list[str] = []

    async def never(task_id: str) -> bool:
        asked.append(task_id)
        await asyncio.Event().wait()
        return True

    queue, here = Queue(), Here("mine")
    others: list[Received] = [cancel_of(f"other-{number}") for number in range(300)]
    queue.receives = [others, others, others, [cancel_of("mine")]]
    listening = CancelListener(
        queue, here, cancel_ttl_s=120, is_over=never, now=lambda: NOW, uniform=lambda low, high: 0.0
    )
    running = asyncio.create_task(listening.run())
    await eventually(lambda: here.cancelled, "the worker hears its own cancel", within=5)
    assert asked == ["other-0"]
    assert len(listening._asked) <= 101
    running.cancel()
    await asyncio.wait({running}, timeout=5)
    assert running.done()


async def test_a_batch_is_sorted_one_by_one() -> None:
    queue, here = Queue(), Here("mine")
    listening = listener(queue, here)
    await listening.handle([cancel_of("mine"), cancel_of("other"), cancel_of("old", age_s=999)])
    assert sorted(queue.deleted) == ["m-mine", "m-old"]
    assert queue.handed_back == ["m-other"]


async def test_failing_receives_are_logged_once_and_survived(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_taskiq._retry._FIRST_PAUSE_S", 0.0)
    queue, here = Queue(), Here("t")
    queue.receives = [QueueUnreachable("down"), QueueUnreachable("down"), QueueUnreachable("down"), [cancel_of("t")]]
    running = asyncio.create_task(listener(queue, here).run())
    await eventually(lambda: queue.deleted, "the cancel is heard after the outage")
    running.cancel()
    assert [message for message in caplog.messages if "cancel messages" in message] == [
        "cannot receive cancel messages, trying again: down",
        "can receive cancel messages again after 3 tries",
    ]


def test_memory_is_bounded_in_time_and_number() -> None:
    now = 0.0
    memory: TTLCache[int] = TTLCache(at_most=2, ttl_s=10, clock=lambda: now)
    assert memory.add("a", 1)
    assert not memory.add("a", 2)
    assert memory.get("a") == 2
    memory.add("b", 1)
    memory.add("c", 1)
    assert "a" not in memory
    now = 11
    assert "c" not in memory
