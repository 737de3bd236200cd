"""What result backends do to a question about their results."""

import asyncio
from typing import Any

import pytest
from taskiq import AsyncResultBackend, TaskiqResult

from dagster_taskiq.tasks.cancel_report import Results

pytestmark = pytest.mark.anyio


class Cancels(AsyncResultBackend[Any]):
    """A client that is closed, or whose own time limit is a cancellation, raises this."""

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        raise NotImplementedError

    async def is_result_ready(self, task_id: str) -> bool:
        raise asyncio.CancelledError

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:
        raise asyncio.CancelledError


async def test_a_backend_that_gives_up_holds_up_no_cancel(caplog: pytest.LogCaptureFixture) -> None:
    assert await Results(Cancels()).there(["a", "b"]) == set()
    assert "cannot read results of 2 tasks" in caplog.text
