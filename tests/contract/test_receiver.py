"""The receiver against an SQS endpoint: whatever happens to a task, its message is settled once, and rightly."""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from taskiq import (
    AsyncTaskiqTask,
    Context,
    SimpleRetryMiddleware,
    SmartRetryMiddleware,
    TaskiqDepends,
    TaskiqMiddleware,
)
from taskiq.brokers.inmemory_broker import InmemoryResultBackend
from tests.support.eventually import eventually
from tests.support.proxy import sqs_proxy
from tests.support.workers import Outside, broker_for, leftovers, working

from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.cancellable_receiver import CancellableReceiver, ReceiverHooks
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.errors import QueueMissing, QueueUnreachable, TaskCancelled
from dagster_taskiq.sqs.lease import Lease
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.tasks.running_task import current_task

pytestmark = pytest.mark.anyio

SHUTDOWN = Cancellation(CancelKind.SHUTDOWN, "the worker stops")
REQUESTED = Cancellation(CancelKind.REQUESTED, "asked")


@pytest.fixture
def polite() -> None:
    """Wait for pending polls at the end, as the product does."""


@pytest.fixture(autouse=True)
def _brisk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a poll swallows after the end of a test concerns nobody, so most tests need not wait for it.
    if "polite" not in request.fixturenames:
        monkeypatch.setattr("dagster_taskiq.sqs.queue._SOON_S", 0.0)
        monkeypatch.setattr("dagster_taskiq.sqs.queue._ON_ITS_WAY_S", 0.0)


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    yield
    assert leftovers() == []


@dataclass
class Diary:
    """What happened in the task functions of one worker."""

    started: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    cleaned_up: list[str] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def register(self, broker: CancellableSQSBroker) -> Any:
        """A task that waits until it is released or cancelled, and then cleans up for a moment."""

        async def wait(cleanup_s: float = 0.0) -> str:
            task_id = current_task().task_id
            self.started.append(task_id)
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.append(task_id)
                raise
            finally:
                await asyncio.sleep(cleanup_s)
                self.cleaned_up.append(task_id)
            return "done"

        return broker.register_task(wait, task_name="wait")


@dataclass
class Bench:
    """One worker with its broker, a task that waits, and a look from outside."""

    broker: CancellableSQSBroker
    receiver: CancellableReceiver
    diary: Diary
    wait: Any
    outside: Outside

    async def start(self, *args: Any, **labels: Any) -> AsyncTaskiqTask[Any]:
        """Send the task that waits, and wait until it has started."""
        task: AsyncTaskiqTask[Any] = await self.wait.kicker().with_labels(**labels).kiq(*args)
        await eventually(lambda: task.task_id in self.diary.started, "the task starts")
        return task

    async def heard_of(self, task_id: str) -> None:
        """The worker knows of a cancel for work that has not come yet."""
        listener = self.receiver._listener
        assert listener is not None
        await eventually(lambda: listener.cancelled_ahead(task_id), "the cancel is heard")

    async def all_quiet(self) -> None:
        """Nothing runs, and no message is left on either queue."""
        await eventually(lambda: not self.receiver.tasks, "nothing runs")
        look = self.outside
        await eventually(lambda: (look.work(), look.cancels()) == ((0, 0), (0, 0)), "no message is left")


@asynccontextmanager
async def bench(
    queue_url: str,
    endpoint: str,
    hooks: ReceiverHooks | None = None,
    *,
    middlewares: tuple[TaskiqMiddleware, ...] = (),
    receiver: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Bench]:
    broker = broker_for(queue_url, endpoint, **options)
    broker.add_middlewares(*middlewares)
    diary = Diary()
    wait = diary.register(broker)
    async with working(broker, hooks, **(receiver or {})) as working_receiver:
        try:
            yield Bench(broker, working_receiver, diary, wait, Outside(queue_url, endpoint))
        finally:
            diary.release.set()


class NeverAnswers(InmemoryResultBackend[Any]):
    async def set_result(self, task_id: str, result: Any) -> None:
        await asyncio.Event().wait()


async def test_a_result_backend_that_never_answers_keeps_no_slot(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dagster_taskiq.tasks.running_task.SAVED_WITHIN_S", 0.5)
    async with bench(standard_url, endpoint, receiver={"max_async_tasks": 1}) as at:
        at.broker.with_result_backend(NeverAnswers())
        first, second = await at.start(), await at.wait.kiq()
        at.diary.release.set()
        await eventually(lambda: second.task_id in at.diary.cleaned_up, "the next one has had the slot")
        await at.all_quiet()
        assert at.diary.started == [first.task_id, second.task_id], "neither begins again"
    said = [record for record in caplog.records if "has not answered for" in record.getMessage()]
    assert [record.task_id for record in said] == [first.task_id, second.task_id]  # type: ignore[attr-defined]


async def error_of(task: AsyncTaskiqTask[Any]) -> BaseException | None:
    return (await task.wait_result(check_interval=0.02, timeout=20)).error


@pytest.mark.parametrize("middleware", [SimpleRetryMiddleware, SmartRetryMiddleware])
async def test_a_cancelled_task_stops_cleans_up_and_is_not_tried_again(
    queue_url: str, endpoint: str, middleware: Callable[..., TaskiqMiddleware], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dagster_taskiq")
    async with bench(queue_url, endpoint, middlewares=(middleware(default_retry_label=True),)) as at:
        task = await at.start()
        await at.broker.cancel_task(task.task_id, reason="not needed", requested_by="me")
        error = await error_of(task)
        assert isinstance(error, TaskCancelled)
        assert error.reason == "not needed"
        assert at.diary.cancelled == at.diary.cleaned_up == [task.task_id]
        await at.all_quiet()
    assert caplog.messages.count(f"Cancelling task {task.task_id}") == 1
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_task_that_fails_is_still_tried_again(queue_url: str, endpoint: str) -> None:
    tries = 0

    async def fail() -> None:
        nonlocal tries
        tries += 1
        raise ValueError("on purpose")

    middleware = SimpleRetryMiddleware(default_retry_count=3)
    async with bench(queue_url, endpoint, middlewares=(middleware,)) as at:
        failing = at.broker.register_task(fail, task_name="fail", retry_on_error=True)
        task = await failing.kiq()
        assert isinstance(await error_of(task), ValueError)
        assert tries == 3
        await at.all_quiet()


async def test_a_second_cancel_does_not_disturb_the_cleanup(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start(0.5)
        await at.broker.cancel_task(task.task_id)
        await eventually(lambda: at.diary.cancelled, "the task is cancelled")
        await at.broker.cancel_task(task.task_id)
        at.receiver.tasks.cancel(task.task_id, REQUESTED)
        assert isinstance(await error_of(task), TaskCancelled)
        assert at.diary.cleaned_up == [task.task_id]
        await eventually(lambda: at.outside.cancels() == (0, 0), "both cancels are gone")
        await at.all_quiet()


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
async def test_with_many_workers_every_cancel_reaches_its_owner(standard_url: str, endpoint: str, workers: int) -> None:
    async with AsyncExitStack() as stack:
        benches = [await stack.enter_async_context(bench(standard_url, endpoint)) for _ in range(workers)]
        tasks = [await benches[0].wait.kiq() for _ in range(workers + 2)]
        everyone = [one.diary for one in benches]
        await eventually(lambda: sum(len(diary.started) for diary in everyone) == len(tasks), "all tasks start")
        began = time.monotonic()
        report = await benches[-1].broker.cancel_tasks([task.task_id for task in tasks])
        assert len(report.sent) == len(tasks)
        await eventually(
            lambda: sum(len(diary.cleaned_up) for diary in everyone) == len(tasks), "all are cancelled", within=40
        )
        print(f"{workers} workers: {len(tasks)} cancels in {time.monotonic() - began:.2f} s")
        assert sorted(task_id for diary in everyone for task_id in diary.cancelled) == sorted(
            task.task_id for task in tasks
        )
        await eventually(lambda: benches[0].outside.cancels() == (0, 0), "no cancel message is left")
        await eventually(lambda: benches[0].outside.work() == (0, 0), "no work message is left")


async def test_a_cancel_is_kept_until_the_work_is_settled(queue_url: str, endpoint: str) -> None:
    async with bench(queue_url, endpoint, visibility_timeout_s=2) as at:
        task = await at.start(3.0)
        await at.broker.cancel_task(task.task_id)
        await eventually(lambda: at.diary.cancelled, "the task is cancelled")
        while not at.diary.cleaned_up:
            assert sum(at.outside.cancels()) == 1
            await asyncio.sleep(0.1)
        assert isinstance(await error_of(task), TaskCancelled)
        await at.all_quiet()


async def test_what_is_never_cancelled_costs_no_request_more(standard_url: str, endpoint: str) -> None:
    with sqs_proxy(endpoint) as proxy:
        async with bench(proxy.through(standard_url), proxy.url) as at:
            before = proxy.seen.copy()
            at.diary.release.set()
            tasks = [await at.wait.kiq() for _ in range(5)]
            assert [await error_of(task) for task in tasks] == [None] * 5
            await eventually(lambda: not at.receiver.tasks, "all are settled")
            spent = Counter({action: count for (action, _), count in (proxy.seen - before).items()})
    del spent["ReceiveMessage"]
    assert spent == {"SendMessage": 5, "DeleteMessage": 5}


async def test_a_cancel_is_needed_while_its_work_may_come_again(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_taskiq.sqs.lease._DELETE_TRIES", 1)

    async def fails(receipt_handle: str) -> None:
        raise QueueUnreachable("down")

    async with bench(standard_url, endpoint, visibility_timeout_s=2) as at:
        delete = at.broker._work.delete
        at.broker._work.delete = fails  # type: ignore[method-assign]
        task = await at.start()
        await at.broker.cancel_task(task.task_id)
        await eventually(lambda: at.diary.cleaned_up and not at.receiver.tasks, "the task is cancelled")
        at.broker._work.delete = delete  # type: ignore[method-assign]
        await at.all_quiet()
        assert at.diary.started == [task.task_id]


async def test_a_cancel_that_comes_after_a_failed_try_is_there_for_the_next(standard_url: str, endpoint: str) -> None:
    tries = 0

    class Late(TaskiqMiddleware):
        async def post_execute(self, message: Any, result: Any) -> None:
            if not isinstance(result.error, TaskCancelled):
                await at.broker.cancel_task(message.task_id)
                held = at.receiver._listener._held  # type: ignore[union-attr]
                await eventually(lambda: held.of(message.task_id), "the cancel is received")

    async def fail() -> None:
        nonlocal tries
        tries += 1
        raise ValueError("on purpose")

    retry = SimpleRetryMiddleware(default_retry_label=True)
    async with bench(standard_url, endpoint, middlewares=(retry, Late()), receiver={"max_async_tasks": 1}) as at:
        task = await at.broker.register_task(fail, task_name="fail").kiq()
        assert isinstance(await error_of(task), TaskCancelled)
        assert tries == 1
        await at.all_quiet()


async def test_two_workers_on_fifo_queues(endpoint: str, queue_url: str) -> None:
    async with bench(queue_url, endpoint) as one, bench(queue_url, endpoint) as other:
        tasks = [await one.wait.kiq() for _ in range(3)]
        await eventually(lambda: len(one.diary.started + other.diary.started) == 3, "all tasks start")
        for task in tasks:
            await other.broker.cancel_task(task.task_id)
        await eventually(
            lambda: len(one.diary.cleaned_up + other.diary.cleaned_up) == 3, "all are cancelled", within=40
        )
        await eventually(lambda: one.outside.cancels() == (0, 0), "no cancel message is left")
        await one.all_quiet()


async def test_a_cancel_for_nobody_is_deleted_in_the_end(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint, ReceiverHooks(cancel_ttl_s=2), visibility_timeout_s=2) as at:
        await at.broker.cancel_task("nobody")
        await asyncio.sleep(1)
        assert sum(at.outside.cancels()) == 1
        await eventually(lambda: at.outside.cancels() == (0, 0), "the cancel is deleted")


async def test_a_cancel_of_what_is_known_to_be_over_is_deleted(standard_url: str, endpoint: str) -> None:
    asked: list[str] = []

    async def is_over(task_id: str) -> bool:
        asked.append(task_id)
        return True

    async with bench(standard_url, endpoint, ReceiverHooks(is_over=is_over)) as at:
        await at.broker.cancel_task("long-gone")
        await eventually(lambda: asked and at.outside.cancels() == (0, 0), "the cancel is deleted")
        assert asked == ["long-gone"]


async def test_a_cancel_of_what_finished_here_is_deleted(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start()
        at.diary.release.set()
        assert await error_of(task) is None
        await at.all_quiet()
        await at.broker.cancel_task(task.task_id)
        await eventually(lambda: at.outside.cancels() == (0, 0), "the cancel is deleted")


async def test_garbage_is_logged_once_and_left_and_work_goes_on(
    queue_url: str, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    outside = Outside(queue_url, endpoint)
    unknown = '{"message": "eyJ0YXNrX2lkIjogInQiLCAidGFza19uYW1lIjogIm5vIiwgImxhYmVscyI6IHt9LCAiYXJncyI6IFtdLCAia3dhcmdzIjoge319"}'  # noqa: E501  a task named "no"
    outside.send(queue_url, "junk", "1")
    outside.send(queue_url, '{"message": "eyJhIjogMX0="}', "2")
    outside.send(queue_url, unknown, "3")
    outside.send(outside.cancel_url, "junk")

    def left() -> list[str]:
        return [text for text in caplog.messages if "left to expire" in text]

    async with bench(queue_url, endpoint, visibility_timeout_s=1, cancel_visibility_timeout_s=1) as at:
        await eventually(lambda: len(left()) == 4, "each is logged")
        await asyncio.sleep(1.5)  # long enough for all to be received again
        task = await at.start()
        await at.broker.cancel_task(task.task_id)
        assert isinstance(await error_of(task), TaskCancelled)
        await eventually(lambda: sum(at.outside.work()) == 3, "only the garbage is left")
        await eventually(lambda: sum(at.outside.cancels()) == 1, "here as well")
    assert len(left()) == 4
    assert sum("'no'" in text for text in left()) == 1


async def test_a_task_cancelled_before_it_comes_is_not_started(queue_url: str, endpoint: str) -> None:
    async with bench(queue_url, endpoint) as at:
        await at.broker.cancel_task("early", reason="too late")
        await eventually(
            lambda: at.receiver._listener and at.receiver._listener.cancelled_ahead("early"), "it is heard"
        )
        task = await at.wait.kicker().with_task_id("early").kiq()
        error = await error_of(task)
        assert isinstance(error, TaskCancelled)
        assert error.reason == "too late"
        assert at.diary.started == []
        await eventually(lambda: at.outside.cancels() == (0, 0), "the cancel is deleted")
        await at.all_quiet()


async def test_or_it_is_started_to_see_for_itself(standard_url: str, endpoint: str) -> None:
    seen: list[Cancellation | None] = []

    async def look() -> Settled:
        await asyncio.sleep(0)
        seen.append(current_task().cancellation)
        return Settled(Settlement.DELETE)

    async def over(task_id: str) -> bool:
        return bool(seen)

    async with bench(standard_url, endpoint, ReceiverHooks(tasks_await_signal=True, is_over=over)) as at:
        looking = at.broker.register_task(look, task_name="look")
        await at.broker.cancel_task("early", reason="too late")
        await eventually(
            lambda: at.receiver._listener and at.receiver._listener.cancelled_ahead("early"), "it is heard"
        )
        task = await looking.kicker().with_task_id("early").kiq()
        assert await error_of(task) is None
        assert seen[0] is not None
        assert seen[0].reason == "too late"
        await eventually(lambda: at.outside.cancels() == (0, 0), "the cancel is deleted")
        await at.all_quiet()


async def test_a_second_message_of_running_work_is_handed_back(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint, visibility_timeout_s=2) as at:
        task = await at.start()
        await at.wait.kicker().with_task_id(task.task_id).kiq()
        await eventually(lambda: at.outside.work() == (0, 2), "it is received, and hidden for a while")
        await asyncio.sleep(0.5)
        assert at.diary.started == [task.task_id]
        at.diary.release.set()
        await eventually(lambda: at.diary.started == [task.task_id] * 2, "it is started once the first has ended")
        await at.all_quiet()


async def test_a_long_task_keeps_its_message(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint, visibility_timeout_s=1) as at:
        task = await at.start()
        await asyncio.sleep(2.5)
        assert at.outside.work() == (0, 1)
        at.diary.release.set()
        assert await error_of(task) is None
        assert at.diary.started == [task.task_id]
        await at.all_quiet()


async def _steal(at: Bench) -> None:
    """Delete the message behind the worker's back."""
    (lease,) = at.broker._leases
    await at.broker._work.delete(lease._calls._handle)  # type: ignore[attr-defined]


async def test_a_lost_lease_cancels_and_has_no_result(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint, visibility_timeout_s=1) as at:
        task = await at.start()
        running = at.receiver.tasks[task.task_id]
        await _steal(at)
        await eventually(lambda: at.diary.cleaned_up, "the task is cancelled")
        assert running.cancellation is not None
        assert running.cancellation.kind is CancelKind.LEASE_LOST
        await at.all_quiet()
        assert not await task.is_ready()


async def test_unless_the_work_is_known_to_be_still_ours(standard_url: str, endpoint: str) -> None:
    asked = asyncio.Event()

    async def still_ours(task_id: str) -> bool:
        asked.set()
        return True

    async with bench(standard_url, endpoint, ReceiverHooks(still_ours=still_ours), visibility_timeout_s=1) as at:
        task = await at.start()
        await _steal(at)
        async with asyncio.timeout(20):
            await asked.wait()
        await asyncio.sleep(0.1)
        at.diary.release.set()
        assert await error_of(task) is None
        assert at.diary.cancelled == []


@pytest.mark.usefixtures("polite")
async def test_a_shutdown_hands_the_message_back(queue_url: str, endpoint: str) -> None:
    async with bench(queue_url, endpoint, receiver={"wait_tasks_timeout": 0.1}) as at:
        task = await at.start()
    assert at.diary.started == [task.task_id]
    async with bench(queue_url, endpoint, receiver={"wait_tasks_timeout": 0.1}) as at:
        task = await at.start()
        at.diary.release = asyncio.Event()  # so that leaving does not end it
    assert at.diary.cancelled == [task.task_id]
    assert at.outside.work() == (1, 0)


@pytest.mark.usefixtures("polite")
async def test_stop_running_returns_when_all_is_settled(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        tasks = [await at.start(0.2), await at.start(0.4)]
        at.receiver._finish.set()  # type: ignore[union-attr]
        await at.receiver.stop_running(SHUTDOWN)
        assert dict(at.receiver.tasks) == {}
        assert sorted(at.diary.cleaned_up) == sorted(task.task_id for task in tasks)
        assert at.outside.work() == (2, 0)


async def test_a_shutdown_does_not_revive_what_was_cancelled(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start(0.5)
        at.receiver.tasks.cancel(task.task_id, SHUTDOWN)
        at.receiver.tasks.cancel(task.task_id, REQUESTED)
        at.receiver.tasks.cancel(task.task_id, SHUTDOWN)
        assert isinstance(await error_of(task), TaskCancelled)
        await at.all_quiet()
        assert at.receiver.tasks.cancel(task.task_id, REQUESTED) is False


@pytest.mark.usefixtures("polite")
async def test_cancels_are_heard_while_the_worker_drains(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start()
        at.receiver._finish.set()  # type: ignore[union-attr]
        await asyncio.sleep(0.1)
        await at.broker.cancel_task(task.task_id)
        assert isinstance(await error_of(task), TaskCancelled)
        await at.all_quiet()


@pytest.mark.usefixtures("polite")
async def test_what_waits_for_a_slot_is_handed_back_at_the_finish(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint, receiver={"max_async_tasks": 1, "max_prefetch": 3}) as at:
        await at.start()
        waiting = [await at.wait.kiq() for _ in range(2)]
        await eventually(lambda: at.outside.work() == (0, 3), "all are received")
        at.receiver._finish.set()  # type: ignore[union-attr]
        # The runner already holds one of them, for the slot to come; it is handed back when it has the slot.
        await eventually(lambda: at.outside.work() == (1, 2), "the queued one is handed back")
        at.diary.release.set()
        await eventually(lambda: at.outside.work() == (2, 0), "the other one as well")
        assert not {task.task_id for task in waiting} & set(at.diary.started)


@pytest.mark.usefixtures("polite")
async def test_what_has_no_slot_is_left_to_other_workers(queue_url: str, endpoint: str) -> None:
    async with bench(queue_url, endpoint, receiver={"max_async_tasks": 1}, max_messages=10) as busy:
        await busy.start()
        waiting = [await busy.wait.kiq() for _ in range(3)]
        async with bench(queue_url, endpoint, receiver={"max_async_tasks": 2}, max_messages=10) as idle:
            await eventually(lambda: len(idle.diary.started) == 2, "two of them are started elsewhere", within=10)
            assert busy.outside.work() == (1, 3)
            assert len(busy.diary.started) == 1
        assert {task.task_id for task in waiting} > set(idle.diary.started)


async def test_what_a_task_returns_decides_about_its_message(standard_url: str, endpoint: str) -> None:
    async def not_now() -> Settled:
        return Settled(Settlement.HAND_BACK, 60)

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(not_now, task_name="not_now").kiq()
        await eventually(lambda: at.outside.work() == (0, 1) and not at.receiver.tasks, "it is hidden for a minute")
        assert not await task.is_ready()


async def test_a_sync_task_looks_at_its_cancellation(standard_url: str, endpoint: str) -> None:
    started, noticed = threading.Event(), threading.Event()

    def compute() -> str:
        work = current_task()
        started.set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if work.cancellation is not None:
                noticed.set()
                raise TaskCancelled(work.cancellation.reason)
            time.sleep(0.01)
        return "never told"

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(compute, task_name="compute").kiq()
        await eventually(started.is_set, "it starts")
        await at.broker.cancel_task(task.task_id, reason="enough")
        error = await error_of(task)
        assert isinstance(error, TaskCancelled)
        assert error.reason == "enough"
        assert noticed.is_set()
        await at.all_quiet()


async def test_a_task_that_finishes_although_cancelled_is_finished(standard_url: str, endpoint: str) -> None:
    begun = asyncio.Event()

    async def stubborn() -> str:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "done all the same"
        return "too long"

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(stubborn, task_name="stubborn").kiq()
        await begun.wait()
        at.receiver.tasks.cancel(task.task_id, SHUTDOWN)
        result = await task.wait_result(check_interval=0.02, timeout=20)
        assert result.return_value == "done all the same"
        await at.all_quiet()


@pytest.mark.parametrize(
    ("ack_type", "while_running", "afterwards"),
    [("when_received", (0, 0), (0, 0)), ("when_executed", (0, 1), (0, 0)), ("manual", (0, 1), (0, 1))],
)
async def test_acknowledge_types_are_honoured(
    standard_url: str, endpoint: str, ack_type: str, while_running: tuple[int, int], afterwards: tuple[int, int]
) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start(ack_type=ack_type)
        assert at.outside.work() == while_running
        at.diary.release.set()
        assert await error_of(task) is None
        await eventually(lambda: not at.receiver.tasks, "it is settled")
        assert at.outside.work() == afterwards


async def test_a_task_may_acknowledge_by_itself(standard_url: str, endpoint: str) -> None:
    acknowledged, go_on = asyncio.Event(), asyncio.Event()

    async def careful(context: Context = TaskiqDepends()) -> None:  # noqa: B008  taskiq's way
        await context.ack()
        acknowledged.set()
        await go_on.wait()

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(careful, task_name="careful").kicker().with_labels(ack_type="manual").kiq()
        async with asyncio.timeout(20):
            await acknowledged.wait()
        assert at.outside.work() == (0, 0)
        go_on.set()
        assert await error_of(task) is None


async def test_a_middleware_that_fails_leaves_the_message_to_be_delivered_again(
    standard_url: str, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(TaskiqMiddleware):
        tries = 0

        def post_execute(self, message: Any, result: Any) -> None:
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError("broken")

    async with bench(standard_url, endpoint, middlewares=(Broken(),), visibility_timeout_s=1) as at:
        at.diary.release.set()
        task = await at.wait.kiq()
        assert await error_of(task) is None
        assert at.diary.started == [task.task_id] * 2
        await at.all_quiet()
    assert "task could not be carried through" in caplog.messages


@pytest.mark.usefixtures("polite")
async def test_a_listener_that_breaks_stops_the_worker_after_its_work(standard_url: str, endpoint: str) -> None:
    broker = broker_for(standard_url, endpoint)
    diary = Diary()
    wait = diary.register(broker)
    receiver = CancellableReceiver(broker, max_async_tasks=4)
    listening = asyncio.create_task(receiver.listen(asyncio.Event()))
    await receiver.listening.wait()
    task = await wait.kiq()
    await eventually(lambda: diary.started, "the task starts")

    async def broken(**options: Any) -> Any:
        raise ZeroDivisionError

    broker._cancels.receive = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(20):
            await listening
    assert diary.cleaned_up == [task.task_id]
    assert Outside(standard_url, endpoint).work() == (1, 0)
    await broker.shutdown()


class Unforeseen:
    """A lease's calls, that fail as nobody has expected."""

    async def renew(self, timeout_s: int) -> None:
        raise ZeroDivisionError

    async def delete(self) -> None:
        raise ZeroDivisionError

    async def hand_back(self, delay_s: int) -> None:
        raise ZeroDivisionError


async def test_an_error_that_nobody_expects_is_logged_and_hangs_no_worker(
    standard_url: str, endpoint: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = broker_for(standard_url, endpoint)
    monkeypatch.setattr(broker, "lease_of_cancel", lambda _: Lease(Unforeseen(), visibility_timeout_s=30))
    diary = Diary()
    wait = diary.register(broker)
    async with working(broker) as receiver:
        task = await wait.kiq(0.5)
        await eventually(lambda: diary.started, "the task starts")
        await broker.cancel_task(task.task_id)
        await eventually(lambda: diary.cancelled, "the task is cancelled")
        async with asyncio.timeout(20):
            await receiver.stop_running(SHUTDOWN)
    assert diary.cleaned_up == [task.task_id]
    assert "a message could not be seen through" in caplog.messages


@pytest.mark.usefixtures("polite")
async def test_nothing_is_left_behind_when_listening_is_cancelled(queue_url: str, endpoint: str) -> None:
    broker = broker_for(queue_url, endpoint)
    diary = Diary()
    wait = diary.register(broker)
    receiver = CancellableReceiver(broker, max_async_tasks=4)
    listening = asyncio.create_task(receiver.listen(asyncio.Event()))
    await receiver.listening.wait()
    task = await wait.kiq(0.2)
    await eventually(lambda: diary.started, "the task starts")
    listening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listening
    assert diary.cleaned_up == [task.task_id]
    assert dict(receiver.tasks) == {}
    assert Outside(queue_url, endpoint).work() == (1, 0)
    await broker.shutdown()


@pytest.mark.usefixtures("polite")
async def test_a_callback_that_is_cancelled_ends_its_work_first(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start(0.2)
        (callback,) = at.receiver._callbacks
        at.receiver._finish.set()  # type: ignore[union-attr]
        callback.cancel()
        await asyncio.wait({callback}, timeout=20)
        assert callback.cancelled()
        assert at.diary.cleaned_up == [task.task_id]
        # A poll that is under way may receive it once more, and hands it back, too.
        await eventually(lambda: at.outside.work() == (1, 0), "the message is handed back", within=40)


async def test_without_cancellation_work_is_done_all_the_same(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint, enable_cancellation=False) as at:
        task = await at.start()
        assert at.receiver.tasks.cancel(task.task_id, REQUESTED)
        assert isinstance(await error_of(task), TaskCancelled)
        await at.all_quiet()


async def test_a_worker_without_queues_says_so_and_stops(standard_url: str, endpoint: str) -> None:
    broker = broker_for(f"{standard_url}-not", endpoint)
    with pytest.raises(QueueMissing, match="no such queue"):
        await CancellableReceiver(broker, max_async_tasks=4).listen(asyncio.Event())
    await broker.shutdown()


async def test_outside_of_a_task_there_is_no_current_task() -> None:
    with pytest.raises(LookupError):
        current_task()
