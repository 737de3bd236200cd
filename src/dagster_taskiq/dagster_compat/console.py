"""What Dagster writes to the stderr of runs when nobody has configured its loggers, and how to have less of it.

By default that is every event and every line of the ops from DEBUG on, and an error in full twice: for its step, and
for its run. All of it is in the run's event log as well.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, LoggerDefinition
from dagster._core.events import RunFailureReason
from dagster._core.execution import context_creation_job
from dagster._core.executor import multiprocess
from dagster._core.executor.child_process_executor import ChildProcessCommand, execute_child_process_command
from dagster._core.log_manager import LOG_RECORD_EVENT_ATTR
from dagster._loggers import colored_console_logger, default_system_loggers

_Loggers = Sequence[tuple[LoggerDefinition, Mapping[str, object]]]


def limit_console(level: int) -> None:
    """In this process, and in those of Dagster's multiprocess executor below it, write only what has at least `level`.

    Loggers that a job, a run or `python_logs` in `dagster.yaml` configures are as configured. How a run ended is not
    written where its steps have said why, because the worker does.
    """

    def default_loggers(instance: DagsterInstance | None) -> _Loggers:
        configured = instance is not None and instance.python_log_level
        config = {} if configured else {"log_level": logging.getLevelName(level)}
        return [(_CONSOLE, {**theirs, **config}) for _, theirs in default_system_loggers(instance)]

    def execute_in_child(context: Any, command: ChildProcessCommand) -> Iterator[Any]:
        return execute_child_process_command(context, _Limited(command, level))

    context_creation_job.default_system_loggers = default_loggers  # type: ignore[attr-defined]
    multiprocess.execute_child_process_command = execute_in_child  # type: ignore[attr-defined, assignment]


class _Limited(ChildProcessCommand):
    """A command of the multiprocess executor, in whose process the same limit holds."""

    def __init__(self, command: ChildProcessCommand, level: int) -> None:
        self._command = command
        self._level = level

    def execute(self) -> Iterator[Any]:
        limit_console(self._level)
        return self._command.execute()


def _console(context: Any) -> logging.Logger:
    console: logging.Logger = colored_console_logger.logger_fn(context)
    console.addFilter(_is_news)
    return console


def _is_news(record: logging.LogRecord) -> bool:
    event: DagsterEvent | None = getattr(record, LOG_RECORD_EVENT_ATTR, None)
    if event is None or event.event_type is not DagsterEventType.RUN_FAILURE:
        return event is None or event.event_type is not DagsterEventType.RUN_CANCELED
    return event.job_failure_data.failure_reason is not RunFailureReason.STEP_FAILURE


_CONSOLE: Final = LoggerDefinition(_console, config_schema=colored_console_logger.config_schema)
