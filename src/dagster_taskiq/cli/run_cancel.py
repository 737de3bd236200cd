"""`dagster-taskiq run cancel`: stop runs by their ids, or all those that are meant by filters."""

import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any, Final

import click

from dagster_taskiq._gc import no_collection_until_exit
from dagster_taskiq._text import clean_text
from dagster_taskiq.cli.commands import only_what_was_asked
from dagster_taskiq.cli.run_cancel_show import (
    Row,
    bar,
    named,
    print_failed,
    print_rows,
    report_as_json,
    row_of,
    summary,
)
from dagster_taskiq.cli.run_filters import Refused, duration, run_filters

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from dagster_taskiq.cancel_many import CancelReport
    from dagster_taskiq.run_query import RunQuery

_NOT_ALL: Final = 1
_ENDED_OTHERWISE: Final = 3
_NOT_ENDED: Final = 4
_INTERRUPTED: Final = 130
_LOOK_EVERY_S: Final = 0.5


def _rate(value: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/s)?", value)
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{clean_text(value)!r} is no rate; give a number of runs in one second: 5/s")
    return float(found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    everything: bool
    reason: str | None
    requested_by: str | None
    stop_source: bool
    dry_run: bool
    yes: bool
    wait: bool
    timeout_s: float | None
    per_second: float | None
    as_json: bool


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
    "--rate",
    "per_second",
    type=_rate,
    metavar="N/s",
    help="Tell so many running ones in a second, at most, because of what their ends do to other systems.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
def cancel(run_ids: tuple[str, ...], query: "RunQuery", **options: Any) -> None:
    """Stop runs, as Terminate in Dagster's UI does, with a reason and an author.

    With ids, which may be their beginnings, of eight characters or more: at once; a line says what came of each.

    With filters, of which all have to be true, or with --all: shows the runs, what will happen to them, and asks. Those
    that wait are withdrawn first, so that none starts in a slot that becomes free; then those at work are told. Runs
    that are finished are left alone; so is what was not shown. Ctrl-C stops it in the middle; again: at once.

    \b
    Example:
      dagster-taskiq run cancel 3e4a5f60 --reason "wrong input file"
      dagster-taskiq run cancel --job load --tag team=a --dry-run
      dagster-taskiq run cancel --backfill kzuxgbsf --stop --wait
      dagster-taskiq run cancel --partition-range 2026-11-01..2026-11-05 --yes
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
    asked = _Options(**options)
    _check(asked, run_ids, query)
    only_what_was_asked()
    if run_ids and not asked.wait:
        no_collection_until_exit()
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.runs import launcher_of

    try:
        with open_instance() as instance:
            launcher_of(instance)
            code = _Cancel(instance, asked).ids(run_ids) if run_ids else _Cancel(instance, asked).query(query)
    except (KeyboardInterrupt, click.Abort):  # while it reads or asks, or the second one
        click.echo("stopped by Ctrl-C; nothing more is cancelled", err=True)
        code = _INTERRUPTED
    sys.exit(code)


def _check(asked: _Options, run_ids: Sequence[str], query: "RunQuery") -> None:
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
    if asked.timeout_s is not None and not asked.wait:
        raise Refused("--timeout goes with --wait")
    if not run_ids and not asked.yes and not asked.dry_run and not sys.stdin.isatty():
        raise Refused("there is no terminal to ask on: look with --dry-run, then add --yes")


class _Cancel:
    def __init__(self, instance: "DagsterInstance", asked: _Options) -> None:
        self._instance = instance
        self._asked = asked
        self._stop = Event()
        self._json: dict[str, Any] = {}

    def ids(self, given: Sequence[str]) -> int:
        """A line for each of them, in their order."""
        from dagster_taskiq.cli.explain import explain
        from dagster_taskiq.runs import find_run_id

        wrong: dict[str, str] = {}
        run_ids: dict[str, None] = {}
        for one in dict.fromkeys(map(clean_text, given)):
            try:
                run_ids[find_run_id(self._instance, one)] = None
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are to be stopped all the same
                wrong[one] = explain(error) or repr(error)
        for one, why in wrong.items():
            click.echo(f"{one}: {why}", err=True)
        if self._asked.dry_run:
            self._show(self._rows_of(list(run_ids)))
            return self._end(_NOT_ALL if wrong else 0)
        report = self._act(list(run_ids))
        if self._asked.as_json:
            self._json |= report_as_json(report) | {"wrong": wrong}
        else:
            self._print_lines(report, list(run_ids))
        is_over = len(report.cancelled) == len(run_ids) and not wrong
        return self._end(self._waited(report, 0 if is_over else _NOT_ALL))

    def query(self, query: "RunQuery") -> int:
        """Show, ask, and act on what still matches of what was shown."""
        from dagster_taskiq.cancel_sources import check_source, stop_source
        from dagster_taskiq.run_query import UNFINISHED, find_runs
        from dagster_taskiq.run_selection import RunSelection, select_runs

        asked = self._asked
        query = query if query.statuses else replace(query, statuses=UNFINISHED)
        if asked.stop_source:
            check_source(self._instance, query)
        rows = [row_of(record) for record in find_runs(self._instance, query)]
        if rows:
            self._show(rows)
        elif not asked.as_json:
            click.echo("no run matches")
        if asked.dry_run:
            return self._end(0)
        if (rows or asked.stop_source) and not asked.yes and not self._confirmed(len(rows), query):
            click.echo("nothing was cancelled", err=True)
            return _NOT_ALL
        if asked.stop_source:
            stopped = stop_source(self._instance, query)
            self._json["stopped"] = stopped
            click.echo(f"{stopped} is stopped", err=asked.as_json)
        # Read again: it may have taken a while to answer.
        selection = select_runs(self._instance, query).among(row.run_id for row in rows) if rows else RunSelection()
        report = self._act(selection)
        if query.backfill is not None and asked.stop_source:
            stop_source(self._instance, query)
        return self._end(self._told(report, len(rows)))

    def _told(self, report: "CancelReport", selected: int) -> int:
        if self._asked.as_json:
            self._json |= {"selected": selected, **report_as_json(report)}
        elif selected:
            click.echo(summary(report))
            self._print_marked(report)
        print_failed(report.failed)
        return self._waited(report, _NOT_ALL if report.failed else 0)

    def _confirmed(self, count: int, query: "RunQuery") -> bool:
        source = next(
            (kind for kind in ("schedule", "sensor", "backfill") if getattr(query, kind) and self._asked.stop_source),
            None,
        )
        what = [f"stop the {source}"] if source else []
        what += [f"cancel {'this run' if count == 1 else f'these {count:,} runs'}"] if count else []
        question = " and ".join(what)
        return click.confirm(question[0].upper() + question[1:] + "?", err=True)

    def _act(self, which: Any) -> "CancelReport":
        from dagster_taskiq.cancel_many import cancel_runs
        from dagster_taskiq.runs import describe_user

        by = self._asked.requested_by or describe_user(self._instance)
        with self._stopped_by_ctrl_c(), bar() as shown:
            report = cancel_runs(
                self._instance,
                which,
                reason=self._asked.reason,
                requested_by=by,
                tell=shown.tell("cancelling"),
                stop=self._stop,
                per_second=self._asked.per_second,
            )
        if self._stop.is_set():
            reached = len(report.cancelled) + len(report.already_finished) + len(report.failed)
            left = f"; {len(report.left):,} are left, the same command goes on with them" if report.left else ""
            click.echo(f"stopped by Ctrl-C after {reached:,} runs{left}", err=True)
        return report

    @contextmanager
    def _stopped_by_ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C stops it after the runs that it is at, the second one at once."""

        def stop(_signal: int, _frame: object) -> None:
            self._stop.set()
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _waited(self, report: "CancelReport", code: int) -> int:
        """Wait for the ends, if that is wanted; the exit code."""
        if not self._asked.wait or self._stop.is_set():
            return code
        ended, open_ = self._wait_for(report.cancelled)
        self._json |= {"ended": ended, "not_ended": open_}
        otherwise = [run_id for run_id, status in ended.items() if status != "CANCELED"]
        if not self._asked.as_json and (ended or open_):
            statuses = {status: list(ended.values()).count(status) for status in sorted({*ended.values()})}
            counts = [f"{count:,} {status}" for status, count in statuses.items()]
            click.echo("ended: " + (", ".join(counts) or "none"))
        if otherwise:
            click.echo(f"not CANCELED: {named(otherwise)}", err=True)
        if open_:
            hint = f"`dagster-taskiq run explain {open_[0][:8]}` says what it waits for"
            click.echo(f"not ended: {named(open_)}; {hint}", err=True)
        return code or (_NOT_ENDED if open_ else _ENDED_OTHERWISE if otherwise else 0)

    def _wait_for(self, run_ids: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
        from dagster_taskiq.dagster_compat.many_runs import statuses_of
        from dagster_taskiq.run_selection import groups_of

        until = time.monotonic() + self._asked.timeout_s if self._asked.timeout_s is not None else None
        ended: dict[str, str] = {}
        open_ = list(run_ids)
        with self._stopped_by_ctrl_c(), bar() as shown:
            while open_:
                for some in groups_of(500, open_):
                    found = statuses_of(self._instance, some)
                    ended |= {run_id: status.value for run_id, status in found.items() if status in FINISHED_STATUSES}
                    ended |= {run_id: "deleted" for run_id in some if run_id not in found}
                open_ = [run_id for run_id in open_ if run_id not in ended]
                shown.show("waiting for their ends", len(ended), len(run_ids))
                late = until is not None and time.monotonic() >= until
                if not open_ or late or self._stop.wait(_LOOK_EVERY_S):
                    break
        return ended, open_

    def _end(self, code: int) -> int:
        if self._asked.as_json:
            click.echo(json.dumps(self._json, indent=2))
        return _INTERRUPTED if self._stop.is_set() else code

    def _rows_of(self, run_ids: Sequence[str]) -> list[Row]:
        from dagster import RunsFilter

        if not run_ids:
            return []
        return [row_of(record) for record in self._instance.get_run_records(RunsFilter(run_ids=list(run_ids)))]

    def _show(self, rows: Sequence[Row]) -> None:
        if self._asked.dry_run:
            self._json |= {"dry_run": True, "selected": len(rows), "runs": [row.as_json() for row in rows]}
        if rows and not (self._asked.as_json and (self._asked.dry_run or self._asked.yes)):
            print_rows(rows, time.time(), err=self._asked.as_json)

    def _print_lines(self, report: "CancelReport", run_ids: Sequence[str]) -> None:
        from dagster_taskiq.cancellation.model import CancelOutcome
        from dagster_taskiq.dagster_compat.many_runs import statuses_of
        from dagster_taskiq.runs import status_poll_s

        outcomes: dict[str, CancelOutcome] = {
            **dict.fromkeys(report.cancelled, CancelOutcome.ASKED),
            **dict.fromkeys(report.withdrawn, CancelOutcome.WITHDRAWN),
            **dict.fromkeys(report.marked, CancelOutcome.MARKED),
            **dict.fromkeys(report.already_finished, CancelOutcome.NOTHING),
        }
        said: Mapping[str, str] = {outcome.value: outcome.value for outcome in CancelOutcome}
        statuses = statuses_of(self._instance, run_ids)
        for run_id in run_ids:
            if run_id in report.failed and report.failed[run_id] not in said:
                click.echo(f"{run_id}: {report.failed[run_id]}", err=True)
            elif run_id in outcomes or run_id in report.failed:
                what = outcomes[run_id].value if run_id in outcomes else report.failed[run_id]
                if run_id in report.marked:
                    poll_s = status_poll_s(self._instance)
                    what += f"; its worker learns it from the database within {poll_s:g} s"
                status = statuses.get(run_id)
                click.echo(f"{run_id}: {what}, it is {status.value if status is not None else 'unknown'}")

    def _print_marked(self, report: "CancelReport") -> None:
        from dagster_taskiq.runs import status_poll_s

        if report.marked:
            click.echo(
                f"the cancel message could not be sent for {len(report.marked):,} of them; their workers learn it from"
                f" the database within {status_poll_s(self._instance):g} s",
                err=True,
            )
