"""Jobs for bad days. Each body writes a line every moment of its life: so one sees if two of a kind overlap."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg

from dagster_taskiq import taskiq_executor

TICK_S = 0.1


class Marks(dg.Config):
    marks: str
    seconds: float = 1.0


class Body:
    """The marks of one execution of one body."""

    def __init__(self, context: dg.OpExecutionContext, config: Marks) -> None:
        self._who = f"{context.get_step_execution_context().step.key} {os.getpid()}-{time.monotonic_ns()}"
        self._path = Path(config.marks)
        self.mark("started")

    def mark(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{text} {self._who} {time.time()}\n")

    def live(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(TICK_S)
            self.mark("alive")


@dg.op(out=dg.Out(dg.Nothing))
def works(context: dg.OpExecutionContext, config: Marks) -> None:
    body = Body(context, config)
    try:
        body.live(config.seconds)
        body.mark("done")
    finally:
        body.mark("cleanup")


@dg.op(ins={"before": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
def then_works(context: dg.OpExecutionContext, config: Marks) -> None:
    body = Body(context, config)
    body.live(config.seconds / 2)
    body.mark("done")


@dg.op(out=dg.Out(dg.Nothing))
def ignores(context: dg.OpExecutionContext, config: Marks) -> None:
    """Swallows whatever is to stop it, for far longer than the grace."""
    body = Body(context, config)
    until = time.monotonic() + config.seconds * 5
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            body.live(TICK_S)
    body.mark("done")


@dg.op(out=dg.Out(dg.Nothing))
def computes(context: dg.OpExecutionContext, config: Marks) -> None:
    """Blocked in C for a while: no handler runs meanwhile."""
    body = Body(context, config)
    until = time.monotonic() + config.seconds
    while time.monotonic() < until:
        sum(range(4_000_000))
        body.mark("alive")
    body.mark("done")


@dg.op(out=dg.Out(dg.Nothing))
def spawns(context: dg.OpExecutionContext, config: Marks) -> None:
    body = Body(context, config)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True, stdin=subprocess.DEVNULL
    )
    body.live(config.seconds)
    process.kill()
    process.wait()
    body.mark("done")


@dg.op(out=dg.Out(dg.Nothing), retry_policy=dg.RetryPolicy(max_retries=3, delay=0.2))
def fails_first(context: dg.OpExecutionContext, config: Marks) -> None:
    body = Body(context, config)
    body.live(config.seconds / 2)
    if context.retry_number == 0:
        body.mark("failed")
        raise RuntimeError("the first time")
    body.mark("done")


@dg.op(out=dg.Out(dg.Nothing))
def breaks(context: dg.OpExecutionContext, config: Marks) -> None:
    body = Body(context, config)
    body.live(config.seconds / 2)
    body.mark("failed")
    raise RuntimeError("as it should")


def _job(name: str, *first: dg.OpDefinition, steps: bool, routes: bool = False) -> dg.JobDefinition:
    """`routes`: every other one of the first steps is for the route gpu, wherever its run is; its key says so."""
    executor = taskiq_executor.configured({"max_concurrent": 3}) if steps else dg.in_process_executor
    each = [
        op.tag({"dagster-taskiq/queue": "gpu"}).alias(f"gpu_{op.name}_{number}")
        if routes and number % 2 == 0
        else op.alias(f"{op.name}_{number}")
        for number, op in enumerate(first)
    ]

    @dg.job(name=name, executor_def=executor)
    def job() -> None:
        then_works([invoke() for invoke in each])

    return job


defs = dg.Definitions(
    jobs=[
        _job("works_in_process", works, steps=False),
        _job("ignores_in_process", ignores, steps=False),
        _job("computes_in_process", computes, steps=False),
        _job("spawns_in_process", spawns, steps=False),
        _job("tries_again_in_process", fails_first, steps=False),
        _job("fails_in_process", works, breaks, steps=False),
        _job("works_in_steps", works, works, works, steps=True),
        _job("mixed_in_steps", works, ignores, fails_first, steps=True),
        _job("spawns_in_steps", spawns, computes, steps=True),
        _job("fails_in_steps", works, breaks, steps=True),
        _job("works_on_routes_in_steps", works, works, works, steps=True, routes=True),
        _job("mixed_on_routes_in_steps", ignores, works, fails_first, steps=True, routes=True),
        _job("spawns_on_routes_in_steps", computes, spawns, spawns, steps=True, routes=True),
    ]
)
JOBS = {job.name: job for job in defs.jobs or () if isinstance(job, dg.JobDefinition)}
globals().update(JOBS)
