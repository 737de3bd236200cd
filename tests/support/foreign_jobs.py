"""Jobs whose code knows nothing of this package, and that are executed as their authors would do it anywhere.

Each op writes `started` into the file `marks` where it is ready to be interrupted.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg


class Marks(dg.Config):
    marks: str


def begin(config: Marks) -> None:
    with Path(config.marks).open("a") as file:
        file.write(f"started {time.time()}\n")


def wait_for_the_warehouse(config: Marks) -> None:
    begin(config)
    time.sleep(300)


def ask_the_first_replica() -> None:
    raise ConnectionError("it does not answer")


@dg.op
def loads(config: Marks) -> None:
    try:
        ask_the_first_replica()
    except ConnectionError:
        wait_for_the_warehouse(config)


@dg.op
async def loads_later(config: Marks) -> None:
    begin(config)
    await asyncio.sleep(300)


@dg.job(executor_def=dg.in_process_executor)
def in_process() -> None:
    loads()


@dg.job(executor_def=dg.multiprocess_executor)
def in_processes() -> None:
    loads()


@dg.job(executor_def=dg.multiprocess_executor.configured({"start_method": {"forkserver": {}}}))
def in_forked_processes() -> None:
    loads()


@dg.job(executor_def=dg.in_process_executor)
def coroutine() -> None:
    loads_later()


@dg.op
def asks_first_in_a_thread(config: Marks) -> None:
    def ask() -> Any:
        from dagster_taskiq import cancellation_token

        return cancellation_token

    with ThreadPoolExecutor(1) as threads:
        token_of = threads.submit(ask).result(20)
    with token_of().shield():
        begin(config)
        time.sleep(4)
        with Path(config.marks).open("a") as file:
            file.write(f"whole {time.time()}\n")
    time.sleep(300)


@dg.job(executor_def=dg.multiprocess_executor)
def asks_first_in_a_thread_job() -> None:
    asks_first_in_a_thread()


defs = dg.Definitions(jobs=[in_process, in_processes, in_forked_processes, coroutine])


@dg.op(tags={"dagster-taskiq/timeout_seconds": "1"})
def takes_too_long() -> None:
    time.sleep(300)


@dg.job(executor_def=dg.multiprocess_executor)
def takes_too_long_job() -> None:
    takes_too_long()
