"""Logs for people, on stderr: constant text followed by what varies."""

import logging
import sys
from typing import Final

_STANDARD: Final = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}
_TALKATIVE: Final = ("aioboto3", "alembic", "aiobotocore", "asyncio", "boto3", "botocore", "urllib3")


class WithExtra(logging.Formatter):
    """Appends what was passed in `extra` as `name=value`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        """The line of the record, without traceback."""
        extra = [f"{name}={value}" for name, value in record.__dict__.items() if name not in _STANDARD]
        return " ".join([super().formatMessage(record), *extra])


def log_to_stderr(level: str) -> None:
    """Our own loggers at the given level; libraries at INFO at the lowest, those that talk a lot at WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(WithExtra("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    ours = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(ours, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("dagster_taskiq").setLevel(ours)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(ours, logging.WARNING))
