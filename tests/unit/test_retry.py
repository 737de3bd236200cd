"""What failed and may work later is tried again, and the log says so once."""

import asyncio
import time

import pytest
from tests.support.eventually import eventually

from dagster_taskiq import _retry
from dagster_taskiq._retry import retry_async, retry_blocking
from dagster_taskiq._time_limit import time_limit
from dagster_taskiq.dagster_compat.retry import retry_storage

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "_FIRST_PAUSE_S", 0.001)


class Service:
    """Fails so many times, then answers."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    def ask(self) -> str:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"

    async def ask_later(self) -> str:
        return self.ask()


async def test_it_says_so_once_and_once_more_when_it_works(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(OSError("down"), OSError("still down"), OSError("still down"))
    assert await retry_async(service.ask_later, doing="ask", on=OSError) == "answer"
    assert caplog.messages == ["cannot ask, trying again: down", "can ask again after 3 tries"]


async def test_any_callable_that_returns_an_awaitable_will_do() -> None:
    service = Service(OSError("down"))
    assert await retry_async(lambda: service.ask_later(), doing="ask") == "answer"


async def test_what_works_at_once_is_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert await retry_async(Service().ask_later, doing="ask") == "answer"
    assert retry_blocking(Service().ask, doing="ask") == "answer"
    assert caplog.messages == []


async def test_another_error_is_raised_at_once() -> None:
    service = Service(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        await retry_async(service.ask_later, doing="ask", on=OSError)
    assert service.calls == 1


async def test_it_gives_up_when_told_to_and_raises_the_last_error() -> None:
    service = Service(*[OSError(f"failure {number}") for number in range(10)])
    with pytest.raises(OSError, match="failure 2"):
        await retry_async(service.ask_later, doing="ask", until=lambda: service.calls == 3)
    with pytest.raises(OSError, match="failure 3"):
        await retry_async(service.ask_later, doing="ask", for_s=0)


def test_it_waits_without_an_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(OSError("down"))
    assert retry_blocking(service.ask, doing="ask", on=(OSError,)) == "answer"
    assert len(caplog.messages) == 2
    with pytest.raises(OSError, match="down"):
        retry_blocking(Service(OSError("down")).ask, doing="ask", for_s=0)


async def test_a_cancellation_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "_FIRST_PAUSE_S", 1000.0)
    service = Service(OSError("down"))
    waiting = asyncio.create_task(retry_async(service.ask_later, doing="ask", longest_pause_s=1000))
    await eventually(lambda: service.calls, "it has failed once")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_patience_with_the_database_ends_with_the_time_of_its_thread() -> None:
    """Nobody waits for it any more; it must not go on for minutes, and write when the database is back."""
    service, began = Service(*[TimeoutError("away")] * 1_000), time.monotonic()
    with pytest.raises(TimeoutError), time_limit(0.1):
        retry_storage(service.ask, "ask")
    assert time.monotonic() - began < 20
    assert 0 < service.calls < 1_000
