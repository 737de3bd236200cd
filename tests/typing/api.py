"""The public names as a user writes them. Never run: that it type-checks is the test."""

from collections.abc import Mapping
from threading import Event

from dagster import DagsterInstance, DagsterRun, Definitions, ExecutorDefinition, RunsFilter

from dagster_taskiq import (
    CancellableReceiver,
    CancellableSQSBroker,
    CancellationEvent,
    CancelReport,
    DagsterTaskiqError,
    Reexecution,
    RunSelection,
    Settings,
    TaskCancelled,
    TaskCancelOutcome,
    TaskCancelReport,
    TaskiqRunLauncher,
    TaskView,
    __version__,
    cancel_backfill,
    cancel_runs,
    cancel_schedule,
    cancel_sensor,
    reexecute_run,
    select_runs,
    taskiq_executor,
)

version: str = __version__
broker = CancellableSQSBroker("https://sqs.us-east-1.amazonaws.com/1/tasks", "us-east-1")
receiver = CancellableReceiver(broker, max_async_tasks=4)
settings: Settings = Settings.from_config({"queue_url": "https://sqs.us-east-1.amazonaws.com/1/tasks"})
launcher = TaskiqRunLauncher(queue_url=settings.queue_url, config_source={"grace_seconds": 10})
instance = DagsterInstance.get()
selected: RunSelection = select_runs(instance, RunsFilter(job_name="load"))
report: CancelReport = cancel_runs(instance, selected, reason="why", requested_by="who", stop=Event())
counts: Mapping[str, int] = cancel_runs(instance, ["id"], tell=lambda progress: print(progress.done)).counts
again: Reexecution = reexecute_run("id", all_steps=True, tags={"ticket": "1"}, workspace="workspace.yaml")
left: tuple[str, ...] = again.to_run + again.finished if again.run_id is not None else ()
stopped: CancelReport = cancel_schedule(instance, "nightly", location="etl", include_runs=False)
ended: tuple[str, ...] = cancel_sensor(instance, "files", reason="why", requested_by="who").withdrawn
told: tuple[str, ...] = cancel_backfill(instance, "kzuxgbsf", reason="why").told
executor: ExecutorDefinition = taskiq_executor.configured({"max_concurrent": 20})
definitions = Definitions(executor=executor)
reason: str | None = TaskCancelled("why").reason


async def cancel(task_id: str) -> tuple[str, ...]:
    await broker.cancel_task(task_id, reason="why", requested_by="who")
    report: TaskCancelReport = await broker.cancel_tasks([task_id], reason="why", wait_s=5)
    finished: int = report.counts.get(TaskCancelOutcome.FINISHED, 0)
    standing = await broker.cancel_group("a", reason="why", ttl_s=60)
    await broker.cancel_type("upload", requested_by="who")
    await broker.cancel_where(is_below, folder="/a", reason="why")
    return report.sent if finished and standing.ttl_s else ()


@broker.predicate
def is_below(task: TaskView, folder: str) -> bool:
    return task.task_name.startswith(folder) and task.group is not None


@broker.on_task_cancelled
def note(event: CancellationEvent) -> None:
    assert is_below(TaskView(event.task_id, event.task_name or "", {}), folder="/a")


def of_team(run: DagsterRun) -> bool:
    return run.tags.get("team") == "a" and len(select_runs(instance, of_team)) > 0


def terminate(run_id: str) -> bool:
    try:
        return bool(DagsterInstance.get().run_launcher.terminate(run_id)) and launcher.terminate(run_id)
    except DagsterTaskiqError:
        return False
