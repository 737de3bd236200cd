"""Jobs that stop where a file says it: at once, or for somebody to terminate them. Each step writes down its key."""

import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from dagster_taskiq import taskiq_executor

print("what a module prints is not for a program that reads our stdout")

FOLDER_TAG = "folder"


def folder_of(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> Path:
    return Path(context.run.tags[FOLDER_TAG])


def at_work(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> None:
    """The step has begun; it is interrupted, or stays, when it is the one that a file names."""
    key = context.get_step_execution_context().step.key
    folder = folder_of(context)
    with (folder / "marks").open("a") as file:
        file.write(f"{key}\n")
    if (folder / "stop").exists() and key in (folder / "stop").read_text().split():
        raise DagsterExecutionInterruptedError
    if (folder / "stay").exists() and key in (folder / "stay").read_text().split():
        time.sleep(300)


@dg.op
def extract(context: dg.OpExecutionContext) -> int:
    at_work(context)
    return 1


@dg.op
def transform(context: dg.OpExecutionContext, number: int) -> int:
    at_work(context)
    return number + 1


@dg.op(out=dg.DynamicOut(int))
def fan_out(context: dg.OpExecutionContext, number: int) -> Iterator[dg.DynamicOutput[int]]:
    for index in range(4):
        yield dg.DynamicOutput(number + index, mapping_key=f"k{index}")
    at_work(context)


@dg.op(out={"even": dg.Out(int, is_required=False), "odd": dg.Out(int, is_required=False)})
def sort(context: dg.OpExecutionContext, number: int) -> Iterator[dg.Output[int]]:
    at_work(context)
    yield dg.Output(number, "odd" if number % 2 else "even")


@dg.op
def load(context: dg.OpExecutionContext, number: int) -> int:
    at_work(context)
    return number * 10


@dg.op
def report(context: dg.OpExecutionContext, numbers: list[int]) -> None:
    at_work(context)
    (folder_of(context) / "report").write_text(" ".join(map(str, sorted(numbers))))


@dg.op(retry_policy=dg.RetryPolicy(max_retries=3), out=dg.DynamicOut(int))
def fan_out_at_the_second_try(context: dg.OpExecutionContext) -> Iterator[dg.DynamicOutput[int]]:
    """What it said the first time does not count."""
    at_work(context)
    for index in range(2):
        yield dg.DynamicOutput(index, mapping_key=f"try{context.retry_number}_{index}")
    if context.retry_number == 0:
        raise RuntimeError("as it should")


@dg.job(executor_def=dg.in_process_executor)
def straight() -> None:
    load(transform(extract()))


@dg.job(executor_def=dg.in_process_executor)
def fanned() -> None:
    report(fan_out(extract()).map(lambda number: load(transform(number))).collect())


@dg.job(executor_def=dg.in_process_executor)
def tried() -> None:
    report(fan_out_at_the_second_try().map(load).collect())


@dg.job(executor_def=dg.in_process_executor)
def sorted_out() -> None:
    even, odd = sort(extract())
    transform(load(even))
    load.alias("load_odd")(odd)


@dg.job(executor_def=dg.in_process_executor, resource_defs={"io_manager": dg.mem_io_manager})
def in_memory() -> None:
    transform(extract())


@dg.job(executor_def=taskiq_executor.configured({"max_concurrent": 1}))
def fanned_steps() -> None:
    report(fan_out(extract()).map(transform).collect())


@dg.job(executor_def=dg.multiprocess_executor)
def straight_processes() -> None:
    load(transform(extract()))


@dg.multi_asset(specs=[dg.AssetSpec("raw"), dg.AssetSpec("clean")])
def raw_and_clean(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    yield dg.MaterializeResult("raw")
    at_work(context)
    yield dg.MaterializeResult("clean")


@dg.asset(deps=["clean"], partitions_def=dg.StaticPartitionsDefinition(["a", "b"]))
def summary(context: dg.AssetExecutionContext) -> None:
    at_work(context)


@dg.asset(deps=["summary"])
def unwanted(context: dg.AssetExecutionContext) -> None:
    at_work(context)


defs = dg.Definitions(
    assets=[raw_and_clean, summary, unwanted],
    jobs=[straight, fanned, tried, sorted_out, in_memory, fanned_steps, straight_processes],
    executor=dg.in_process_executor,
)
