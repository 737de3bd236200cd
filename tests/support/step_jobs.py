"""Jobs whose steps are tasks of their own. Each op writes what it lived through into the file `marks`, with its key.

`started` is where tests begin to interrupt: an op writes it where it is ready for that.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from dagster_taskiq import taskiq_executor


class Marks(dg.Config):
    marks: str
    seconds: float = 300.0
    count: int = 3


def mark(context: dg.OpExecutionContext, config: Marks, text: str) -> None:
    with Path(config.marks).open("a") as file:
        file.write(f"{text} {context.get_step_execution_context().step.key} {os.getpid()} {time.time()}\n")


@dg.op(out=dg.Out(dg.Nothing))
def sleepy(context: dg.OpExecutionContext, config: Marks) -> None:
    try:
        mark(context, config, "started")
        time.sleep(config.seconds)
        mark(context, config, "slept")
    finally:
        mark(context, config, "cleanup-begin")
        time.sleep(0.05)
        mark(context, config, "cleanup-end")


@dg.op(out=dg.Out(dg.Nothing), retry_policy=dg.RetryPolicy(max_retries=2))
def tried_again(context: dg.OpExecutionContext, config: Marks) -> None:
    """Sleeps the first time only."""
    mark(context, config, "started")
    if context.retry_number == 0:
        time.sleep(config.seconds)
    mark(context, config, "slept")


@dg.op(out=dg.Out(dg.Nothing), retry_policy=dg.RetryPolicy(max_retries=5, delay=300))
def fails_and_waits(context: dg.OpExecutionContext, config: Marks) -> None:
    mark(context, config, "started")
    raise RuntimeError("as it should")


@dg.op(out=dg.Out(dg.Nothing), pool="scarce_steps")
def stubborn(context: dg.OpExecutionContext, config: Marks) -> None:
    until = time.monotonic() + config.seconds
    with contextlib.suppress(BaseException):
        mark(context, config, "started")
        time.sleep(config.seconds)
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            time.sleep(0.05)


@dg.op(out=dg.Out(dg.Nothing))
def dies(context: dg.OpExecutionContext, config: Marks) -> None:
    mark(context, config, "started")
    os._exit(17)


@dg.op(ins={"before": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
def afterwards(context: dg.OpExecutionContext, config: Marks) -> None:
    mark(context, config, "afterwards")


@dg.op(out=dg.DynamicOut(int))
def fan_out(context: dg.OpExecutionContext, config: Marks) -> Iterator[dg.DynamicOutput[int]]:
    mark(context, config, "started")
    for number in range(config.count):
        yield dg.DynamicOutput(number, mapping_key=f"a_rather_long_mapping_key_with_the_number_{number}")


@dg.op
def mapped(context: dg.OpExecutionContext, config: Marks, number: int) -> int:
    try:
        mark(context, config, "started")
        time.sleep(config.seconds)
    finally:
        mark(context, config, "cleanup-end")
    return number


@dg.op
def collected(context: dg.OpExecutionContext, config: Marks, numbers: list[int]) -> None:
    mark(context, config, f"collected-{sum(numbers)}")


@dg.resource(config_schema={"marks": str, "seconds": float})
def a_cluster(context: dg.InitResourceContext) -> Iterator[None]:
    """Takes its time to be given back. Not to be had for a negative time."""
    if context.resource_config["seconds"] < 0:
        raise RuntimeError("no cluster to be had")
    yield
    with Path(context.resource_config["marks"]).open("a") as file:
        file.write(f"leaving {os.getpid()} {time.time()}\n")
        file.flush()
        time.sleep(context.resource_config["seconds"])
        file.write(f"left {os.getpid()} {time.time()}\n")


@dg.op(out=dg.Out(dg.Nothing), required_resource_keys={"cluster"})
def with_a_cluster(context: dg.OpExecutionContext, config: Marks) -> None:
    mark(context, config, "started")
    time.sleep(config.seconds)


@dg.op(out=dg.Out(dg.Nothing), required_resource_keys={"cluster"})
def fails_with_a_cluster(context: dg.OpExecutionContext, config: Marks) -> None:
    mark(context, config, "started")
    raise RuntimeError("as it should")


def wide(name: str, steps: int, max_concurrent: int | None = None) -> dg.JobDefinition:
    @dg.job(name=name, executor_def=taskiq_executor.configured({"max_concurrent": max_concurrent}))
    def job() -> None:
        afterwards([sleepy.alias(f"step_{number}")() for number in range(steps)])

    return job


def job_of(op: dg.OpDefinition) -> dg.JobDefinition:
    @dg.job(name=f"{op.name}_steps", executor_def=taskiq_executor)
    def job() -> None:
        afterwards(op())

    return job


two_steps = wide("two_steps", 2)
fifty_steps = wide("fifty_steps", 50)
two_hundred_steps = wide("two_hundred_steps", 200)
sleepy_steps = job_of(sleepy)
tried_again_steps = job_of(tried_again)
fails_and_waits_steps = job_of(fails_and_waits)
stubborn_steps = job_of(stubborn)
dies_steps = job_of(dies)


@dg.job(executor_def=taskiq_executor, resource_defs={"cluster": a_cluster})
def cluster_steps() -> None:
    with_a_cluster()


@dg.job(executor_def=taskiq_executor, resource_defs={"cluster": a_cluster})
def failing_cluster_steps() -> None:
    fails_with_a_cluster()


@dg.job(executor_def=taskiq_executor)
def celery_tags_steps() -> None:
    tagged = sleepy.tag({"dagster-celery/priority": "3"})
    afterwards([tagged.alias("one")(), tagged.alias("other")(), sleepy()])


@dg.job(executor_def=taskiq_executor.configured({"max_concurrent_by_route": {"gpu": 1}}))
def routed_steps() -> None:
    """Two steps for the route gpu, one at a time; one that says it as dagster-celery does; one for its run's route."""
    train, large = sleepy.tag({"dagster-taskiq/queue": "gpu"}), sleepy.tag({"dagster-celery/queue": "big"})
    afterwards([train.alias("train_0")(), train.alias("train_1")(), large.alias("large")(), sleepy()])


@dg.job(executor_def=taskiq_executor)
def routed_dynamic_steps() -> None:
    collected(fan_out().map(mapped.tag({"dagster-taskiq/queue": "gpu"})).collect())


@dg.job(executor_def=taskiq_executor)
def dynamic_steps() -> None:
    collected(fan_out().map(mapped).collect())


@dg.job(executor_def=taskiq_executor)
def many_outputs() -> None:
    collected(fan_out().collect())


defs = dg.Definitions(
    jobs=[
        two_steps,
        fifty_steps,
        two_hundred_steps,
        sleepy_steps,
        tried_again_steps,
        fails_and_waits_steps,
        stubborn_steps,
        dies_steps,
        cluster_steps,
        failing_cluster_steps,
        celery_tags_steps,
        routed_steps,
        routed_dynamic_steps,
        dynamic_steps,
        many_outputs,
    ]
)
