"""Jobs for workers that stop and die: each step counts its parts in its state, and holds a lock while it works."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from dagster_taskiq import cancellation_token, taskiq_executor
from tests.support.step_jobs import Marks, mark


@contextmanager
def only_one(context: dg.OpExecutionContext, config: Marks) -> Iterator[None]:
    """Marks an overlap when another process is at work on the same step. The lock ends with the process."""
    key = context.get_step_execution_context().step.key
    with Path(f"{config.marks}.{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mark(context, config, "overlap")
        yield


def work(context: dg.OpExecutionContext, config: Marks) -> None:
    with only_one(context, config):
        state = cancellation_token().state
        done = int(state.get("parts", 0))
        mark(context, config, f"began-{context.retry_number}-{done}")
        for part in range(done, config.count):
            mark(context, config, "started")
            time.sleep(config.seconds / config.count)
            state["parts"] = part + 1
            mark(context, config, "part")
        mark(context, config, "done")


@dg.op(out=dg.Out(dg.Nothing))
def parts(context: dg.OpExecutionContext, config: Marks) -> None:
    work(context, config)


@dg.op(out=dg.Out(dg.Nothing), retry_policy=dg.RetryPolicy(max_retries=3))
def parts_with_policy(context: dg.OpExecutionContext, config: Marks) -> None:
    work(context, config)


@dg.op(out=dg.Out(dg.Nothing), tags={"dagster-taskiq/interrupted_steps": "fail"})
def parts_once(context: dg.OpExecutionContext, config: Marks) -> None:
    work(context, config)


@dg.op(out=dg.DynamicOut(int))
def numbers(context: dg.OpExecutionContext, config: Marks) -> Iterator[dg.DynamicOutput[int]]:
    """Yields before it works, so an interruption finds outputs that are written."""
    for number in range(2):
        yield dg.DynamicOutput(number, mapping_key=str(number))
    work(context, config)


@dg.op
def mapped(context: dg.OpExecutionContext, config: Marks, number: int) -> int:
    work(context, config)
    return number


@dg.op
def collected(context: dg.OpExecutionContext, config: Marks, found: list[int]) -> None:
    mark(context, config, f"collected-{sum(found)}-of-{len(found)}")


@dg.op(ins={"before": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
def last(context: dg.OpExecutionContext, config: Marks) -> None:
    work(context, config)


@dg.job(executor_def=taskiq_executor)
def one() -> None:
    parts()


@dg.job(executor_def=taskiq_executor)
def with_policy() -> None:
    parts_with_policy()


@dg.job(executor_def=taskiq_executor)
def once() -> None:
    parts_once()


@dg.job(executor_def=taskiq_executor)
def fan() -> None:
    collected(numbers().map(mapped).collect())


@dg.job(executor_def=taskiq_executor)
def many() -> None:
    """Three waves, as in a real one: some with a policy, some mapped."""
    first = [parts.alias(f"part_{number}")() for number in range(3)]
    second = [parts_with_policy.alias(f"policy_{number}")() for number in range(2)]
    last(before=[*first, *second])
    collected(numbers().map(mapped).collect())
