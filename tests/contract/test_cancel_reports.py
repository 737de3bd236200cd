"""What `cancel_tasks` tells of each task: what became of it, as far as anybody can know."""

import asyncio
from typing import Any

import pytest
from taskiq.brokers.inmemory_broker import InmemoryResultBackend
from taskiq.result_backends.dummy import DummyResultBackend
from tests.contract.test_receiver import bench, error_of
from tests.support.eventually import eventually
from tests.support.proxy import sqs_proxy
from tests.support.workers import Outside, broker_for

from dagster_taskiq import TaskCancelOutcome

pytestmark = pytest.mark.anyio


async def test_it_tells_what_became_of_each(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint, receiver={"max_async_tasks": 1}) as at:
        begun, interrupted = asyncio.Event(), asyncio.Event()

        async def stubborn() -> str:
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                interrupted.set()
            return "all the same"

        done = await at.broker.register_task(asyncio.sleep, task_name="nap").kiq(0)
        assert await error_of(done) is None
        running = await at.start()
        waiting = await at.wait.kiq()
        ids = [done.task_id, running.task_id, waiting.task_id, "nobody", "no id"]
        report = await at.broker.cancel_tasks([*ids, ids[0]], wait_s=6)
        assert report.outcomes == {
            done.task_id: TaskCancelOutcome.FINISHED,
            running.task_id: TaskCancelOutcome.RUNNING,
            waiting.task_id: TaskCancelOutcome.WAITING,
            "nobody": TaskCancelOutcome.UNKNOWN,
            "no id": TaskCancelOutcome.NOT_SENT,
        }
        assert report.sent == (running.task_id, waiting.task_id, "nobody")
        assert set(report.failed) == {"no id"}
        assert sum(report.counts.values()) == len(ids)
        task = await at.broker.register_task(stubborn, task_name="stubborn").kiq()
        await begun.wait()
        report = await at.broker.cancel_tasks([task.task_id], wait_s=30)
        assert interrupted.is_set()
        assert report.counts == {TaskCancelOutcome.FINISHED: 1}


async def test_what_has_finished_is_not_sent(standard_url: str, endpoint: str) -> None:
    with sqs_proxy(endpoint) as proxy:
        broker = broker_for(proxy.through(standard_url), proxy.url)
        results: InmemoryResultBackend[Any] = InmemoryResultBackend()
        results.results["t"] = None  # type: ignore[assignment]
        broker.with_result_backend(results)
        report = await broker.cancel_tasks(["t"])
        assert (report.sent, report.counts) == ((), {TaskCancelOutcome.FINISHED: 1})
        assert proxy.seen.total() == 0
        await broker.shutdown()


async def test_without_a_result_backend_it_only_knows_what_was_sent(standard_url: str, endpoint: str) -> None:
    broker = broker_for(standard_url, endpoint).with_result_backend(DummyResultBackend())
    report = await broker.cancel_tasks(["t"], wait_s=60)
    assert (report.sent, report.counts) == (("t",), {TaskCancelOutcome.NO_RESULTS: 1})
    await broker.shutdown()


@pytest.mark.parametrize("fault", ["fails", "hangs"])
async def test_a_result_backend_that_does_not_answer_holds_up_no_cancel(
    standard_url: str, endpoint: str, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dagster_taskiq.tasks.cancel_report.LOOK_S", 0.2)

    class Away(InmemoryResultBackend[Any]):
        async def is_result_ready(self, task_id: str) -> bool:
            if fault == "hangs":
                await asyncio.Event().wait()
            raise ConnectionError("down")

    broker = broker_for(standard_url, endpoint).with_result_backend(Away())
    report = await broker.cancel_tasks([f"t-{number}" for number in range(30)], wait_s=0.5)
    assert report.counts == {TaskCancelOutcome.UNKNOWN: 30}
    await eventually(lambda: Outside(standard_url, endpoint).cancels() == (30, 0), "all are sent")
    assert "cannot read results of 30 tasks" in caplog.text
    await broker.shutdown()
