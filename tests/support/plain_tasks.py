"""Taskiq tasks without Dagster, for real workers: `taskiq worker tests.support.plain_tasks:broker`.

Producers in tests use the same module, as users do. What the tasks do is written into a diary, a file that all share.
"""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskiq import AsyncResultBackend, TaskiqResult

from dagster_taskiq import CancellableSQSBroker, TaskCleanupContext, on_cancel
from tests.support.moto import CREDENTIALS, REGION

REPOSITORY = Path(__file__).parents[2]
SETTINGS = ("PLAIN_QUEUE_URL", "PLAIN_ENDPOINT", "PLAIN_FOLDER", "PLAIN_NAME")


class FileResults(AsyncResultBackend[Any]):
    """Results as files in one folder, so that other processes can read them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        part = self._folder / f"{task_id}.part"
        part.write_bytes(pickle.dumps(result))
        part.rename(self._folder / f"{task_id}.result")

    async def is_result_ready(self, task_id: str) -> bool:
        return (self._folder / f"{task_id}.result").exists()

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:
        return pickle.loads((self._folder / f"{task_id}.result").read_bytes())  # type: ignore[no-any-return]  # noqa: S301


@dataclass(frozen=True)
class Diary:
    """Lines that all processes append to."""

    folder: Path
    name: str = "test"
    """Who writes."""

    def note(self, line: str) -> None:
        with (self.folder / "diary").open("a") as file:
            file.write(f"{self.name}: {line}\n")

    def lines(self) -> list[str]:
        path = self.folder / "diary"
        return path.read_text().splitlines() if path.exists() else []

    def all(self) -> str:
        """With the logs of the workers."""
        logs = [path.read_text() for path in sorted(self.folder.glob("log-*"))]
        return "\n".join([*self.lines(), *logs])

    def what(self) -> list[str]:
        """Without who has written it."""
        return [line.partition(": ")[2] for line in self.lines()]


def broker_with_tasks(queue_url: str, endpoint: str, diary: Diary, **options: Any) -> CancellableSQSBroker:
    """A broker and its tasks, for workers and for producers."""
    made = CancellableSQSBroker(queue_url, REGION, endpoint_url=endpoint, wait_time=1, **options)
    made.with_result_backend(FileResults(diary.folder))

    async def undo(context: TaskCleanupContext) -> None:
        diary.note(f"{context.task_id} cleanup began {dict(context.state)} {context.reason}")
        while (diary.folder / "hold-cleanup").exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
        diary.note(f"{context.task_id} cleanup ended")

    @on_cancel(undo, timeout=60)
    async def upload(task_id: str, seconds: float = 120) -> None:
        diary.note(f"{task_id} started")
        await asyncio.sleep(seconds)
        diary.note(f"{task_id} finished")

    made.register_task(upload, task_name="upload")
    return made


@contextmanager
def plain_worker(queue_url: str, endpoint: str, diary: Diary, **environ: str) -> "Iterator[subprocess.Popen[bytes]]":
    """`taskiq worker`, a process group of its own; what is left of it at the end is killed."""
    values = (queue_url, endpoint, str(diary.folder), diary.name)
    with (diary.folder / f"log-{diary.name}").open("wb") as log:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "taskiq", "worker", "tests.support.plain_tasks:broker", "--workers", "1"),
                *("--receiver", "dagster_taskiq.cancellable_receiver:CancellableReceiver"),
                *("--wait-tasks-timeout", "1"),
            ],
            cwd=REPOSITORY,
            env={**os.environ, **CREDENTIALS, **dict(zip(SETTINGS, values, strict=True)), **environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield worker
        finally:
            kill(worker)


def kill(worker: "subprocess.Popen[bytes]") -> None:
    """As the kernel does it when memory is short: the worker and all of its processes."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


if all(name in os.environ for name in SETTINGS):
    _url, _endpoint, _folder, _name = (os.environ[name] for name in SETTINGS)
    broker = broker_with_tasks(
        _url,
        _endpoint,
        Diary(Path(_folder), _name),
        visibility_timeout_s=int(os.environ.get("PLAIN_VISIBILITY_S", "30")),
    )
