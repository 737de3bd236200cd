"""Calls that never return do not stand in the way of the next ones."""

import asyncio
import logging
import threading
import time
from contextvars import ContextVar

import pytest

from dagster_taskiq._lane import Lane
from dagster_taskiq._time_limit import limited_until, time_limit

SHORT_S = 0.05
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_thread_is_used_again() -> None:
    lane = Lane("calls")
    first = await lane.call(threading.get_ident)
    assert first != threading.get_ident()
    assert await lane.call(threading.get_ident) == first
    lane.close()


async def test_what_hangs_is_given_up_and_the_next_call_has_another_thread(caplog: pytest.LogCaptureFixture) -> None:
    lane, answers = Lane("the clock", SHORT_S), threading.Event()
    hanging: list[threading.Thread] = []

    def hang() -> None:
        hanging.append(threading.current_thread())
        answers.wait()

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(TimeoutError, match="no answer within"):
                await lane.call(hang)
    assert [record.getMessage() for record in caplog.records] == ["a call hangs, going on without it: the clock"]
    assert await lane.call(threading.current_thread) not in hanging
    answers.set()
    for thread in hanging:
        thread.join(10)
        assert not thread.is_alive(), "it ends when its call returns"
    lane.close()


async def test_calls_do_not_wait_for_each_other() -> None:
    """However many there are: work, which waits for long, is not limited by the number of processors."""
    lane, together = Lane("calls"), threading.Barrier(60)
    await asyncio.wait_for(asyncio.gather(*[lane.call(together.wait, 20) for _ in range(60)]), 20)
    lane.close()


async def test_an_error_arrives_and_the_context_of_the_caller_is_there() -> None:
    lane, about = Lane("calls"), ContextVar("about", default="nothing")

    def fail() -> None:
        raise LookupError(about.get())

    about.set("run 1")
    with pytest.raises(LookupError, match="run 1"):
        await lane.call(fail)
    lane.close()


async def test_a_caller_that_is_cancelled_does_not_wait() -> None:
    lane, answers, begun = Lane("calls"), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        answers.wait()

    calling = asyncio.create_task(lane.call(hang))
    await lane.call(begun.wait)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    answers.set()
    lane.close()


async def test_asyncio_ends_although_a_call_hangs() -> None:
    answers = threading.Event()

    async def hang() -> None:
        with pytest.raises(TimeoutError):
            await Lane("calls", SHORT_S).call(answers.wait)

    program = threading.Thread(target=lambda: asyncio.run(hang()))
    program.start()
    await Lane("calls").call(program.join, 10)
    assert not program.is_alive()
    answers.set()


async def test_the_call_knows_how_long_it_may_take() -> None:
    lane = Lane("calls", 7)
    until = await lane.call(limited_until)
    assert until is not None
    assert 6 < until - time.monotonic() <= 7
    lane.close()


def test_the_shortest_limit_counts_and_only_what_fails_late_is_a_timeout() -> None:
    assert limited_until() is None
    with time_limit(60):
        outer = limited_until()
        with time_limit(3_600):
            assert limited_until() == outer
        with pytest.raises(TimeoutError, match="no answer within 0 s"), time_limit(0):
            raise ConnectionError("closed")
        with pytest.raises(ConnectionError), time_limit(1):
            raise ConnectionError("closed")
        with time_limit(0):
            pass  # an answer that comes late is an answer
        assert limited_until() == outer
    assert limited_until() is None
