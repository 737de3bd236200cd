"""What an ECS container starts as PID 1: create missing queues when allowed to, then become the worker.

The settings come from `run_launcher` in `$DAGSTER_HOME/dagster.yaml`, or from the environment, as for
`dagster-taskiq worker start`. In the task definition, in exec form, so that SIGTERM arrives here:

    "command": ["python", "worker_entrypoint.py"]

    DAGSTER_TASKIQ_CREATE_QUEUES=1     create missing queues (needs sqs:CreateQueue; better: infra/queues.yaml)
    DAGSTER_TASKIQ_CONFIG=FILE         settings from a file, as `-y FILE`
    DAGSTER_TASKIQ_LOG_LEVEL=DEBUG     how much is logged
"""

import os
import sys
from pathlib import Path

import click

from dagster_taskiq.cli.configured import configured
from dagster_taskiq.cli.explain import explain
from dagster_taskiq.cli.options import LOG_LEVELS
from dagster_taskiq.cli.queue import create_missing
from dagster_taskiq.cli.worker import run
from dagster_taskiq.errors import SettingsError


def main() -> int:
    """Start the worker; a foreseeable error is one line on stderr and exit code 1."""
    try:
        return start()
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        click.echo(f"Error: {explanation}", err=True)
        return 1


def start() -> int:
    """Create what is missing, and work until told to stop."""
    file = os.environ.get("DAGSTER_TASKIQ_CONFIG")
    config_file = Path(file) if file else None
    log_level = os.environ.get("DAGSTER_TASKIQ_LOG_LEVEL", "INFO").upper()
    if log_level not in LOG_LEVELS:
        raise SettingsError(f"DAGSTER_TASKIQ_LOG_LEVEL must be one of {', '.join(LOG_LEVELS)}, not {log_level!r}")
    if _is_on("DAGSTER_TASKIQ_CREATE_QUEUES"):
        for name in create_missing(configured(config_file)):
            click.echo(f"created queue {name}")
    return run(config_file, log_level=log_level)


def _is_on(variable: str) -> bool:
    value = os.environ.get(variable, "0").strip().lower()
    if value not in {"0", "1", "true", "false"}:
        raise SettingsError(f"{variable} must be 1 or 0, not {value!r}")
    return value in {"1", "true"}


if __name__ == "__main__":
    sys.exit(main())
