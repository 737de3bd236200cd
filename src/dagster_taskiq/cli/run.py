"""`dagster-taskiq run`: list and explain runs, cancel them, and clean up after them."""

from collections.abc import Mapping
from typing import Any

import click

from dagster_taskiq._text import clean_text
from dagster_taskiq.cli.options import quiet
from dagster_taskiq.cli.run_cancel import cancel
from dagster_taskiq.cli.run_explain import explain_run
from dagster_taskiq.cli.run_list import list_runs
from dagster_taskiq.cli.run_reexecute import reexecute


@click.group(short_help="List runs, explain them, cancel them, clean up.")
def run() -> None:
    """List runs, explain one, cancel runs, or clean up after them.

    \b
    Example:
      dagster-taskiq run list --watch
      dagster-taskiq run explain 3e4a5f60
      dagster-taskiq run cancel 3e4a5f60 --reason "wrong input file"
      dagster-taskiq run cancel --job load --tag team=a --dry-run
    """


@run.command("cleanup", short_help="Run the cleanup handlers of a cancelled run again.")
@click.argument("run_id")
@quiet
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


run.add_command(cancel)
run.add_command(explain_run)
run.add_command(list_runs)
run.add_command(reexecute)
