"""Dagster runs and steps over Taskiq on AWS SQS, with a cancellation that always works."""

from importlib import import_module
from typing import TYPE_CHECKING

from dagster_shared.libraries import DagsterLibraryRegistry

from dagster_taskiq.version import __version__

if TYPE_CHECKING:
    from dagster_taskiq.cancel_many import CancelProgress, CancelReport, cancel_runs
    from dagster_taskiq.cancel_sources import cancel_backfill, cancel_schedule, cancel_sensor
    from dagster_taskiq.cancellable_broker import CancellableSQSBroker
    from dagster_taskiq.cancellable_receiver import CancellableReceiver
    from dagster_taskiq.cancellation.model import CancelKind
    from dagster_taskiq.cancellation.token import CancellationToken
    from dagster_taskiq.child.op_token import OpCancelled
    from dagster_taskiq.cleanup.runner import CleanupContext
    from dagster_taskiq.coordinator import TaskiqRunCoordinator
    from dagster_taskiq.errors import CleanupFailed, DagsterTaskiqError, RunNotFound, StateError, TaskCancelled
    from dagster_taskiq.executor import taskiq_executor
    from dagster_taskiq.launcher import TaskiqRunLauncher
    from dagster_taskiq.op_api import cancellation_token, on_cancel
    from dagster_taskiq.reexecution import Reexecution, reexecute_run
    from dagster_taskiq.run_selection import RunSelection, select_runs
    from dagster_taskiq.runs import cancel_run, clean_up_run
    from dagster_taskiq.settings import Settings
    from dagster_taskiq.tasks.cancel_report import TaskCancelOutcome, TaskCancelReport
    from dagster_taskiq.tasks.cleanup import TaskCleanupContext
    from dagster_taskiq.tasks.middleware import CancellationEvent, CancellationMiddleware
    from dagster_taskiq.tasks.predicates import TaskView
    from dagster_taskiq.testing import FakeToken, fake_token

__all__ = [
    "CancelKind",
    "CancelProgress",
    "CancelReport",
    "CancellableReceiver",
    "CancellableSQSBroker",
    "CancellationEvent",
    "CancellationMiddleware",
    "CancellationToken",
    "CleanupContext",
    "CleanupFailed",
    "DagsterTaskiqError",
    "FakeToken",
    "OpCancelled",
    "Reexecution",
    "RunNotFound",
    "RunSelection",
    "Settings",
    "StateError",
    "TaskCancelOutcome",
    "TaskCancelReport",
    "TaskCancelled",
    "TaskCleanupContext",
    "TaskView",
    "TaskiqRunCoordinator",
    "TaskiqRunLauncher",
    "__version__",
    "cancel_backfill",
    "cancel_run",
    "cancel_runs",
    "cancel_schedule",
    "cancel_sensor",
    "cancellation_token",
    "clean_up_run",
    "fake_token",
    "on_cancel",
    "reexecute_run",
    "select_runs",
    "taskiq_executor",
]

_HOME = {
    "CancelKind": "cancellation.model",
    "CancelProgress": "cancel_many",
    "CancelReport": "cancel_many",
    "CancellableReceiver": "cancellable_receiver",
    "CancellableSQSBroker": "cancellable_broker",
    "CancellationEvent": "tasks.middleware",
    "CancellationMiddleware": "tasks.middleware",
    "CancellationToken": "cancellation.token",
    "CleanupContext": "cleanup.runner",
    "CleanupFailed": "errors",
    "DagsterTaskiqError": "errors",
    "FakeToken": "testing",
    "OpCancelled": "child.op_token",
    "Reexecution": "reexecution",
    "RunNotFound": "errors",
    "RunSelection": "run_selection",
    "Settings": "settings",
    "StateError": "errors",
    "TaskCancelOutcome": "tasks.cancel_report",
    "TaskCancelReport": "tasks.cancel_report",
    "TaskCancelled": "errors",
    "TaskCleanupContext": "tasks.cleanup",
    "TaskView": "tasks.predicates",
    "TaskiqRunCoordinator": "coordinator",
    "TaskiqRunLauncher": "launcher",
    "cancel_backfill": "cancel_sources",
    "cancel_run": "runs",
    "cancel_runs": "cancel_many",
    "cancel_schedule": "cancel_sources",
    "cancel_sensor": "cancel_sources",
    "cancellation_token": "op_api",
    "clean_up_run": "runs",
    "fake_token": "testing",
    "on_cancel": "op_api",
    "reexecute_run": "reexecution",
    "select_runs": "run_selection",
    "taskiq_executor": "executor",
}


def __getattr__(name: str) -> object:
    # On demand: the fork server, the children and `--help` need only a part of it, and a second is a long time.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


DagsterLibraryRegistry.register("dagster-taskiq", __version__, is_dagster_package=False)
