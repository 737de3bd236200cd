"""Tokens, cleanup handlers and listeners of plain taskiq tasks."""

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import pytest
from taskiq import SimpleRetryMiddleware, SmartRetryMiddleware, TaskiqDepends, TaskiqMiddleware
from tests.contract.test_receiver import bench, error_of
from tests.support import task_handlers
from tests.support.eventually import eventually

from dagster_taskiq import (
    CancelKind,
    CancellationEvent,
    CancellationMiddleware,
    CancellationToken,
    CleanupFailed,
    TaskCancelled,
    TaskCleanupContext,
    cancellation_token,
    on_cancel,
)
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.process import procfs

pytestmark = pytest.mark.anyio


async def test_a_function_has_its_token_as_a_dependency(standard_url: str, endpoint: str) -> None:
    seen: dict[str, Any] = {}
    started = threading.Event()

    def compute(token: Annotated[CancellationToken, TaskiqDepends(cancellation_token)]) -> None:
        token.on_cancelled(lambda: seen.update(called_back=threading.current_thread().name))
        seen["before"] = token.is_cancelled, token.reason, token.remaining()
        started.set()
        assert token.wait(20)
        seen["after"] = token.is_cancelled, token.reason, token.requested_by, token.kind
        with token.shield():
            time.sleep(0.01)
        token.raise_if_cancelled()

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(compute, task_name="compute").kiq()
        await eventually(started.is_set, "it starts")
        await at.broker.cancel_task(task.task_id, reason="enough", requested_by="me")
        error = await error_of(task)
        assert isinstance(error, TaskCancelled)
        assert error.reason == "enough"
        assert seen["before"] == (False, None, None)
        assert seen["after"] == (True, "enough", "me", CancelKind.REQUESTED)
        await eventually(lambda: "called_back" in seen, "it is called back")
        await at.all_quiet()


async def test_a_coroutine_is_interrupted_at_the_end_of_its_shield(standard_url: str, endpoint: str) -> None:
    told: list[str] = []
    started = asyncio.Event()

    async def work() -> None:
        token = cancellation_token()
        try:
            with token.shield():
                started.set()
                while not token.is_cancelled:  # noqa: ASYNC110 - what a task may do
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                told.append("completed")
            told.append("unreachable")
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(work, task_name="work").kiq()
        await started.wait()
        await at.broker.cancel_task(task.task_id, reason="enough")
        assert isinstance(await error_of(task), TaskCancelled)
        assert told == ["completed", "cancelled"]
        await at.all_quiet()


@pytest.mark.parametrize("middleware", [SimpleRetryMiddleware, SmartRetryMiddleware])
async def test_handlers_run_and_the_task_is_not_tried_again(
    standard_url: str, endpoint: str, middleware: type[TaskiqMiddleware]
) -> None:
    called: list[str] = []
    starts = 0

    def undo(context: TaskCleanupContext) -> None:
        called.append(f"undo {context.state['upload']} {context.args} {context.reason} {context.requested_by}")

    async def undo_later(context: TaskCleanupContext) -> None:
        called.append(f"later {context.attempt}")
        if context.attempt == 1:
            raise RuntimeError("not yet")

    @on_cancel(undo)
    @on_cancel(undo_later, retry_policy=dg.RetryPolicy(max_retries=1, delay=0.01))
    async def upload(name: str) -> None:
        nonlocal starts
        cancellation_token().state["upload"] = f"id of {name}"
        starts += 1
        await asyncio.sleep(60)

    async with bench(standard_url, endpoint, middlewares=(middleware(default_retry_label=True),)) as at:  # type: ignore[call-arg]
        task = await at.broker.register_task(upload, task_name="upload").kiq("a file")
        await eventually(lambda: starts == 1, "it starts")
        await at.broker.cancel_task(task.task_id, reason="enough", requested_by="me")
        assert isinstance(await error_of(task), TaskCancelled)
        assert sorted(called) == ["later 1", "later 2", "undo id of a file ['a file'] enough me"]
        await at.all_quiet()
        assert starts == 1


async def test_handlers_that_fail_are_the_result(standard_url: str, endpoint: str) -> None:
    started = asyncio.Event()

    def fails(context: TaskCleanupContext) -> None:
        raise RuntimeError("never")

    async def hangs(context: TaskCleanupContext) -> None:
        await asyncio.sleep(60)

    @on_cancel(fails)
    @on_cancel(hangs, timeout=0.1)
    async def work() -> None:
        started.set()
        await asyncio.sleep(60)

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(work, task_name="work").kiq()
        await started.wait()
        await at.broker.cancel_task(task.task_id)
        error = await error_of(task)
        assert isinstance(error, CleanupFailed)
        assert error.reasons == ("hangs: it took longer than its timeout of 0.1 s", "fails: RuntimeError: never")
        await at.all_quiet()


def lines(path: Path) -> list[list[str]]:
    return [line.split(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []


async def test_a_plain_function_runs_in_a_process_of_its_own(
    standard_url: str, endpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its state, what it changes in it, and its log lines are the worker's; a coroutine function runs in the worker."""
    diary = tmp_path / "diary"
    started = asyncio.Event()

    @on_cancel(task_handlers.undo, retry_policy=dg.RetryPolicy(max_retries=1))
    @on_cancel(task_handlers.undo_in_the_loop)
    async def work(diary: str) -> None:
        cancellation_token().state["upload"] = "an id"
        started.set()
        await asyncio.sleep(60)

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(work, task_name="work").kiq(str(diary))
        await started.wait()
        await at.broker.cancel_task(task.task_id, reason="enough", requested_by="me")
        assert isinstance(await error_of(task), TaskCancelled)
        await at.all_quiet()
    said = sorted(lines(diary))
    assert [line[0] for line in said] == ["loop", "undo", "undo"]
    assert said[0][1] == str(os.getpid())
    assert os.getpid() not in {int(line[1]) for line in said[1:]}
    assert sorted(line[2] for line in said[1:]) == [
        "1 {'upload': 'an id'} enough me",
        "2 {'upload': 'an id', 'tried': 1} enough me",
    ]
    told = [record for record in caplog.records if record.getMessage().startswith("undone by the handler")]
    assert [(record.getMessage(), record.levelname) for record in told] == [
        (f"undone by the handler, attempt {attempt}", "WARNING") for attempt in (1, 2)
    ]
    assert {getattr(record, "task_id", None) for record in told} == {task.task_id}


async def test_a_plain_function_that_outlasts_its_limit_is_stopped(
    standard_url: str, endpoint: str, tmp_path: Path
) -> None:
    """By an exception, or by the end of its process and of all that it has started."""
    diary = tmp_path / "diary"
    started = asyncio.Event()

    @on_cancel(task_handlers.sleeps, timeout=0.3)
    @on_cancel(task_handlers.stuck_in_c, timeout=0.3)
    @on_cancel(task_handlers.exits)
    async def work(diary: str) -> None:
        started.set()
        await asyncio.sleep(60)

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(work, task_name="work").kiq(str(diary))
        await started.wait()
        await at.broker.cancel_task(task.task_id)
        error = (await task.wait_result(check_interval=0.02, timeout=60)).error
        assert isinstance(error, CleanupFailed)
        reasons = sorted(error.reasons)
        assert reasons[0].startswith("exits: its process ")
        assert reasons[0].endswith(" ended with exit code 7")
        assert reasons[1:] == [
            "sleeps: it took longer than its timeout of 0.3 s",
            "stuck_in_c: it did not react to its timeout of 0.3 s, and its process was ended",
        ]
        await at.all_quiet()
    said = sorted(lines(diary))
    assert [line[0] for line in said] == ["finally", "stuck"]
    assert not set(said[1][1:]) & {str(pid) for pid in procfs.processes()}


async def test_a_worker_that_stops_waits_for_the_process_of_a_handler(
    standard_url: str, endpoint: str, tmp_path: Path
) -> None:
    diary = tmp_path / "diary"
    started = asyncio.Event()

    @on_cancel(task_handlers.takes_a_second)
    async def work(diary: str) -> None:
        started.set()
        await asyncio.sleep(60)

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(work, task_name="work").kiq(str(diary))
        await started.wait()
        await at.broker.cancel_task(task.task_id)
        await eventually(lambda: lines(diary) == [["begin"]], "the handler is at work")
    assert lines(diary) == [["begin"], ["end"]]
    assert at.outside.work() == (0, 0)


async def test_of_a_handler_that_nobody_can_find_a_thread_is_left_and_the_worker_says_so(
    standard_url: str, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    started, release = asyncio.Event(), threading.Event()

    @on_cancel(lambda _: release.wait(60), timeout=0.1)
    async def work() -> None:
        started.set()
        await asyncio.sleep(60)

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(work, task_name="work").kiq()
        await started.wait()
        await at.broker.cancel_task(task.task_id)
        error = await error_of(task)
        assert isinstance(error, CleanupFailed)
        assert error.reasons == ("<lambda>: it took longer than its timeout of 0.1 s",)
        await at.all_quiet()
    release.set()
    warnings = [message for message in caplog.messages if "will run in a thread" in message]
    assert warnings == [
        "cleanup <lambda> of task work will run in a thread, which cannot be stopped at its timeout, because it is"
        " defined inside of a function, or is a lambda or a method"
    ]


async def test_of_a_task_in_a_process_pool_the_handlers_run_when_it_has_failed(
    standard_url: str, endpoint: str, tmp_path: Path
) -> None:
    diary, go_on = tmp_path / "diary", tmp_path / "go-on"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        async with bench(standard_url, endpoint, receiver={"executor": pool}) as at:
            failing = at.broker.register_task(task_handlers.fails_in_a_pool, task_name="fails_in_a_pool")
            task = await failing.kiq(str(diary), str(go_on))
            await eventually(diary.exists, "it starts")
            await at.broker.cancel_task(task.task_id, reason="enough")
            await eventually(lambda: at.receiver.tasks.get(task.task_id).signal.is_set, "it is cancelled")  # type: ignore[union-attr]
            go_on.touch()
            error = await error_of(task)
            assert isinstance(error, CleanupFailed)
            assert error.reasons == ("undo: RuntimeError: not yet",)
            await at.all_quiet()


async def test_handlers_do_not_run_for_a_shutdown_nor_for_what_has_finished(standard_url: str, endpoint: str) -> None:
    called: list[str] = []
    started = asyncio.Event()

    def undo(context: TaskCleanupContext) -> None:
        called.append(context.task_name)

    @on_cancel(undo)
    async def finishes() -> str:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "all the same"
        return "too late"

    starts = 0

    @on_cancel(undo)
    async def goes_on_elsewhere() -> None:
        nonlocal starts
        starts += 1
        started.set()
        await asyncio.sleep(60 if starts == 1 else 0)

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(finishes, task_name="finishes").kiq()
        await started.wait()
        await at.broker.cancel_task(task.task_id)
        assert (await task.wait_result(check_interval=0.02, timeout=20)).return_value == "all the same"
        started.clear()
        await at.broker.register_task(goes_on_elsewhere, task_name="elsewhere").kiq()
        await started.wait()
        await at.receiver.stop_running(Cancellation(CancelKind.SHUTDOWN))
        await at.all_quiet()
    assert (called, starts) == ([], 2)


async def test_who_wants_to_hear_of_cancellations_does(standard_url: str, endpoint: str) -> None:
    heard: list[CancellationEvent] = []

    async def hear_later(event: CancellationEvent) -> None:
        heard.append(event)

    def fails(event: CancellationEvent) -> None:
        time.sleep(0.3)  # and yet nobody hears of the end first
        heard.append(event)
        raise RuntimeError("on purpose")

    listening = CancellationMiddleware(on_requested=heard.append, on_delivered=fails, on_finished=hear_later)

    async def is_slow(**_: Any) -> None:  # SQS answers after the worker has been quick
        await eventually(lambda: "delivered" in [event.stage for event in heard], "it is delivered")

    async with bench(standard_url, endpoint, middlewares=(listening,)) as at:
        task = await at.start()
        client: Any = await at.broker._client()
        client.meta.events.register("after-call.sqs.SendMessage", is_slow)  # aiobotocore awaits it
        await at.broker.cancel_task(task.task_id, reason="enough", requested_by="me")
        await eventually(lambda: len(heard) == 3, "all three are heard")
        await at.all_quiet()
    assert [event.stage for event in heard] == ["requested", "delivered", "finished"]
    assert {(event.task_id, event.reason, event.requested_by) for event in heard} == {(task.task_id, "enough", "me")}
    assert [event.task_name for event in heard] == [None, "wait", "wait"]
    assert isinstance(heard[2].error, TaskCancelled)


async def test_who_wants_to_hear_that_a_task_was_cancelled_does(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dagster_taskiq.tasks.middleware.LISTENER_S", 0.3)
    of_one: list[CancellationEvent] = []
    of_all: list[CancellationEvent] = []
    never = threading.Event()
    async with bench(standard_url, endpoint, receiver={"max_async_tasks": 1}) as at:
        at.wait.on_cancelled(of_one.append)

        @at.broker.on_task_cancelled
        async def hear(event: CancellationEvent) -> None:
            of_all.append(event)

        @at.broker.on_task_cancelled
        def fails(event: CancellationEvent) -> None:
            raise RuntimeError("on purpose")

        @at.broker.on_task_cancelled
        async def hangs(event: CancellationEvent) -> None:
            await asyncio.Event().wait()

        @at.broker.on_task_cancelled
        def blocks(event: CancellationEvent) -> None:
            never.wait(20)

        running = await at.start()
        waiting = await at.wait.kiq()
        other = await at.broker.register_task(asyncio.sleep, task_name="other").kiq(60)
        for task in (running, waiting, other):
            await at.broker.cancel_task(task.task_id, reason="enough", requested_by="me")
        for task in (running, waiting, other):
            assert isinstance(await error_of(task), TaskCancelled)
        await at.all_quiet()
        elsewhere = await at.start()
        await at.receiver.stop_running(Cancellation(CancelKind.SHUTDOWN))
        await eventually(lambda: at.diary.started.count(elsewhere.task_id) == 2, "it begins again")
        at.diary.release.set()
        await at.all_quiet()
        never.set()
    names = {running.task_id: "wait", waiting.task_id: "wait", other.task_id: "other"}
    assert {event.task_id: event.task_name for event in of_all} == names
    assert {event.task_id for event in of_one} == {running.task_id, waiting.task_id}
    assert {(event.stage, event.reason, event.requested_by) for event in of_all} == {("finished", "enough", "me")}
    assert caplog.messages.count("a listener for cancellations failed") == 3
    assert caplog.messages.count("a listener for cancellations is not waited for any more") == 6


async def in_a_task_group(part: Callable[[float], Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(part(0.2))  # type: ignore[arg-type]
        await asyncio.sleep(60)


async def side_by_side(part: Callable[[float], Awaitable[None]]) -> None:
    await asyncio.gather(part(0.1), part(0.2))
    await asyncio.sleep(60)


@pytest.mark.parametrize("at_work", [in_a_task_group, side_by_side])
async def test_the_last_shield_interrupts_the_task_whoever_had_it(
    standard_url: str, endpoint: str, at_work: Callable[..., Awaitable[None]]
) -> None:
    told: list[str] = []
    started = asyncio.Event()

    async def part(seconds: float) -> None:
        token = cancellation_token()
        with token.shield():
            started.set()
            while not token.is_cancelled:  # noqa: ASYNC110 - what a task may do
                await asyncio.sleep(0.01)
            await asyncio.sleep(seconds)
            told.append("completed")
        told.append("nothing raised")

    async def work() -> None:
        try:
            await at_work(part)
            told.append("unreachable")
        finally:
            await asyncio.sleep(0.01)
            told.append("finally")

    async with bench(standard_url, endpoint) as at:
        task = await at.broker.register_task(work, task_name="work").kiq()
        await started.wait()
        await at.broker.cancel_task(task.task_id, reason="enough")
        assert isinstance(await error_of(task), TaskCancelled)
        parts = 1 if at_work is in_a_task_group else 2
        assert told == ["completed", "nothing raised"] * parts + ["finally"]
        await at.all_quiet()
