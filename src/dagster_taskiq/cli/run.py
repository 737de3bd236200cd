"""`dagster-taskiq run`: explain runs, cancel them, and clean up after them."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from dagster_taskiq._text import clean_text
from dagster_taskiq.cli.options import soon_over
from dagster_taskiq.cli.run_explain import explain_run

if TYPE_CHECKING:
    from dagster import DagsterInstance


@click.group(short_help="Explain runs, cancel them, clean up after them.")
def run() -> None:
    """Explain a run, cancel it, or clean up after it.

    \b
    Example:
      dagster-taskiq run explain 3e4a5f60
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

    An id may be its beginning, of eight characters or more, as `worker list` shows it.

    \b
    Example:
      dagster-taskiq run cancel 3e4a5f60 --reason "wrong input file"

    Says of each run what came of it, and returns at once. Exit code 1: at least one of them could not be stopped (it
    is finished, or unknown).
    """
    from dagster_taskiq.cli.explain import explain
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.runs import describe_user, find_run_id

    stopped = []
    with open_instance() as instance:
        by = requested_by or describe_user(instance)
        for given in dict.fromkeys(map(clean_text, run_ids)):
            try:
                line, stops = _cancel(instance, find_run_id(instance, given), reason, by)
                click.echo(line)
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are to be stopped all the same
                stops = False
                click.echo(f"{given}: {explain(error) or repr(error)}", err=True)
            stopped.append(stops)
    sys.exit(0 if all(stopped) else 1)


def _cancel(instance: "DagsterInstance", run_id: str, reason: str | None, by: str) -> tuple[str, bool]:
    """One line that says what came of it, and whether the run is being stopped."""
    from dagster_taskiq.cancellation.model import CancelOutcome
    from dagster_taskiq.runs import request_cancel, status_poll_s

    outcome = request_cancel(run_id, reason=reason, requested_by=by, instance=instance)
    status = getattr(instance.get_run_by_id(run_id), "status", None)
    then = ""
    if outcome is CancelOutcome.MARKED:
        then = f"; its worker learns it from the database within {status_poll_s(instance):g} s"
    state = status.value if status is not None else "unknown"
    return f"{run_id}: {outcome.value}{then}, it is {state}", outcome.stops


@run.command("cleanup", short_help="Run the cleanup handlers of a cancelled run again.")
@click.argument("run_id")
def cleanup(run_id: str) -> None:
    """Run the cleanup handlers (on_cancel) of a cancelled run that have failed, or have not run.

    \b
    Example, after the cause of "cleanup failed" was fixed:
      dagster-taskiq run cleanup 3e4a5f60

    The run's code must be importable here, as on a worker. When all succeed, the run becomes CANCELED.
    """
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.runs import clean_up_run, find_run_id

    def print_attempt(what: Mapping[str, Any]) -> None:
        if "handler" in what:
            of = f" of {what['of']}" if what["of"] else ""
            click.echo(f"{what['handler']}{of}, attempt {what['attempt']}, {what['timeout_s']:g} s at most")

    with open_instance() as instance:
        run_id = find_run_id(instance, clean_text(run_id))
        done = clean_up_run(run_id, instance=instance, tell=print_attempt)
    click.echo(f"{run_id}: {'cleaned up' if done else 'nothing to clean up'}")


run.add_command(explain_run)
