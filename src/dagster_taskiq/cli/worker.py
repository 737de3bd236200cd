"""`dagster-taskiq worker`: start a worker in the foreground."""

from pathlib import Path

import click

from dagster_taskiq.cli.options import config_option, log_level_option


@click.group()
def worker() -> None:
    """Start workers.

    \b
    Example:
      dagster-taskiq worker start -n loader-1 --max-runs 2 --max-steps 8
    """


@worker.command()
@config_option
@click.option("-n", "--name", metavar="NAME", help="Name of the worker in logs and events. Default: a new one.")
@click.option("--max-runs", type=int, metavar="N", help="Runs at a time; the setting max_concurrent_runs.")
@click.option("--max-steps", type=int, metavar="N", help="Steps at a time; the setting max_concurrent_steps.")
@click.option("--runs-only", is_flag=True, help="Take no steps: for a fleet of its own that serves runs.")
@click.option("--steps-only", is_flag=True, help="Take no runs: for a fleet of its own that serves steps.")
@log_level_option
def start(
    config_file: Path | None,
    name: str | None,
    max_runs: int | None,
    max_steps: int | None,
    log_level: str,
    *,
    runs_only: bool,
    steps_only: bool,
) -> None:
    """Work on runs and steps until told to stop (SIGTERM or Ctrl-C).

    Runs and steps have slots of their own, so that runs that wait for their steps never take the steps' place.
    Prints one line with the word `ready` once it hears all its queues. The Dagster instance is the one in
    $DAGSTER_HOME. A second SIGTERM skips the drain.

    \b
    Example:
      dagster-taskiq worker start
      dagster-taskiq worker start -y config.yaml -n loader-1 --max-runs 2 --log-level DEBUG
      dagster-taskiq worker start --steps-only --max-steps 8
    """
    if runs_only and steps_only:
        raise click.UsageError("--runs-only and --steps-only exclude each other; leave both out to serve both queues")
    if (runs_only and max_steps) or (steps_only and max_runs):
        raise click.UsageError("--runs-only goes with --max-runs, and --steps-only with --max-steps")
    max_runs, max_steps = (0 if steps_only else max_runs), (0 if runs_only else max_steps)
    raise SystemExit(run(config_file, name=name, max_runs=max_runs, max_steps=max_steps, log_level=log_level))


def run(
    config_file: Path | None,
    *,
    name: str | None = None,
    max_runs: int | None = None,
    max_steps: int | None = None,
    log_level: str,
) -> int:
    """Start a worker and return its exit code when it has stopped."""
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.cli.logs import log_to_stderr

    log_to_stderr(log_level)
    settings = configured(config_file, max_concurrent_runs=max_runs, max_concurrent_steps=max_steps)
    from dagster_taskiq.worker import run_worker

    def announce(worker_id: str) -> None:
        served = [settings.queue_url] if settings.max_concurrent_runs else []
        served += [settings.steps_queue_url] if settings.max_concurrent_steps else []
        names = " and ".join(url.rstrip("/").rpartition("/")[2] for url in served)
        click.echo(f"worker {worker_id} is ready: it hears {names}")

    return run_worker(settings, name=name, on_ready=announce)
