"""`dagster-taskiq demo`: two real runs, terminated, with a timeline of what happened."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dagster_taskiq.local.demo import Outcome

INTERRUPTED = 130


@click.command(short_help="See two runs terminated, without any set-up.")
def demo() -> None:
    """Launch two real runs over an embedded SQS, terminate them, and show what happened and when.

    The first one enters a bakery's sales of one day into its books and rolls back. The second one ignores its interrupt
    and has to be killed. Exit code 0 only if both ended CANCELED with no process left. Needs the extra [local];
    all connections are on loopback.

    \b
    Example:
      dagster-taskiq demo
    """
    from dagster_taskiq.cli.logs import log_to_stderr
    from dagster_taskiq.local.demo import run_demo
    from dagster_taskiq.local.process_manager import StopRequested

    log_to_stderr("ERROR")
    try:
        kept = run_demo(lambda line: click.echo(f"· {line}"), show)
    except StopRequested:
        raise SystemExit(INTERRUPTED) from None
    if kept:
        click.echo("Both runs ended CANCELED, and none of their processes is left.")
    else:
        raise click.ClickException("not everything was as promised; see above")


def show(outcome: "Outcome") -> None:
    """Print the timeline of one run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("what the run's event log says")
    for moment in outcome.moments:
        table.add_row(f"{moment.ms:+.0f}", moment.what.replace("_", " "), Text(moment.text))
    console = Console()
    console.print(table)
    for complaint in outcome.complaints:
        console.print(Text(f"NOT AS PROMISED: {complaint}", style="bold red"), soft_wrap=True)
