"""Jobs of steps that do nothing, each with each executor: `forty_taskiq`, `chain_multiprocess`, …

Made when asked for: a process that loads this file pays for its own job only, and imports its own executor only.
"""

from functools import cache

from dagster import (
    ExecutorDefinition,
    GraphDefinition,
    In,
    JobDefinition,
    Nothing,
    Out,
    graph,
    in_process_executor,
    multiprocess_executor,
    op,
)

AT_A_TIME = 4


@op(out=Out(Nothing))
def noop() -> None:
    pass


@op(ins={"after": In(Nothing)}, out=Out(Nothing))
def next_noop() -> None:
    pass


def parallel(count: int) -> GraphDefinition:
    @graph(name=f"parallel_{count}")
    def fan() -> None:
        next_noop.alias("closing")([noop.alias(f"step_{number}")() for number in range(count)])

    return fan


def chain(count: int) -> GraphDefinition:
    @graph(name=f"chain_{count}")
    def links() -> None:
        before = noop.alias("step_0")()
        for number in range(1, count):
            before = next_noop.alias(f"step_{number}")(before)

    return links


def executor(name: str) -> ExecutorDefinition:
    if name == "in_process":
        return in_process_executor
    if name == "multiprocess":
        return multiprocess_executor.configured({"max_concurrent": AT_A_TIME})
    from dagster_taskiq import taskiq_executor

    configured: ExecutorDefinition = taskiq_executor.configured({"max_concurrent": AT_A_TIME})
    return configured


SHAPES = {
    "one": lambda: chain(1),
    "forty": lambda: parallel(40),
    "chain": lambda: chain(10),
    "two_hundred": lambda: parallel(200),
}


@cache
def __getattr__(name: str) -> JobDefinition:
    for shape, make in SHAPES.items():
        if name.startswith(f"{shape}_"):
            return make().to_job(name=name, executor_def=executor(name.removeprefix(f"{shape}_")))
    raise AttributeError(name)
