"""How a worker ends: on Dagster's own in-memory storage, with queues that are never asked."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import DagsterInstance

from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.worker.service import Worker

pytestmark = pytest.mark.anyio

SETTINGS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")


async def test_what_cannot_be_closed_keeps_nothing_else_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = []

    async def broken(broker: CancellableSQSBroker) -> None:
        closed.append(broker.queue_url)
        raise OSError("the connection is gone")

    async def stop() -> None:
        closed.append("the fork server")
        raise OSError("it does not answer")

    monkeypatch.setattr(CancellableSQSBroker, "shutdown", broken)
    with DagsterInstance.ephemeral() as instance:
        worker = Worker(instance, SETTINGS, server=cast("Any", SimpleNamespace(stop=stop)))
        worker.stop()
        with caplog.at_level(logging.WARNING):
            await worker.run()
        (last,) = Heartbeats.of_runs(instance, SETTINGS).last()
    assert closed == [SETTINGS.queue_url, SETTINGS.steps_queue_url, "the fork server"]
    assert (last.worker_id, last.gone) == (worker.worker_id, True)
    assert len([record for record in caplog.records if record.exc_info]) == len(closed)
