"""Cleanup handlers that run in the worker itself: each has its bound, whatever it does at its timeout."""

import asyncio
import logging
import threading
import time
from pathlib import Path

import pytest

from dagster_taskiq.cancellation.handlers import Handler
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.tasks import cleanup, handler_process
from dagster_taskiq.tasks.cleanup import TaskCleanupContext, clean_up_task
from dagster_taskiq.tasks.handler_process import why_not_alone

pytestmark = pytest.mark.anyio


def describe(attempt: int) -> TaskCleanupContext:
    return TaskCleanupContext("id", "task", [], {}, {}, State(), None, None, attempt, logging.getLogger(__name__))


def handler(call: object, timeout_s: float = 0.1) -> Handler:
    return Handler(call, "undo", None, timeout_s)  # type: ignore[arg-type]


async def test_a_coroutine_that_ignores_its_timeout_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "HARD_TIMEOUT_S", 0.1)
    release, left = asyncio.Event(), asyncio.Event()

    async def undo(context: TaskCleanupContext) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        left.set()

    async with asyncio.timeout(30):
        assert await clean_up_task([handler(undo)], describe) == ("undo: it took longer than its timeout of 0.1 s",)
        release.set()
        await left.wait()


async def leaves(context: TaskCleanupContext) -> None:
    raise SystemExit(context.attempt)


async def is_cancelled(context: TaskCleanupContext) -> None:
    raise asyncio.CancelledError


async def has_its_own_timeout(context: TaskCleanupContext) -> None:
    raise TimeoutError("the bucket does not answer")


async def test_whatever_a_handler_raises_it_is_a_failed_attempt_and_no_more() -> None:
    def leaves_too(context: TaskCleanupContext) -> None:
        raise SystemExit(2)

    def times_out(context: TaskCleanupContext) -> None:
        raise TimeoutError("nor does the queue")

    calls = (leaves, is_cancelled, has_its_own_timeout, leaves_too, times_out)
    assert await clean_up_task([handler(call, 20) for call in calls], describe) == (
        "undo: SystemExit: 1",
        "undo: CancelledError: ",
        "undo: TimeoutError: the bucket does not answer",
        "undo: SystemExit: 2",
        "undo: TimeoutError: nor does the queue",
    )


async def test_arguments_that_cannot_be_pickled_are_given_to_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    seen = await clean_up_task([handler(notes_its_thread, 20)], lambda _: describe_with(threading.Lock()))
    assert seen == ("undo: RuntimeError: on purpose, in a thread",)
    assert any("the arguments of task id cannot be given to another process" in line for line in caplog.messages)


def notes_its_thread(context: TaskCleanupContext) -> None:
    where = "the main thread" if threading.current_thread() is threading.main_thread() else "a thread"
    raise RuntimeError(f"on purpose, in {where}")


def describe_with(argument: object) -> TaskCleanupContext:
    return TaskCleanupContext("id", "task", [argument], {}, {}, State(), None, None, 1, logging.getLogger(__name__))


class Confused:
    max_retries = 1

    def calculate_delay(self, attempt: int) -> float:
        raise ZeroDivisionError(attempt)


async def test_a_retry_policy_that_raises_is_no_end_of_the_retries(caplog: pytest.LogCaptureFixture) -> None:
    undo = Handler(leaves, "undo", Confused(), 20)
    assert await clean_up_task([undo], describe) == ("undo: SystemExit: 2",)
    assert "the retry policy of cleanup undo does not tell how long to wait" in caplog.messages


def notes_begin_and_end(context: TaskCleanupContext) -> None:
    (path,) = context.args
    for what in ("begin", "end"):
        with Path(path).open("a") as notes:
            notes.write(f"{what}\n")
        time.sleep(0.2)  # so that another one, if there were one, would write in between


async def test_processes_of_handlers_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(handler_process, "AT_ONCE", 1)
    path = tmp_path / "notes"
    context = TaskCleanupContext("id", "task", [str(path)], {}, {}, State(), None, None, 1, logging.getLogger(__name__))
    assert await clean_up_task([handler(notes_begin_and_end, 60) for _ in range(3)], lambda _: context) == ()
    assert path.read_text().split() == ["begin", "end"] * 3


def test_which_handlers_another_process_can_find() -> None:
    assert why_not_alone(notes_its_thread) is None
    for call in (lambda _: None, handler(None).identity.join, State().update):
        assert why_not_alone(call) is not None
