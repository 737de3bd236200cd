"""Who wants to know of a cancellation: whatever that code does, the worker goes on."""

import asyncio

import pytest

from dagster_taskiq.tasks import middleware
from dagster_taskiq.tasks.middleware import CancellationEvent, Listener, notify_all

pytestmark = pytest.mark.anyio

EVENT = CancellationEvent("finished", "t", error=RuntimeError("cancelled"))


async def leaves(event: CancellationEvent) -> None:
    raise SystemExit(2)


def leaves_too(event: CancellationEvent) -> None:
    raise SystemExit(2)


async def is_cancelled(event: CancellationEvent) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("listener", [leaves, leaves_too, is_cancelled])
def test_whatever_a_listener_raises_is_logged_and_no_more(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    told: list[CancellationEvent] = []
    asyncio.run(notify_all([], EVENT, [listener, told.append]))
    assert told == [EVENT]
    assert caplog.messages == ["a listener for cancellations failed"]


async def test_a_listener_that_ignores_its_end_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(middleware, "LISTENER_S", 0.1)
    release, left = asyncio.Event(), asyncio.Event()

    async def ignores(event: CancellationEvent) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        left.set()

    telling = asyncio.create_task(notify_all([], EVENT, [ignores]))
    done, _ = await asyncio.wait({telling}, timeout=20)
    release.set()
    await asyncio.wait_for(left.wait(), 20)
    assert done, "it was waited for"
    assert caplog.messages == ["a listener for cancellations is not waited for any more"]
