"""Without Dagster: a task is cancelled, and its worker is killed before its cleanup handlers have ended."""

import asyncio
import subprocess
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from tests.support.moto import CREDENTIALS, create_queues
from tests.support.plain_tasks import Diary, FileResults, broker_with_tasks, kill, plain_worker
from tests.support.waiting import wait_until
from tests.support.workers import Outside

from dagster_taskiq import TaskCancelled
from dagster_taskiq.tasks.standing_cancels import SPREAD_S

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.long]
VISIBILITY_S = 4


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("other", "scope"),
    [
        ("is there already", "task"),
        ("comes when the work is visible again", "task"),
        ("comes when the work is visible again", "group"),
    ],
)
def test_what_was_cancelled_does_not_begin_again_and_its_handlers_run_elsewhere(
    tmp_path: Path, moto: str, other: str, scope: str
) -> None:
    queue_url = create_queues(moto, f"q-{uuid.uuid4().hex[:12]}", visibility_timeout_s=VISIBILITY_S)
    outside, diary = Outside(queue_url, moto), Diary(tmp_path)
    (tmp_path / "hold-cleanup").touch()

    async def send() -> None:
        broker = cast("Any", broker_with_tasks(queue_url, moto, diary))
        await broker.find_task("upload").kicker().with_task_id("t").with_labels(group="g").kiq("t")
        await broker.shutdown()

    async def cancel() -> None:
        broker = broker_with_tasks(queue_url, moto, diary)
        await (
            broker.cancel_task("t", reason="enough") if scope == "task" else broker.cancel_group("g", reason="enough")
        )
        await broker.shutdown()

    def wait_for(line: str) -> None:
        wait_until(lambda: line in diary.lines(), line, within=60, seen=diary.all)

    with ExitStack() as stack:

        def worker(name: str) -> "subprocess.Popen[bytes]":
            one = plain_worker(queue_url, moto, Diary(tmp_path, name), PLAIN_VISIBILITY_S=str(VISIBILITY_S))
            return stack.enter_context(one)

        first = worker("first")
        asyncio.run(send())
        wait_for("first: t started")
        if other == "is there already":
            worker("second")
        asyncio.run(cancel())
        wait_for("first: t cleanup began {} enough")
        if scope == "group":
            time.sleep(SPREAD_S + 2)  # then its message is hidden for longer than the work is
        kill(first)
        (tmp_path / "hold-cleanup").unlink()
        if other != "is there already":
            wait_until(lambda: outside.work() == (1, 0), "the work is visible again", within=60)
            worker("second")
        wait_for("second: t cleanup ended")
        stands = int(scope == "group")  # its message stays, and no other
        wait_until(
            lambda: (outside.work(), sum(outside.cancels())) == ((0, 0), stands),
            "no message is left",
            within=60,
            seen=lambda: (outside.work(), outside.cancels()),
        )
    assert diary.what() == ["t started", *["t cleanup began {} enough"] * 2, "t cleanup ended"]
    result = asyncio.run(FileResults(tmp_path).get_result("t"))
    assert isinstance(result.error, TaskCancelled)
    assert result.error.reason == "enough"


@pytest.mark.nightly
@pytest.mark.parametrize("moment_s", [0.0, 0.1, 0.3, 0.6, 1.0, 1.7, 2.5, 3.5])
def test_at_whatever_moment_the_worker_is_killed(tmp_path: Path, moto: str, moment_s: float) -> None:
    queue_url = create_queues(moto, f"q-{uuid.uuid4().hex[:12]}", visibility_timeout_s=VISIBILITY_S)
    outside, diary = Outside(queue_url, moto), Diary(tmp_path)
    (tmp_path / "hold-cleanup").touch()
    ids = [f"t-{number}" for number in range(8)]

    async def send(cancel: bool) -> None:
        broker = cast("Any", broker_with_tasks(queue_url, moto, diary))
        if cancel:
            report = await broker.cancel_tasks(ids, reason="enough")
            assert len(report.sent) == len(ids)
        else:
            for task_id in ids:
                await broker.find_task("upload").kicker().with_task_id(task_id).kiq(task_id)
        await broker.shutdown()

    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                plain_worker(queue_url, moto, Diary(tmp_path, name), PLAIN_VISIBILITY_S=str(VISIBILITY_S))
            )
            for name in ("first", "second", "third")
        ]
        asyncio.run(send(cancel=False))
        wait_until(lambda: len(diary.what()) == len(ids), "all have started", within=60, seen=diary.all)
        asyncio.run(send(cancel=True))
        time.sleep(moment_s)
        kill(workers[0])
        (tmp_path / "hold-cleanup").unlink()
        wait_until(
            lambda: (outside.work(), sum(outside.cancels())) == ((0, 0), 0), "all is over", within=90, seen=diary.all
        )
    assert sum(line.endswith("started") for line in diary.what()) == len(ids), diary.all()
    for task_id in ids:
        assert isinstance(asyncio.run(FileResults(tmp_path).get_result(task_id)).error, TaskCancelled)
