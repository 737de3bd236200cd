"""`dagster-taskiq run cancel`: stop runs by their ids, or all those that are meant by filters."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from dagster_taskiq._gc import no_collection_until_exit
from dagster_taskiq._text import clean_text
from dagster_taskiq.cli.options import quiet
from dagster_taskiq.cli.run_cancel_do import INTERRUPTED, Cancel, Options
from dagster_taskiq.cli.run_filters import Refused, duration, run_filters

if TYPE_CHECKING:
    from dagster_taskiq.run_query import RunQuery


_FASTEST: Final = 1_000_000


def _rate(value: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/s)?", value)
    if found is None or not 0 < float(found[1]) <= _FASTEST:
        raise click.BadParameter(f"{clean_text(value)!r} is no rate; give a number of runs in one second: 5/s")
    return float(found[1])


@click.command("cancel", short_help="Stop runs, by their ids or by what they have in common.")
@click.argument("run_ids", nargs=-1, metavar="[RUN_ID]...")
@click.option("--all", "everything", is_flag=True, help="All runs that are not finished.")
@run_filters
@click.option("-r", "--reason", help="Why: for the run's event log, its tag dagster-taskiq/cancel_reason, and its ops.")
@click.option(
    "--requested-by", help="Who cancels. Default: the user of this system; for root, in a container, the IAM identity."
)
@click.option(
    "--stop", "stop_source", is_flag=True, help="First stop the schedule, sensor or backfill: it launches no more."
)
@click.option("--dry-run", is_flag=True, help="Only show which runs are meant, and what would happen to them.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--wait", is_flag=True, help="Return when they have ended, not when they have been told.")
@click.option("--timeout", "timeout_s", type=duration, metavar="TIME", help="With --wait: so long at most, like 5m.")
@click.option(
    "--until",
    "until_s",
    type=duration,
    metavar="TIME",
    help="A fence: for so long, also cancel what is launched and matches, before it starts.",
)
@click.option(
    "--rate",
    "per_second",
    type=_rate,
    metavar="N/s",
    help="Tell so many running ones in a second, at most, because of what their ends do to other systems.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
@quiet
def cancel(run_ids: tuple[str, ...], query: "RunQuery", **options: Any) -> None:
    """Stop runs, as Terminate in Dagster's UI does, with a reason and an author.

    With ids, which may be their beginnings, of eight characters or more: at once; a line says what came of each.

    With filters, of which all have to be true, or with --all: shows the runs, what will happen to them, and asks. Those
    that wait are withdrawn first, so that none starts in a slot that becomes free; then those at work are told. Runs
    that are finished are left alone; so is what was not shown, unless --until says otherwise, or a backfill launches it
    while --stop stops it. Ctrl-C stops it in the middle; again: at once.

    \b
    Example:
      dagster-taskiq run cancel 3e4a5f60 --reason "wrong input file"
      dagster-taskiq run cancel --job load --tag team=a --dry-run
      dagster-taskiq run cancel --backfill kzuxgbsf --stop --wait
      dagster-taskiq run cancel --partition-range 2026-11-01..2026-11-05 --yes
      dagster-taskiq run cancel --sensor new_files --until 60s
      dagster-taskiq run cancel --where "tags['team'] == 'a' and age > hours(2)"

    \b
    Exit codes:
      0    all of them are stopped, or told to; or no run matches
      1    at least one is not: it failed, or, of ids, it is finished or unknown
           or: the answer was no
      2    it is not clear which runs are meant: nothing was done
      3    with --wait: at least one has ended otherwise than CANCELED
      4    with --timeout: at least one has not ended
      130  stopped by Ctrl-C
    """
    asked = Options(**options)
    _check(asked, run_ids, query)
    if run_ids and not asked.wait:
        no_collection_until_exit()
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.runs import launcher_of

    try:
        with open_instance() as instance:
            launcher_of(instance)
            code = Cancel(instance, asked).ids(run_ids) if run_ids else Cancel(instance, asked).query(query)
    except (KeyboardInterrupt, click.Abort):  # while it reads or asks, or the second one
        click.echo("stopped by Ctrl-C; nothing more is cancelled", err=True)
        code = INTERRUPTED
    sys.exit(code)


def _has_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()  # None: started with it closed


def _check(asked: Options, run_ids: Sequence[str], query: "RunQuery") -> None:
    from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES

    given = query.statuses != () or not query.is_empty
    if not run_ids and not given and not asked.everything:
        raise Refused("nothing says which runs: give ids, or filters like --job and --tag, or --all")
    if run_ids and (given or asked.everything):
        raise Refused("ids and filters exclude each other: give either")
    if asked.everything and given:
        raise Refused("--all means every run that is not finished; leave it out, or the filters")
    if query.statuses and set(query.statuses) <= set(FINISHED_STATUSES):
        raise Refused("runs with this --status are finished: nothing can be cancelled")
    if asked.stop_source and (query.schedule, query.sensor, query.backfill) == (None, None, None):
        raise Refused("--stop needs --schedule, --sensor or --backfill: what is it to stop?")
    if asked.until_s is not None and (run_ids or query.statuses or query.older_than_s is not None):
        raise Refused("--until is for runs that are launched from now on: it goes with no id, --status or --older-than")
    if asked.timeout_s is not None and not asked.wait:
        raise Refused("--timeout goes with --wait")
    if not run_ids and not asked.yes and not asked.dry_run and not _has_terminal():
        raise Refused("there is no terminal to ask on: look with --dry-run, then add --yes")
