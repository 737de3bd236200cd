"""What a worker's heartbeat says, and when: on Dagster's own SQLite storage."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import DagsterInstance
from tests.support.waiting import wait_until

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.heart import Heart
from dagster_taskiq.worker.orders import Orders

pytestmark = pytest.mark.anyio

SETTINGS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1", serves=("gpu", "default"))
SLOW = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1", visibility_timeout_seconds=3_600)


def context_of(instance: DagsterInstance, settings: Settings) -> WorkerContext:
    heartbeats = Heartbeats.of_runs(instance, settings)
    return WorkerContext(
        instance=instance,
        settings=settings,
        claims=Claims(instance, heartbeats),
        step_claims=StepClaims(instance),
        heartbeats_of_steps=heartbeats,
        processes=cast("Any", SimpleNamespace()),
        worker_id="w",
        where="here",
        cancel_tasks=cast("Any", None),
    )


def told(context: WorkerContext, fact: str) -> Any:
    (last,) = Heartbeats.of_runs(context.instance, context.settings).last()
    return last.facts.get(fact)


async def test_a_worker_of_several_routes_says_on_which_one_a_step_has_come() -> None:
    with DagsterInstance.ephemeral() as instance:
        context, orders = context_of(instance, SETTINGS), Orders("w", lambda _: None, 15)
        heart = Heart(Heartbeats.of_runs(instance, SETTINGS), context, asyncio.Event(), orders)
        with context.working_on("1", "run"), context.working_on("2", "run", StepRef("step", "2", "gpu")):
            await heart.beat()
        assert [entry[:2] for entry in told(context, "work")] == [["run", None], ["run", "step"]]
        assert told(context, "work_routes") == [None, "gpu"]


async def test_a_worker_that_stops_says_at_once_what_it_works_on(tmp_path: Path) -> None:
    """Or else `worker stop` would say for a heartbeat long that nothing is at work."""
    with DagsterInstance.local_temp(str(tmp_path)) as instance:  # in memory, nobody may read while another one writes
        context, orders, stopping = context_of(instance, SLOW), Orders("w", lambda _: None, 15), asyncio.Event()
        heart = Heart(Heartbeats.of_runs(instance, SLOW), context, stopping, orders)
        await heart.beat()
        beating = asyncio.create_task(heart.run())

        async def until_at_work(count: int) -> None:
            await asyncio.to_thread(wait_until, lambda: len(told(context, "work")) == count, f"{count} at work")

        stopping.set()
        orders.stops("ada", finish=True)
        with context.working_on("1", "run", StepRef("late", "1")):  # it had been received before
            await until_at_work(1)
        await until_at_work(0)
        beating.cancel()
        await asyncio.wait({beating})


class SlowHeartbeats(Heartbeats):
    """The beat reaches the database late."""

    begun: threading.Event
    go_on: threading.Event
    written: threading.Event

    def beat(
        self, worker_id: str, facts: Mapping[str, Any] | None = None, asks: Sequence[str] = ()
    ) -> Mapping[str, str]:
        self.begun.set()
        self.go_on.wait(10)
        try:
            return super().beat(worker_id, facts, asks)
        finally:
            self.written.set()


async def test_a_late_heartbeat_does_not_undo_that_the_worker_has_ended() -> None:
    """Whoever sees it alive again waits for a worker that is no more."""
    with DagsterInstance.ephemeral() as instance:
        heartbeats = SlowHeartbeats(instance, 30, 10)
        heartbeats.begun, heartbeats.go_on, heartbeats.written = (threading.Event() for _ in range(3))
        orders = Orders("w", lambda _: None, 15)
        heart = Heart(heartbeats, context_of(instance, SLOW), asyncio.Event(), orders)
        beating = asyncio.create_task(heart.beat())
        await asyncio.to_thread(heartbeats.begun.wait, 10)
        beating.cancel()
        await asyncio.wait({beating})
        stopping = asyncio.create_task(heart.stop())
        await asyncio.wait({stopping}, timeout=0.2)
        heartbeats.go_on.set()
        await stopping
        assert await asyncio.to_thread(heartbeats.written.wait, 10)
        assert [last.gone for last in heartbeats.last()] == [True]
        await heart.beat()
        assert [last.gone for last in heartbeats.last()] == [True]
