"""Without Dagster: taskiq's own command line with our receiver, a task that is cancelled, and a worker that stops."""

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.moto import CREDENTIALS, REGION, create_queues, moto_server
from tests.support.waiting import wait_until
from tests.support.workers import Outside

from dagster_taskiq.cancellable_broker import CancellableSQSBroker

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

MODULE = """
import asyncio
import os
from pathlib import Path

from dagster_taskiq import on_cancel
from dagster_taskiq.cancellable_broker import CancellableSQSBroker

broker = CancellableSQSBroker(os.environ["QUEUE_URL"], endpoint_url=os.environ["ENDPOINT"], wait_time=1)
diary = Path(os.environ["DIARY"])


def note(line):
    with diary.open("a") as file:
        file.write(line + "\\n")


def undo(context):
    note(f"{context.args[0]} undone for {context.reason}")


@broker.task(task_name="sleep")
@on_cancel(undo)
async def sleep(name: str) -> None:
    note(f"{name} started")
    try:
        await asyncio.sleep(120)
    except asyncio.CancelledError:
        note(f"{name} cancelled")
        raise
    finally:
        note(f"{name} cleaned up")
"""


@contextmanager
def taskiq_worker(directory: Path, environ: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    (directory / "plain.py").write_text(MODULE)
    with (directory / "log").open("wb") as log:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "taskiq", "worker", "plain:broker", "--workers", "1"),
                *("--receiver", "dagster_taskiq.cancellable_receiver:CancellableReceiver"),
                *("--wait-tasks-timeout", "1"),
            ],
            cwd=directory,
            env={**os.environ, **CREDENTIALS, **environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield worker
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def test_a_task_is_cancelled_and_a_stopping_worker_hands_its_work_back(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with moto_server() as endpoint:
        queue_url = create_queues(endpoint, f"q-{uuid.uuid4().hex[:12]}")
        outside = Outside(queue_url, endpoint)

        async def ask(name: str, cancel: bool) -> None:
            broker = CancellableSQSBroker(queue_url, REGION, endpoint_url=endpoint)
            sleep = broker.register_task(_never_here, task_name="sleep")
            task = await sleep.kiq(name)
            if cancel:
                await asyncio.to_thread(wait_for, f"{name} started")
                await broker.cancel_task(task.task_id, reason="enough")
            await broker.shutdown()

        def lines() -> list[str]:
            return diary.read_text().splitlines() if diary.exists() else []

        def wait_for(line: str) -> None:
            wait_until(lambda: line in lines(), line, within=40, seen=lambda: (tmp_path / "log").read_text())

        environ = {"QUEUE_URL": queue_url, "ENDPOINT": endpoint, "DIARY": str(diary)}
        with taskiq_worker(tmp_path, environ) as worker:
            asyncio.run(ask("first", cancel=True))
            wait_for("first undone for enough")
            wait_until(lambda: (outside.work(), outside.cancels()) == ((0, 0), (0, 0)), "no message is left")
            asyncio.run(ask("second", cancel=False))
            wait_for("second started")
            worker.send_signal(signal.SIGTERM)
            worker.wait(timeout=30)
        stopped = ["started", "cancelled", "cleaned up"]
        assert lines() == [
            *(f"first {what}" for what in (*stopped, "undone for enough")),
            *(f"second {what}" for what in stopped),
        ]
        assert outside.work() == (1, 0)
        assert outside.cancels() == (0, 0)
        log = (tmp_path / "log").read_text()
        assert "Cancelling task " in log
        assert "Traceback" not in log


async def _never_here(name: str) -> None:
    raise NotImplementedError
