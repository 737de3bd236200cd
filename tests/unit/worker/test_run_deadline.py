"""The clock of a run's time limit, and what steps that time out count for."""

import asyncio
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq._lane import Lane
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.metrics import EmbeddedMetrics, Metrics
from dagster_taskiq.process.step_timers import LateStep
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import TIMEOUT_TAG
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.worker.cleanup_task import LateSteps
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.run_deadline import within_its_time

SETTINGS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")
SHUTDOWN = Cancellation(CancelKind.SHUTDOWN, cause="the worker stops")
pytestmark = pytest.mark.anyio


@pytest.fixture
def context() -> Iterator[WorkerContext]:
    with DagsterInstance.ephemeral() as instance:
        heartbeats = Heartbeats.of_runs(instance, SETTINGS)
        yield WorkerContext(
            instance=instance,
            settings=SETTINGS,
            lane=Lane("test"),
            claims=Claims(instance, heartbeats),
            step_claims=StepClaims(instance),
            heartbeats_of_steps=heartbeats,
            processes=cast("Any", SimpleNamespace()),
            worker_id="me",
            where="here",
            cancel_tasks=cast("Any", None),
            metrics=Metrics([EmbeddedMetrics()], "q"),
        )


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "resumed"])
async def test_a_database_that_is_away_when_the_worker_shuts_down_raises_nothing(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, is_new: bool
) -> None:
    run = create_run_for_test(context.instance, status=DagsterRunStatus.STARTED, tags={TIMEOUT_TAG: "0.001"})
    task = RunningTask("task", settle=cast("Any", None), awaits_signal=True)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def away(*_: object) -> None:
        loop.call_soon_threadsafe(asked.set)
        raise OSError("no database")

    monkeypatch.setattr(context.instance, "get_run_record_by_id", away)
    task.cancel(SHUTDOWN)
    caplog.set_level(logging.ERROR)
    async with within_its_time(context, run, task, is_new=is_new):
        await asked.wait()
        watching = [one for one in asyncio.all_tasks() if one.get_name().startswith("time limit of run")]
        await asyncio.wait_for(asyncio.gather(*watching), 10)
    assert task.cancellation is SHUTDOWN
    assert {record.message for record in caplog.records} == {"it could not be read when a run began"}


async def test_the_kill_of_a_step_that_has_timed_out_is_counted(
    context: WorkerContext, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run_for_test(context.instance, status=DagsterRunStatus.STARTED)
    task = RunningTask("task", settle=cast("Any", None), awaits_signal=True)
    writer = EventWriter(context.instance, run, "me", task.signal, lane=context.lane)
    steps = LateSteps(context, run, "task", writer)
    late = LateStep("1-1", "download", 1, "step timed out: why", run.run_id, "mark=1-1", has_handlers=False)
    steps.step_interrupting(late, 5.0)
    steps.step_killing(late, 5.0, None)
    await writer.written()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["TimedOut"] for line in lines if "TimedOut" in line] == [1]
    assert [line["ForcedKills"] for line in lines if "ForcedKills" in line] == [1]
