"""Jobs of steps that do nothing: very many on the unnamed route, some on the route `urgent`, some beside them."""

from dagster import GraphDefinition, JobDefinition, Nothing, OpDefinition, Out, graph, op

from dagster_taskiq import taskiq_executor

LOW, FEW = 300, 20
URGENT = {"dagster-taskiq/queue": "urgent"}


@op(out=Out(Nothing))
def noop() -> None:
    pass


@op(out=Out(Nothing), tags=URGENT)
def urgent_noop() -> None:
    pass


def job_of(name: str, does: OpDefinition, count: int) -> JobDefinition:
    @graph(name=f"{name}_graph")
    def fan() -> None:
        for number in range(count):
            does.alias(f"step_{number}")()

    steps: GraphDefinition = fan
    return steps.to_job(name=name, executor_def=taskiq_executor)


low = job_of("low", noop, LOW)
urgent = job_of("urgent", urgent_noop, FEW)
beside = job_of("beside", noop, FEW)
