"""What nobody came to delete is deleted, also when a part of it cannot be."""

import asyncio
import time

import pytest
from dagster import DagsterInstance
from tests.support.eventually import eventually

from dagster_taskiq.dagster_compat.storage import values_under
from dagster_taskiq.storage.fleet import StopRequest, ask_to_stop, stop_key
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.worker.housekeeping import keep_house

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def _no_time() -> float:
    raise OSError("there is no clock")


async def test_what_fails_keeps_nothing_else_from_being_deleted(caplog: pytest.LogCaptureFixture) -> None:
    with DagsterInstance.ephemeral() as instance:
        ask_to_stop(instance, "old", StopRequest(time.time() - 8 * 24 * 3_600, "ada"))
        keeping = asyncio.create_task(keep_house(instance, Heartbeats(instance, 15, 10, clock=_no_time)))
        await eventually(lambda: not values_under(instance, stop_key("")), "the request is deleted", within=10)
        keeping.cancel()
        await asyncio.wait({keeping})
    assert any("there is no clock" in message for message in caplog.messages)
