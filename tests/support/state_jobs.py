"""Jobs in which everybody keeps a state: threads that ask first, resources, I/O managers, hooks. Marks as in `jobs`."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_taskiq import CleanupContext, StateError, cancellation_token, on_cancel, taskiq_executor
from dagster_taskiq._retry import poll_until
from tests.support.jobs import Marks, mark


def note_states(context: CleanupContext) -> None:
    for step_key, state in context.state.items():
        mark(Marks(marks=context.tags["marks"]), f"state-of-{step_key} {','.join(sorted(state)) or 'nothing'}")


def keep(what: str) -> str:
    """Keep it for whoever calls this; or why that is refused."""
    try:
        cancellation_token().state[what] = True
    except StateError as error:
        return f"{what} refused: {error}"
    return f"{what} kept"


@dg.resource
@contextmanager
def keeper(context: dg.InitResourceContext) -> Iterator[str]:
    config = Marks(marks=context.run.tags["marks"])  # type: ignore[union-attr]
    mark(config, keep("made"))
    yield "it"
    mark(config, keep("given-back"))


class Keeping(dg.IOManager):
    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        keep("saved")

    def load_input(self, context: dg.InputContext) -> int:
        keep("loaded")
        return 1


@dg.io_manager
def keeping() -> Keeping:
    return Keeping()


@dg.success_hook
def keeps(context: dg.HookContext) -> None:
    keep("hooked")


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result(20)


LATE = threading.Event()
OVER = threading.Event()


def asks_late(config: Marks, token: Any) -> None:
    """A thread of the first step's, which asks when the second one is at work."""
    LATE.wait(60)
    token.state["late-by-its-own-token"] = True
    mark(config, keep("late"))
    OVER.set()


def work(config: Marks) -> None:
    token = cancellation_token()
    try:
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    finally:
        mark(config, f"interrupted {token.kind.name if token.kind else None} {token.requested_by}")


@dg.op(required_resource_keys={"keeper"})
def first(config: Marks) -> int:
    token = in_a_thread(lambda: (keep("threaded"), cancellation_token()))[1]
    own = cancellation_token()
    own.state["own"] = True
    in_a_thread(lambda: keep("threaded-meanwhile"))
    own.state["own-again"] = True
    threading.Thread(target=asks_late, args=(config, token), name="asks late", daemon=True).start()
    return 1


@dg.op(required_resource_keys={"keeper"})
def second(config: Marks, before: int) -> None:
    in_a_thread(lambda: keep("threaded-too"))
    LATE.set()
    if any(thread.name == "asks late" for thread in threading.enumerate()):
        OVER.wait(20)
    else:  # the first step is in a process of its own, and is to have ended there
        poll_until(lambda: "given-back" in Path(config.marks).read_text(), within_s=60, every_s=0.01)
    work(config)


@dg.op
def beside(config: Marks) -> None:
    work(config)


def _job(name: str, executor: dg.ExecutorDefinition, *, with_another: bool = False) -> dg.JobDefinition:
    @dg.job(
        name=name,
        executor_def=executor,
        resource_defs={"keeper": keeper, "io_manager": keeping},
        hooks={keeps},
    )
    @on_cancel(note_states)
    def job() -> None:
        second(first())
        if with_another:
            beside()

    return job


in_one_process_job = _job("in_one_process_job", dg.in_process_executor)
in_processes_job = _job("in_processes_job", dg.multiprocess_executor)
on_workers_job = _job("on_workers_job", taskiq_executor)
in_forked_processes_job = _job(
    "in_forked_processes_job",
    dg.multiprocess_executor.configured(
        {"start_method": {"forkserver": {"preload_modules": ["tests.support.state_jobs"]}}}
    ),
    with_another=True,
)
