"""`dagster-taskiq run`: cancel runs, and clean up after them."""

import sys
from collections.abc import Mapping
from typing import Any

import click

from dagster_taskiq.cli.options import soon_over


@click.group()
def run() -> None:
    """Cancel a run, or clean up after one.

    \b
    Example:
      dagster-taskiq run cancel 3e4a... --reason "wrong input file"
    """


@run.command("cancel", short_help="Stop runs, with a reason.")
@click.argument("run_ids", nargs=-1, required=True, metavar="RUN_ID...")
@click.option("-r", "--reason", help="Why: for the run's event log, its tag dagster-taskiq/cancel_reason, and its ops.")
@click.option(
    "--requested-by", help="Who cancels. Default: the user of this system; for root, in a container, the IAM identity."
)
@soon_over
def cancel(run_ids: tuple[str, ...], reason: str | None, requested_by: str | None) -> None:
    """Stop runs, as Terminate in Dagster's UI does, with a reason and an author.

    \b
    Example:
      dagster-taskiq run cancel 3e4a... --reason "wrong input file"
    Returns at once. Exit code 1: at least one of them could not be stopped (it is finished, or unknown).
    """
    from dagster import DagsterInstance

    from dagster_taskiq.runs import cancel_run, describe_user

    with DagsterInstance.get() as instance:
        by = requested_by or describe_user(instance)
        asked = {run_id: cancel_run(run_id, reason=reason, requested_by=by, instance=instance) for run_id in run_ids}
        for run_id, done in asked.items():
            status = getattr(instance.get_run_by_id(run_id), "status", None)
            state = status.value if status is not None else "unknown"
            click.echo(f"{run_id}: {'asked to stop' if done else 'nothing to stop'}, it is {state}")
    sys.exit(0 if all(asked.values()) else 1)


@run.command("cleanup", short_help="Run the cleanup handlers of a cancelled run again.")
@click.argument("run_id")
def cleanup(run_id: str) -> None:
    """Run the cleanup handlers (on_cancel) of a cancelled run that have failed, or have not run.

    \b
    Example, after the cause of "cleanup failed" was fixed:
      dagster-taskiq run cleanup 3e4a...
    The run's code must be importable here, as on a worker. When all succeed, the run becomes CANCELED.
    """
    from dagster_taskiq.runs import clean_up_run

    def print_attempt(what: Mapping[str, Any]) -> None:
        if "handler" in what:
            of = f" of {what['of']}" if what["of"] else ""
            click.echo(f"{what['handler']}{of}, attempt {what['attempt']}, {what['timeout_s']:g} s at most")

    done = clean_up_run(run_id, tell=print_attempt)
    click.echo(f"{run_id}: {'cleaned up' if done else 'nothing to clean up'}")
