"""What a worker's heartbeat says, and when: on Dagster's own in-memory storage."""

import asyncio
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


async def test_a_worker_that_stops_says_at_once_what_it_works_on() -> None:
    """Or else `worker stop` would say for a heartbeat long that nothing is at work."""
    with DagsterInstance.ephemeral() as instance:
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
