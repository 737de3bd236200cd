"""What an ECS container starts: create missing queues when allowed to, then become the worker.

The settings come from `run_launcher` in `$DAGSTER_HOME/dagster.yaml`, or from the environment, as for
`dagster-taskiq worker start`. In the task definition, in exec form, so that SIGTERM arrives here:

    "command": ["python", "worker_entrypoint.py"]

    DAGSTER_TASKIQ_STOP_TIMEOUT=120    the container's `stopTimeout`, in seconds; the drain is fitted into it
    DAGSTER_TASKIQ_ROUTE=gpu,default   the routes that it serves, in order of preference (default: the unnamed one)
    DAGSTER_TASKIQ_SERVE=runs          or `steps`, or `both` (default): what this worker takes
    DAGSTER_TASKIQ_MAX_RUNS=4          runs at a time
    DAGSTER_TASKIQ_MAX_STEPS=4         steps at a time
    DAGSTER_TASKIQ_CREATE_QUEUES=1     create missing queues (needs sqs:CreateQueue; better: infra/queues.yaml)
    DAGSTER_TASKIQ_CONFIG=FILE         settings from a file, as `-y FILE`
    DAGSTER_TASKIQ_LOG_LEVEL=DEBUG     how much is logged
    DAGSTER_TASKIQ_LOG_FORMAT=text     JSON otherwise, in a container of ECS

On ECS the worker is named after its task, and asks the agent for protection from scale-in as long as it has work. As
PID 1, in a container without an init process, it starts the worker as a child, passes signals on to it, and reaps
what jobs leave behind.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from dagster_taskiq.cli.configured import configured
from dagster_taskiq.cli.explain import explain
from dagster_taskiq.cli.logs import LOG_FORMATS, LogFormat, log_to_stderr
from dagster_taskiq.cli.options import LOG_LEVELS
from dagster_taskiq.cli.queue import create_missing
from dagster_taskiq.cli.worker import run
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import DEFAULT_DRAIN_S, Settings

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    """Start the worker; a foreseeable error is one line on stderr and exit code 1."""
    if os.getpid() == 1:
        return be_init()
    try:
        return start()
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        click.echo(f"Error: {explanation}", err=True)
        return 1


def be_init() -> int:
    """Start this program once more as a child, and do for it what PID 1 has to do; returns its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    child = os.posix_spawn(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ, setsigmask=(), setpgroup=0)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def start() -> int:
    """Create what is missing, and work until a signal comes."""
    file = os.environ.get("DAGSTER_TASKIQ_CONFIG")
    config_file = Path(file) if file else None
    log_level = _one_of("DAGSTER_TASKIQ_LOG_LEVEL", "INFO", LOG_LEVELS, str.upper)
    log_format = cast("LogFormat", _one_of("DAGSTER_TASKIQ_LOG_FORMAT", "auto", LOG_FORMATS, str.lower))
    log_to_stderr(log_level, log_format)
    overrides = from_environment(configured(config_file))
    if _one_of("DAGSTER_TASKIQ_CREATE_QUEUES", "0", ("0", "1", "true", "false"), str.lower) in {"1", "true"}:
        settings = configured(config_file, **overrides)
        for route in settings.serves:
            for name in create_missing(settings.of_route(route)):
                click.echo(f"created queue {name}")
    return run(config_file, log_level=log_level, log_format=log_format, overrides=overrides)


def from_environment(settings: Settings) -> Mapping[str, Any]:
    """The settings that the container's environment says, for a worker with these."""
    overrides: dict[str, Any] = {}
    for variable, key in (
        ("DAGSTER_TASKIQ_MAX_RUNS", "max_concurrent_runs"),
        ("DAGSTER_TASKIQ_MAX_STEPS", "max_concurrent_steps"),
        ("DAGSTER_TASKIQ_STOP_TIMEOUT", "stop_timeout_seconds"),
    ):
        if os.environ.get(variable):
            overrides[key] = os.environ[variable]
    if "stop_timeout_seconds" in overrides:
        overrides["drain_seconds"] = fitted_drain(settings, overrides["stop_timeout_seconds"])
    serve = _one_of("DAGSTER_TASKIQ_SERVE", "both", ("both", "runs", "steps"), str.lower)
    if serve != "both":
        overrides["max_concurrent_steps" if serve == "runs" else "max_concurrent_runs"] = 0
    return overrides


def fitted_drain(settings: Settings, stop_timeout: str) -> float:
    """Seconds of drain that leave a run its grace before the container is killed, but at least half of the time.

    A `drain_seconds` that the configuration sets to another value than the default stays.
    """
    try:
        stop_timeout_s = float(stop_timeout)
    except ValueError:
        raise SettingsError(f"DAGSTER_TASKIQ_STOP_TIMEOUT must be a number of seconds, not {stop_timeout!r}") from None
    if settings.drain_seconds != DEFAULT_DRAIN_S:
        return settings.drain_seconds
    return max(stop_timeout_s / 2, stop_timeout_s - settings.grace_seconds - 5)


def _one_of(variable: str, default: str, known: tuple[str, ...], normalise: Any) -> str:
    value = normalise(os.environ.get(variable, default).strip())
    if value not in known:
        raise SettingsError(f"{variable} must be one of {', '.join(known)}, not {os.environ[variable]!r}")
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
