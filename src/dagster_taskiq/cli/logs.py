"""Logs on stderr: for people, constant text followed by what varies; for machines, one JSON object per line."""

import atexit
import functools
import json
import logging
import os
import sys
from typing import Final, Literal

from dagster_taskiq._log_context import AddContext
from dagster_taskiq.process.output_collector import OutputCollector, timestamp

LogFormat = Literal["auto", "text", "json"]
LOG_FORMATS: Final[tuple[LogFormat, ...]] = ("auto", "text", "json")
"""For `worker_entrypoint.py`, which is outside of the package."""
_STANDARD: Final = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}
_TALKATIVE: Final = ("aioboto3", "alembic", "aiobotocore", "asyncio", "boto3", "botocore", "taskiq", "urllib3")
_SHORT: Final = {"run_id": "run", "step_key": "step"}
_ID_LENGTH: Final = 8
_TO_QUOTE: Final = frozenset(' "\n\r\t')


class TextFormatter(logging.Formatter):
    """For people: `time level text name=value …`, with the first eight characters of a run's id, and nothing twice.

    The name of the logger only for those that are not ours. The task id where no run is named.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        """The line of the record, without traceback."""
        line = super().formatMessage(record)
        extra = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if "run_id" in extra:
            extra.pop("task_id", None)
        shown = [
            f"{_SHORT.get(name, name)}={_quoted(str(value)[:_ID_LENGTH] if name == 'run_id' else str(value))}"
            for name, value in extra.items()
            if str(value) not in record.message
        ]
        named = "" if record.name.split(".")[0] == "dagster_taskiq" else f"({record.name})"
        return " ".join(filter(None, [line, *shown, named]))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if not value or set(value) & _TO_QUOTE else value


def log_to_stderr(level: str, form: LogFormat = "auto") -> None:
    """Our own loggers at the given level; libraries at INFO or higher, those that log a lot at WARNING or higher.

    `form`: `auto` is JSON in a container of ECS, whose log driver stores lines, and text everywhere else. With JSON,
    whatever this process and those below it write to stdout and stderr goes through an `OutputCollector`, to the end.
    Call it early: a process is forked.
    """
    from dagster_taskiq.metrics import on_ecs

    handler: logging.Handler
    if form == "json" or (form == "auto" and on_ecs()):
        handler = LineHandler(_collector().log_fd)
        handler.setFormatter(_json())
        handler.addFilter(AddContext())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)-7s %(message)s"))
        handler.addFilter(AddContext(without=("worker",)))  # a terminal has one of them
    ours = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(ours, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("dagster_taskiq").setLevel(ours)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(ours, logging.WARNING))


@functools.cache
def _collector() -> OutputCollector:
    collector = OutputCollector()
    atexit.register(collector.finish)
    return collector


class LineHandler(logging.Handler):
    """Writes each record in one piece, so that no other process writes into the middle of it."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            line = self.format(record).encode() + b"\n"
            while line:
                line = line[os.write(self._fd, line) :]
        except Exception:  # noqa: BLE001 - as every handler does: what cannot be logged stops nobody
            self.handleError(record)


def _json() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    class Formatter(JsonFormatter):
        def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
            return timestamp(record.created)

    return Formatter(
        "{asctime}{levelname}{name}{message}",
        style="{",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
    )
