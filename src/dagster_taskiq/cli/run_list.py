"""`dagster-taskiq run list`: what runs, what waits, where, for what, since when."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import click

from dagster_taskiq.cli.options import soon_over
from dagster_taskiq.cli.output import TableOrLines, age, is_terminal, shown
from dagster_taskiq.cli.run_filters import run_filters
from dagster_taskiq.cli.watch import show, watch_options

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from dagster_taskiq.run_query import RunQuery
    from dagster_taskiq.story.run_list import ListedRun, RunList

_ON_A_TERMINAL: Final = 50
_ELSEWHERE: Final = 10_000
_SHORT_ID: Final = 8
"""Characters of an id that all commands take for the run, when it is the only one."""


@click.command("list", short_help="Show what runs and what waits, where, for what, since when.")
@run_filters
@click.option("--all", "everything", is_flag=True, help="Also finished runs. Those of one kind: --status failure.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"So many at most. Default: {_ON_A_TERMINAL} on a terminal, else {_ELSEWHERE:,}.",
)
@watch_options
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON array.")
@soon_over
def list_runs(query: "RunQuery", *, everything: bool, limit: int | None, every_s: float | None, as_json: bool) -> None:
    """Show the runs that are not finished: first what is being cancelled, then what is at work, then what waits.

    The queue is in the order in which Dagster takes runs from it. The options mean the same runs as those of
    `run cancel`. Only Dagster's database is asked; `run explain` says more of one run. Into a pipe it writes whole ids,
    and nothing is cut. Exit code 0, also when there is none; with --watch, on Ctrl-C.

    \b
    Example:
      dagster-taskiq run list
      dagster-taskiq run list --job load --status waiting
      dagster-taskiq run list --backfill vkdhjcde --watch
      dagster-taskiq run list --all --older-than 1d --limit 20
      dagster-taskiq run list --status waiting --json | jq -r '.[].run_id'
    """
    from dagster import DagsterRunStatus

    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.run_query import UNFINISHED
    from dagster_taskiq.runs import launcher_of
    from dagster_taskiq.story.run_list import list_runs

    statuses = query.statuses or (tuple(DagsterRunStatus) if everything else UNFINISHED)
    most = limit or (_ON_A_TERMINAL if is_terminal() and not as_json else _ELSEWHERE)
    with open_instance() as instance:
        settings = launcher_of(instance).settings

        def look() -> "RunList":
            return list_runs(instance, settings, replace(query, statuses=statuses), most)

        nothing = _nothing(everything=everything, query=query)
        found = show(look, lambda found: _Picture(found, nothing), _to_json, as_json=as_json, every_s=every_s)
    if found is not None and not is_terminal():
        if found.more:
            click.echo(f"{_many(found.more, 'more run')}; --limit shows more", err=True)
        elif not found.runs:
            click.echo(nothing, err=True)


def _nothing(*, everything: bool, query: "RunQuery") -> str:
    """What no run at all means, for this question."""
    if everything or query.statuses:
        return "there is no run at all" if query.is_empty and not query.statuses else "no run matches"
    said = "nothing runs and nothing waits" if query.is_empty else "no run that matches runs or waits"
    return f"{said}; finished runs: --all, or --status failure"


def _to_json(found: "RunList") -> list[dict[str, Any]]:
    return [asdict(run) for run in found.runs]


@dataclass(frozen=True, slots=True)
class _Picture:
    found: "RunList"
    nothing: str

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        if self.found.runs:
            yield TableOrLines(_table(self.found, whole_ids=not is_terminal()), lambda: _lines(self.found))
        if is_terminal():
            yield Text(_summary(self.found) if self.found.runs else self.nothing)


def _table(found: "RunList", *, whole_ids: bool) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    partitioned = any(run.partition for run in found.runs)
    named = _uses_routes(found)
    more = (*(("partition",) if partitioned else ()), *(("route",) if named else ()))
    headings = ("run", "job, assets", *more, "status", "for", "where", "waits for")
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading == "for" else "left")
    for run in found.runs:
        cells = (
            run.run_id if whole_ids else run.run_id[:_SHORT_ID],
            run.job,
            *((run.partition,) if partitioned else ()),
            *((run.route,) if named else ()),
            run.status,
            age(found.now - run.since),
            _where(run, found),
            run.waits_for,
        )
        table.add_row(*map(shown, cells))
    return table


def _uses_routes(found: "RunList") -> bool:
    """Whether one of them is of a route with a name."""
    from dagster_taskiq.queue_names import DEFAULT_ROUTE

    return any(run.route != DEFAULT_ROUTE for run in found.runs)


def _lines(found: "RunList") -> Iterator[str]:
    named = _uses_routes(found)
    for run in found.runs:
        route = f"route {run.route}" if named else ""
        yield " ".join(filter(None, (run.run_id[:_SHORT_ID], run.job, run.partition, route)))
        where = _where(run, found)
        placed = f", {where}" if where else ""
        waits = f": {run.waits_for}" if run.waits_for else ""
        yield f"  {run.status} for {age(found.now - run.since)}{placed}{waits}"


def _where(run: "ListedRun", found: "RunList") -> str:
    if run.worker is not None:
        return run.worker if run.worker_state == "alive" else f"{run.worker} ({run.worker_state})"
    if run.position is not None:
        if _uses_routes(found):
            return f"queue of {run.route}, {run.position}"
        return f"queue, {run.position} of {found.in_queue}"
    return f"SQS {run.queue}" if run.queue is not None else ""


def _summary(found: "RunList") -> str:
    counts = ", ".join(f"{count} {status}" for status, count in found.counts.items())
    more = f"; {len(found.runs)} shown (--limit)" if found.more else ""
    return f"{_many(sum(found.counts.values()), 'run')}: {counts}{more}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
