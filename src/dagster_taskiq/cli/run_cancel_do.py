"""How `run cancel` goes about it: by ids or by a query; Ctrl-C; the ends; the exit code."""

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any, Final

import click

from dagster_taskiq._text import clean_text
from dagster_taskiq.cli.run_cancel_show import (
    Bar,
    Row,
    bar,
    named,
    print_failed,
    print_rows,
    report_as_json,
    row_of,
    summary,
)

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from dagster_taskiq.cancel_many import CancelReport
    from dagster_taskiq.run_query import RunQuery

NOT_ALL: Final = 1
ENDED_OTHERWISE: Final = 3
NOT_ENDED: Final = 4
INTERRUPTED: Final = 130
_LOOK_EVERY_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for. Times are seconds."""

    everything: bool
    reason: str | None
    requested_by: str | None
    stop_source: bool
    dry_run: bool
    yes: bool
    wait: bool
    timeout_s: float | None
    until_s: float | None
    per_second: float | None
    as_json: bool


class Cancel:
    """One command. Its methods return the exit code."""

    def __init__(self, instance: "DagsterInstance", asked: Options) -> None:
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
        cleaned = list(dict.fromkeys(map(clean_text, given)))
        whole = self._whole_ids(cleaned)
        for one in cleaned:
            try:
                run_ids[one if one in whole else find_run_id(self._instance, one)] = None
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are to be stopped all the same
                wrong[one] = explain(error) or repr(error)
        for one, why in wrong.items():
            click.echo(f"{one}: {why}", err=True)
        if self._asked.dry_run:
            self._show(self._rows_of(list(run_ids)))
            return self._end(NOT_ALL if wrong else 0)
        report = self._act(list(run_ids))
        if self._asked.as_json:
            self._json |= report_as_json(report) | {"wrong": wrong}
        else:
            self._print_lines(report, list(run_ids))
        is_over = len(report.cancelled) == len(run_ids) and not wrong
        return self._end(self._waited(report, 0 if is_over else NOT_ALL))

    def _whole_ids(self, given: Sequence[str]) -> set[str]:
        """Those that are ids of runs, in a query for 500 of them. Empty when it fails: then each is asked for."""
        from dagster_taskiq.dagster_compat.many_runs import statuses_of
        from dagster_taskiq.run_selection import groups_of

        try:
            return {run_id for some in groups_of(500, given) for run_id in statuses_of(self._instance, some)}
        except Exception:  # noqa: BLE001 - whatever it is, what can be stopped is to be stopped
            return set()

    def query(self, query: "RunQuery") -> int:
        """Show, ask, and act on what still matches of what was shown; behind a fence, on all that matches."""
        from dagster_taskiq.cancel_sources import check_source, stop_source
        from dagster_taskiq.run_query import UNFINISHED, find_runs
        from dagster_taskiq.run_selection import RunSelection, select_runs

        asked = self._asked
        if asked.stop_source:
            check_source(self._instance, query)
        unfinished = query if query.statuses else replace(query, statuses=UNFINISHED)
        rows = [row_of(record) for record in find_runs(self._instance, unfinished)]
        self._show(rows)
        if asked.dry_run:
            return self._end(0)
        wanted = bool(rows) or asked.stop_source or asked.until_s is not None
        if wanted and not asked.yes and not self._confirmed(len(rows), query):
            click.echo("nothing was cancelled", err=True)
            return NOT_ALL
        if asked.stop_source:
            self._json["stopped"] = stopped = stop_source(self._instance, query)
            click.echo(f"{stopped} is stopped", err=asked.as_json)
        shown = frozenset(row.run_id for row in rows)
        if asked.until_s is not None:
            report = self._act_behind_fence(query, asked.until_s)
        else:
            # Read again: it may have taken a while to answer.
            report = self._act(select_runs(self._instance, query).among(shown) if rows else RunSelection())
        if query.backfill is not None and asked.stop_source:
            report = self._see_it_stays_cancelled(query, report)
        return self._end(self._told(report, shown))

    def _told(self, report: "CancelReport", shown: "frozenset[str]") -> int:
        came = [run_id for run_id in report.cancelled if run_id not in shown]
        if self._asked.as_json:
            self._json |= {"selected": len(shown), **report_as_json(report)}
            self._json |= {"came_meanwhile": came} if came or self._asked.until_s is not None else {}
        elif shown or came or self._asked.until_s is not None:
            click.echo(summary(report) + (f"; {len(came):,} of them came meanwhile" if came else ""))
            self._print_marked(report)
        print_failed(report.failed)
        return self._waited(report, NOT_ALL if report.failed else 0)

    def _confirmed(self, count: int, query: "RunQuery") -> bool:
        source = next(
            (kind for kind in ("schedule", "sensor", "backfill") if getattr(query, kind) and self._asked.stop_source),
            None,
        )
        what = [f"stop the {source}"] if source else []
        what += [f"cancel {'this run' if count == 1 else f'these {count:,} runs'}"] if count else []
        if self._asked.until_s is not None:
            what.append(f"cancel what comes within {self._asked.until_s:g} s")
        question = " and ".join(what)
        return click.confirm(question[0].upper() + question[1:] + "?", err=True)

    def _act(self, which: Any) -> "CancelReport":
        from dagster_taskiq.cancel_many import cancel_runs

        with self._stopped_by_ctrl_c(), bar() as shown:
            return self._reached(cancel_runs(self._instance, which, **self._how(shown)))

    def _act_behind_fence(self, query: "RunQuery", hold_s: float) -> "CancelReport":
        from dagster_taskiq.cancel_fence import FenceProgress, cancel_behind_fence

        def watch(now: FenceProgress) -> None:
            shown.show(f"fence, {now.left_s:.0f} s left, {now.caught:,} caught", now.of_s - now.left_s, now.of_s)

        click.echo(f"what comes is cancelled for {hold_s:g} s; Ctrl-C ends that", err=True)
        with self._stopped_by_ctrl_c(), bar() as shown:
            report = cancel_behind_fence(self._instance, query, hold_s=hold_s, watch=watch, **self._how(shown))
            return self._reached(report)

    def _see_it_stays_cancelled(self, query: "RunQuery", report: "CancelReport") -> "CancelReport":
        from dagster_taskiq.cancel_sources import stay_cancelled

        with self._stopped_by_ctrl_c(), bar() as shown:
            shown.show("looking whether the backfill launches more", len(report.cancelled), len(report.cancelled))
            return stay_cancelled(self._instance, query, report, **self._how(shown))

    def _how(self, shown: Bar) -> dict[str, Any]:
        from dagster_taskiq.runs import describe_user

        return {
            "reason": self._asked.reason,
            "requested_by": self._asked.requested_by or describe_user(self._instance),
            "tell": shown.tell("cancelling"),
            "stop": self._stop,
            "per_second": self._asked.per_second,
        }

    def _reached(self, report: "CancelReport") -> "CancelReport":
        if self._stop.is_set():
            reached = len(report.cancelled) + len(report.already_finished) + len(report.failed)
            left = f"; {len(report.left):,} are left, the same command goes on with them" if report.left else ""
            fence = "; the fence is down" if self._asked.until_s is not None else ""
            click.echo(f"stopped by Ctrl-C after {reached:,} runs{left}{fence}", err=True)
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
            hint = f"`dagster-taskiq run explain {otherwise[0][:8]}` says why"
            click.echo(f"not CANCELED: {named(otherwise)}; {hint}", err=True)
        if open_:
            hint = f"`dagster-taskiq run explain {open_[0][:8]}` says what it waits for"
            click.echo(f"not ended: {named(open_)}; {hint}", err=True)
        return code or (NOT_ENDED if open_ else ENDED_OTHERWISE if otherwise else 0)

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
        return INTERRUPTED if self._stop.is_set() else code

    def _rows_of(self, run_ids: Sequence[str]) -> list[Row]:
        from dagster import RunsFilter

        if not run_ids:
            return []
        return [row_of(record) for record in self._instance.get_run_records(RunsFilter(run_ids=list(run_ids)))]

    def _show(self, rows: Sequence[Row]) -> None:
        if self._asked.dry_run:
            self._json |= {"dry_run": True, "selected": len(rows), "runs": [row.as_json() for row in rows]}
        if not rows and not self._asked.as_json:
            click.echo("no run matches")
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
