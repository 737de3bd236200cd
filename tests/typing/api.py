"""The public names as a user writes them. Never run: that it type-checks is the test."""

from dagster import DagsterInstance, Definitions, ExecutorDefinition

from dagster_taskiq import (
    CancellableReceiver,
    CancellableSQSBroker,
    DagsterTaskiqError,
    Settings,
    TaskCancelled,
    TaskiqRunLauncher,
    __version__,
    taskiq_executor,
)

version: str = __version__
broker = CancellableSQSBroker("https://sqs.us-east-1.amazonaws.com/1/tasks", "us-east-1")
receiver = CancellableReceiver(broker, max_async_tasks=4)
settings: Settings = Settings.from_config({"queue_url": "https://sqs.us-east-1.amazonaws.com/1/tasks"})
launcher = TaskiqRunLauncher(queue_url=settings.queue_url, config_source={"grace_seconds": 10})
executor: ExecutorDefinition = taskiq_executor.configured({"max_concurrent": 20})
definitions = Definitions(executor=executor)
reason: str | None = TaskCancelled("why").reason


async def cancel(task_id: str) -> tuple[str, ...]:
    await broker.cancel_task(task_id, reason="why", requested_by="who")
    report = await broker.cancel_tasks([task_id], reason="why")
    return report.sent


def terminate(run_id: str) -> bool:
    try:
        return bool(DagsterInstance.get().run_launcher.terminate(run_id)) and launcher.terminate(run_id)
    except DagsterTaskiqError:
        return False
