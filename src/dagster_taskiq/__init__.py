"""Dagster runs and steps over Taskiq on AWS SQS, with a cancellation that always works."""

from importlib import import_module
from typing import TYPE_CHECKING

from dagster_shared.libraries import DagsterLibraryRegistry

from dagster_taskiq.version import __version__

if TYPE_CHECKING:
    from dagster_taskiq.cancellable_broker import CancellableSQSBroker
    from dagster_taskiq.cancellable_receiver import CancellableReceiver
    from dagster_taskiq.errors import DagsterTaskiqError, TaskCancelled
    from dagster_taskiq.executor import taskiq_executor
    from dagster_taskiq.launcher import TaskiqRunLauncher
    from dagster_taskiq.settings import Settings

__all__ = [
    "CancellableReceiver",
    "CancellableSQSBroker",
    "DagsterTaskiqError",
    "Settings",
    "TaskCancelled",
    "TaskiqRunLauncher",
    "__version__",
    "taskiq_executor",
]

_HOME = {
    "CancellableReceiver": "cancellable_receiver",
    "CancellableSQSBroker": "cancellable_broker",
    "DagsterTaskiqError": "errors",
    "Settings": "settings",
    "TaskCancelled": "errors",
    "TaskiqRunLauncher": "launcher",
    "taskiq_executor": "executor",
}


def __getattr__(name: str) -> object:
    # On demand: the fork server, the children and `--help` need only a part of it, and a second is a long time.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


DagsterLibraryRegistry.register("dagster-taskiq", __version__, is_dagster_package=False)
