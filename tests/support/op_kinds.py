"""One job for each kind of op: each can be cancelled while it works, has a handler, and says what happens.

Marks are made in the file that the run's tag `marks` names: `started`, `finally`, `undone` with the state that its
handler has found, `child` with the pid of a process that it has started, `tidied` by what ends in a way of its own.
"""

import asyncio
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import dagster as dg

from dagster_taskiq import CancellationToken, CleanupContext, cancellation_token, on_cancel, taskiq_executor

warnings.filterwarnings("ignore", category=dg.BetaWarning)  # observable sources, backfill policies

POOL = "kinds"
NEVER_S = 300.0
SLEEPS = [sys.executable, "-c", f"import time; time.sleep({NEVER_S})"]
PARTITIONS = dg.StaticPartitionsDefinition(["a", "b", "c"])


def say(tags: Any, text: str) -> None:
    with Path(tags["marks"]).open("a") as file:
        file.write(f"{text} {time.time()}\n")


def undo(context: CleanupContext) -> None:
    say(context.tags, f"undone {context.state.get('kept')}")


@contextmanager
def at_work(context: Any, *, ready: bool = True) -> Iterator[CancellationToken]:
    """`ready`: it may be interrupted from the first line on."""
    token = cancellation_token()
    token.state["kept"] = "kept"
    try:
        if ready:
            say(context.run.tags, "started")
        yield token
    finally:
        say(context.run.tags, "finally")


@on_cancel(undo)
@dg.op(pool=POOL)
def sync(context: dg.OpExecutionContext) -> None:
    with at_work(context):
        time.sleep(NEVER_S)


@on_cancel(undo)
@dg.op(pool=POOL)
async def asynchronous(context: dg.OpExecutionContext) -> None:
    with at_work(context):
        await asyncio.sleep(NEVER_S)


@on_cancel(undo)
@dg.op(pool=POOL)
async def blocking_coroutine(context: dg.OpExecutionContext) -> None:
    """It never gives the event loop a chance to cancel it."""
    with at_work(context):
        time.sleep(NEVER_S)  # noqa: ASYNC251 - what some code of users does


@on_cancel(undo)
@dg.op(pool=POOL)
def shielded_generator(context: dg.OpExecutionContext) -> Iterator[Any]:
    """Its shield is open across a `yield`; the interrupt waits until it ends."""
    with at_work(context, ready=False) as token:
        with token.shield():
            yield dg.AssetMaterialization("halfway")
            say(context.run.tags, "started")
            token.wait(NEVER_S)
            time.sleep(0.3)
            say(context.run.tags, "tidied")
        time.sleep(NEVER_S)
        yield dg.Output(None)


@on_cancel(undo)
@dg.op(pool=POOL)
def generator(context: dg.OpExecutionContext) -> Iterator[Any]:
    with at_work(context, ready=False):
        yield dg.AssetMaterialization("halfway")
        say(context.run.tags, "started")
        time.sleep(NEVER_S)
        yield dg.Output(None)


@on_cancel(undo)
@dg.op(pool=POOL, out=dg.Out(dg.Any))
async def async_generator(context: dg.OpExecutionContext) -> AsyncIterator[Any]:
    with at_work(context, ready=False):
        yield dg.AssetMaterialization("halfway")
        say(context.run.tags, "started")
        await asyncio.sleep(NEVER_S)
        yield dg.Output(None)


@on_cancel(undo)
@dg.op(pool=POOL)
def thread_pool(context: dg.OpExecutionContext) -> None:
    with at_work(context, ready=False) as token, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(token.wait, NEVER_S) for _ in range(2)]
        say(context.run.tags, "started")
        waiting[0].result()
        token.raise_if_cancelled()  # the threads may hear of it before the interrupt comes, and the op would succeed


@on_cancel(undo)
@dg.op(pool=POOL)
def deaf_thread_pool(context: dg.OpExecutionContext) -> None:
    """The end of its `with` waits for the thread, before `finally`."""
    with at_work(context, ready=False), ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(time.sleep, NEVER_S)
        say(context.run.tags, "started")
        sleeping.result()


@on_cancel(undo)
@dg.op(pool=POOL)
async def to_thread(context: dg.OpExecutionContext) -> None:
    with at_work(context):
        await asyncio.to_thread(time.sleep, NEVER_S)


@on_cancel(undo)
@dg.op(pool=POOL)
def process_pool(context: dg.OpExecutionContext) -> None:
    with at_work(context, ready=False), multiprocessing.Pool(2) as pool:
        sleeping = pool.apply_async(time.sleep, (NEVER_S,))
        for process in multiprocessing.active_children():
            say(context.run.tags, f"child {process.pid}")
        say(context.run.tags, "started")
        sleeping.get()


@on_cancel(undo)
@dg.op(pool=POOL)
def subprocesses(context: dg.OpExecutionContext) -> None:
    with at_work(context, ready=False), subprocess.Popen(SLEEPS) as process:
        say(context.run.tags, f"child {process.pid}")
        try:
            say(context.run.tags, "started")
            process.wait()
        finally:
            process.kill()


@on_cancel(undo)
@dg.op(pool=POOL)
def new_session(context: dg.OpExecutionContext) -> None:
    """It leaves the session, and nobody but the shim ends it."""
    with at_work(context, ready=False):
        process = subprocess.Popen(SLEEPS, start_new_session=True)
        say(context.run.tags, f"child {process.pid}")
        say(context.run.tags, "started")
        process.wait()


@on_cancel(undo)
@dg.op(pool=POOL)
def c_call(context: dg.OpExecutionContext) -> None:
    """It keeps the interpreter lock, so no line of Python runs any more in its process."""
    with at_work(context):
        deque(itertools.repeat(None, 10**12), maxlen=0)


PIPES_SCRIPT = """
import os, time
from dagster_pipes import open_dagster_pipes

with open_dagster_pipes() as pipes:
    def say(text):
        with open(pipes.get_extra("marks"), "a") as file:
            file.write(f"{text} {time.time()}\\n")
    say(f"child {os.getpid()}")
    try:
        say("started")
        time.sleep(300)
    finally:
        say("tidied")
"""


@on_cancel(undo)
@dg.op(pool=POOL)
def pipes(context: dg.OpExecutionContext) -> None:
    with at_work(context, ready=False):
        client = dg.PipesSubprocessClient()
        command = [sys.executable, "-c", PIPES_SCRIPT]
        client.run(context=context, command=command, extras={"marks": context.run.tags["marks"]})


CLI = """
import signal, sys, time

def cancel(*_):
    print("queries cancelled", flush=True)
    sys.exit(130)

signal.signal(signal.SIGINT, cancel)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("running", flush=True)
time.sleep(300)
"""


@on_cancel(undo)
@dg.op(pool=POOL)
def cli(context: dg.OpExecutionContext) -> None:
    """As dagster-dbt does it: a program with handlers of its own, which it tells to stop, and waits for."""
    with (
        at_work(context, ready=False),
        subprocess.Popen([sys.executable, "-c", CLI], stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        say(context.run.tags, f"child {process.pid}")
        try:
            assert process.stdout.readline() == "running\n"
            say(context.run.tags, "started")
            process.wait()
        except dg.DagsterExecutionInterruptedError:
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "queries cancelled\n"
            process.wait()
            say(context.run.tags, "tidied")
            raise


@on_cancel(undo)
@dg.op(pool=POOL)
async def with_anyio(context: dg.OpExecutionContext) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, NEVER_S)
        with at_work(context):
            try:
                await anyio.sleep(NEVER_S)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
                    say(context.run.tags, "tidied")


@dg.op(out=dg.DynamicOut(int))
def fan_out() -> Iterator[dg.DynamicOutput[int]]:
    for number in range(2):
        yield dg.DynamicOutput(number, mapping_key=str(number))


@on_cancel(undo)
@dg.op(pool=POOL)
def mapped(context: dg.OpExecutionContext, number: int) -> None:
    with at_work(context):
        time.sleep(NEVER_S)


@dg.graph
def dynamic() -> None:
    fan_out().map(mapped)


@dg.graph
def inner() -> None:
    sync()


@dg.graph
def middle() -> None:
    inner()


@dg.graph
def nested_graph() -> None:
    middle()


def graph_of(op: dg.OpDefinition) -> dg.GraphDefinition:
    @dg.graph(name=f"{op.name}_graph")
    def graph() -> None:
        op()

    return graph


OPS = (
    *(
        sync,
        asynchronous,
        blocking_coroutine,
        generator,
        shielded_generator,
        async_generator,
        thread_pool,
        deaf_thread_pool,
        to_thread,
        process_pool,
    ),
    *(subprocesses, new_session, c_call, pipes, cli, with_anyio),
)
GRAPHS = {op.name: graph_of(op) for op in OPS} | {"nested_graph": nested_graph, "dynamic": dynamic}
EXECUTORS: dict[str, Callable[..., Any] | dg.ExecutorDefinition] = {
    "in-process": dg.in_process_executor,
    "multiprocess": dg.multiprocess_executor,
    "taskiq": taskiq_executor,
}


def job_name(kind: str, executor: str) -> str:
    return f"{kind}_{executor.replace('-', '_')}_job"


op_jobs = {
    job_name(kind, executor): graph.to_job(name=job_name(kind, executor), executor_def=EXECUTORS[executor])  # type: ignore[arg-type]
    for kind, graph in GRAPHS.items()
    for executor in EXECUTORS
}
globals().update(op_jobs)


@dg.asset
def checked() -> None:
    pass


@on_cancel(undo)
@dg.asset_check(asset=checked, pool=POOL)
def asset_check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    with at_work(context):
        time.sleep(NEVER_S)
    return dg.AssetCheckResult(passed=True)


@dg.observable_source_asset
@on_cancel(undo)
def observable_source(context: dg.OpExecutionContext) -> dg.DataVersion:
    with at_work(context):
        time.sleep(NEVER_S)
    return dg.DataVersion("1")


@on_cancel(undo)
@dg.asset(partitions_def=PARTITIONS, pool=POOL)
def partitioned(context: dg.AssetExecutionContext) -> None:
    assert context.partition_keys == ["b"]
    with at_work(context):
        time.sleep(NEVER_S)


@on_cancel(undo)
@dg.asset(partitions_def=PARTITIONS, backfill_policy=dg.BackfillPolicy.single_run(), pool=POOL)
def single_run(context: dg.AssetExecutionContext) -> None:
    assert context.partition_keys == ["a", "b", "c"]
    with at_work(context):
        time.sleep(NEVER_S)


ASSETS: dict[str, tuple[Any, dict[str, str]]] = {
    "asset_check": (dg.AssetSelection.checks_for_assets(checked), {}),
    "observable_source": (dg.AssetSelection.assets("observable_source"), {}),
    "partitioned": (dg.AssetSelection.assets("partitioned"), {"dagster/partition": "b"}),
    "single_run": (
        dg.AssetSelection.assets("single_run"),
        {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"},
    ),
}
"""Which assets the job of a kind is made of, and the tags of its run."""


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.CANCELED,
    monitor_all_code_locations=True,
    minimum_interval_seconds=1,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def counts_canceled(context: dg.RunStatusSensorContext) -> None:
    with Path(os.environ["DAGSTER_HOME"], "canceled").open("a") as file:
        file.write(f"{context.dagster_run.run_id}\n")


defs = dg.Definitions(
    assets=[checked, observable_source, partitioned, single_run],
    asset_checks=[asset_check],
    jobs=[
        *op_jobs.values(),
        *(
            dg.define_asset_job(job_name(kind, "in-process"), selection=selection, executor_def=dg.in_process_executor)
            for kind, (selection, _) in ASSETS.items()
        ),
    ],
    sensors=[counts_canceled],
)
