"""`dagster-taskiq worker`: start a worker in the foreground."""

from pathlib import Path

import click

from dagster_taskiq.cli.options import config_option, log_level_option


@click.group()
def worker() -> None:
    """Start workers.

    \b
    Example:
      dagster-taskiq worker start -n loader-1 --concurrency 2
    """


@worker.command()
@config_option
@click.option("-n", "--name", metavar="NAME", help="Name of the worker in logs and events. Default: a new one.")
@click.option("--concurrency", type=int, metavar="N", help="Runs at a time; the setting max_concurrent_runs.")
@log_level_option
def start(config_file: Path | None, name: str | None, concurrency: int | None, log_level: str) -> None:
    """Work on runs until told to stop (SIGTERM or Ctrl-C).

    Prints one line with the word `ready` once it hears all its queues. The Dagster instance is the one in
    $DAGSTER_HOME. A second SIGTERM skips the drain.

    \b
    Example:
      dagster-taskiq worker start
      dagster-taskiq worker start -y config.yaml -n loader-1 --concurrency 2 --log-level DEBUG
    """
    raise SystemExit(run(config_file, name=name, concurrency=concurrency, log_level=log_level))


def run(config_file: Path | None, *, name: str | None, concurrency: int | None, log_level: str) -> int:
    """Start a worker and return its exit code when it has stopped."""
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.cli.logs import log_to_stderr

    log_to_stderr(log_level)
    settings = configured(config_file, max_concurrent_runs=concurrency)
    from dagster_taskiq.worker import run_worker

    def announce(worker_id: str) -> None:
        click.echo(f"worker {worker_id} is ready: it hears {settings.queue_url.rsplit('/', 1)[-1]}")

    return run_worker(settings, name=name, on_ready=announce)
