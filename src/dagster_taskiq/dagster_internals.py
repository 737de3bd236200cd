"""The only module that imports Dagster's private parts, so that the day they move, one place changes.

`tests/unit/test_dagster_internals.py` says when they do.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from alembic.config import Config
from alembic.script import ScriptDirectory
from dagster import DagsterEvent, DagsterInstance
from dagster._cli.api import _execute_run_command_body, _resume_run_command_body
from dagster._core.errors import DagsterExecutionInterruptedError, DagsterInvalidConfigError
from dagster._core.events import EngineEventData, JobFailureData, RunFailureReason
from dagster._core.events.log import EventLogEntry
from dagster._core.instance import InstanceRef
from dagster._core.launcher import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._daemon.monitoring import RESUME_RUN_LOG_MESSAGE
from dagster._serdes import ConfigurableClass, ConfigurableClassData, deserialize_value, serialize_value
from dagster._utils.interrupts import capture_interrupts, check_captured_interrupt
from dagster_shared.error import SerializableErrorInfo

__all__ = [
    "FINISHED_STATUSES",
    "RESUME_RUN_LOG_MESSAGE",
    "CheckRunHealthResult",
    "ConfigurableClass",
    "ConfigurableClassData",
    "DagsterExecutionInterruptedError",
    "DagsterInvalidConfigError",
    "EngineEventData",
    "InstanceRef",
    "JobFailureData",
    "LaunchRunContext",
    "ResumeRunContext",
    "RunFailureReason",
    "RunLauncher",
    "WorkerStatus",
    "capture_interrupts",
    "check_captured_interrupt",
    "deserialize_entry",
    "deserialize_value",
    "error_info",
    "event_of",
    "execute_run",
    "hook_interrupts",
    "read_migration_scripts_once",
    "resume_run",
    "serialize_value",
    "unexpected_termination",
]

_RunBody = Callable[[str, DagsterInstance], int]
_IGNORE: Final[Callable[[DagsterEvent], Any]] = lambda _: None  # noqa: E731


def execute_run(run_id: str, instance: DagsterInstance) -> int:
    """What `dagster api execute_run` does, in this process; returns its exit code."""
    return _execute_run_command_body(run_id, instance, _IGNORE, set_exit_code_on_failure=True)


def resume_run(run_id: str, instance: DagsterInstance) -> int:
    """What `dagster api resume_run` does, in this process; returns its exit code."""
    return _resume_run_command_body(run_id, instance, _IGNORE, set_exit_code_on_failure=True)


def read_migration_scripts_once() -> None:
    """Have alembic keep what it has read of Dagster's migration scripts, in this process and its forks.

    For every SQLite file that Dagster opens, and it has one for each run, alembic loads some ninety Python files, two
    or three times; that was half of a short run (measured). The scripts do not change while a process lives.
    """
    read = ScriptDirectory.from_config
    if getattr(read, "keeps", False):
        return
    kept = lru_cache(maxsize=8)(read)

    def from_config(config: Config) -> ScriptDirectory:
        # Dagster makes one configuration for each of its storages and keeps it, so it can be the key. Users'
        # migrations are read as ever: they may change while an op runs.
        ours = (config.get_main_option("script_location") or "").startswith("dagster")
        return kept(config) if ours else read(config)

    from_config.keeps = True  # type: ignore[attr-defined]
    ScriptDirectory.from_config = from_config  # type: ignore[method-assign]


def hook_interrupts(hook: Callable[[], None]) -> None:
    """Have `hook` called whenever an interrupt is about to be raised in this process.

    Dagster's signal handler creates a `DagsterExecutionInterruptedError` exactly when it interrupts code (while
    interrupts are only captured it sets a flag instead), so its constructor is the one place that knows.
    """

    def __init__(self: DagsterExecutionInterruptedError, *args: object) -> None:  # noqa: N807
        hook()
        BaseException.__init__(self, *args)

    DagsterExecutionInterruptedError.__init__ = __init__  # type: ignore[method-assign, assignment]


def deserialize_entry(text: str) -> EventLogEntry:
    """An event log entry from what `serialize_value` made of it."""
    return deserialize_value(text, EventLogEntry)


def unexpected_termination() -> JobFailureData:
    """Why a run failed whose process ended before its time."""
    return JobFailureData(error=None, failure_reason=RunFailureReason.UNEXPECTED_TERMINATION)


def event_of(entry: EventLogEntry) -> DagsterEvent | None:
    """The Dagster event in an event log entry; None for a plain log line."""
    event = entry.dagster_event
    return event if isinstance(event, DagsterEvent) else None


def error_info(message: str) -> SerializableErrorInfo:
    """An error for an engine event, without a stack: it is for a person who reads the run's log."""
    return SerializableErrorInfo(message=message, stack=[], cls_name=None)
