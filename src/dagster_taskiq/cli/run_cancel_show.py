"""What `run cancel` shows: the runs that it is about, how far it is, and what became of them."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dagster import RunRecord
    from rich.console import Console
    from rich.table import Table

    from dagster_taskiq.cancel_many import CancelProgress, CancelReport

_MOST_ROWS: Final = 20
_FIRST_ROWS: Final = 10
_MOST_GROUPS: Final = 10
_MOST_NAMED: Final = 10
_WIDE: Final = 80
_PIPE_WIDTH: Final = 500
_FIXED: Final = 8 + len("NOT_STARTED") + len("59 min") + 3 * 3 + 2
"""Columns of a terminal that the table needs besides job and partition: run, status, age, and what is between them."""
_FIXED_WIDE: Final = _FIXED + len("withdrawn, or told") + 3
_WITHDRAWN: Final = "withdrawn"
_MAYBE: Final = "withdrawn, or told"
_TOLD: Final = "told to stop"
_AGAIN: Final = "told again"
_NOTHING: Final = "nothing"
HAPPENS: Final[Mapping[str, str]] = {
    "QUEUED": _WITHDRAWN,
    "NOT_STARTED": _MAYBE,
    "STARTING": _MAYBE,
    "STARTED": _TOLD,
    "CANCELING": _AGAIN,
}
"""By the status of a run, what cancelling does to it."""
_SAID: Final[Mapping[str, tuple[str, str]]] = {
    _WITHDRAWN: ("waits and is withdrawn before it starts", "wait and are withdrawn before they start"),
    _MAYBE: ("is starting: withdrawn, unless a worker has it", "are starting: withdrawn, unless a worker has them"),
    _TOLD: ("is at work and is told to stop", "are at work and are told to stop"),
    _AGAIN: ("is stopping and is told again", "are stopping and are told again"),
    _NOTHING: ("is finished: nothing to stop", "are finished: nothing to stop"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One run, as it is shown. `created`: seconds since the epoch."""

    run_id: str
    job: str
    assets: str
    partition: str
    status: str
    created: float

    @property
    def happens(self) -> str:
        """What cancelling does to it."""
        return HAPPENS.get(self.status, _NOTHING)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run_id": self.run_id,
            "job": self.job,
            "assets": self.assets or None,
            "partition": self.partition or None,
            "status": self.status,
            "created": datetime.fromtimestamp(self.created, UTC).isoformat(timespec="seconds"),
            "happens": self.happens,
        }


def row_of(record: "RunRecord") -> Row:
    """What is shown of a run."""
    from dagster_taskiq.run_query import partition_of
    from dagster_taskiq.storage.workers import describe_assets

    run = record.dagster_run
    return Row(
        run.run_id,
        run.job_name,
        describe_assets(run),
        partition_of(run),
        run.status.value,
        record.create_timestamp.timestamp(),
    )


def print_rows(rows: "Sequence[Row]", now: float, *, err: bool) -> None:
    """What will happen to how many, and the runs: all of twenty, or the first ten and how many of which kind follow."""
    from rich.console import Console

    console = Console(stderr=err)
    if not console.is_terminal and console.width == _WIDE:
        console = Console(stderr=err, width=_PIPE_WIDTH)  # a pipe has no width
    counts = Counter(row.happens for row in rows)
    for happens, (one, many) in _SAID.items():
        if counts[happens]:
            console.print(
                f"{counts[happens]:,} {one if counts[happens] == 1 else many}", highlight=False, soft_wrap=False
            )
    shown = rows if len(rows) <= _MOST_ROWS else rows[:_FIRST_ROWS]
    console.print(_table(shown, console, now))
    if len(shown) < len(rows):
        _print_rest(console, rows[len(shown) :])


def _table(rows: "Sequence[Row]", console: "Console", now: float) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dagster_taskiq.story.text import duration, one_line

    wide = console.width >= _WIDE
    left = console.width - (_FIXED_WIDE if wide else _FIXED)
    longest = max((len(row.partition) for row in rows), default=0)
    # Of what is left, a partition gets the half at most, and the name of the job the rest.
    partition_width = min(longest, max(left // 2, 8))
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True)
    table.add_column(
        "job or assets", no_wrap=True, overflow="ellipsis", max_width=max(8, left - partition_width - 3 * bool(longest))
    )
    if longest:
        table.add_column("partition", no_wrap=True, overflow="ellipsis", max_width=partition_width)
    for heading in ("status", "age", "what happens")[: 3 if wide else 2]:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        partition = [one_line(row.partition)] if longest else []
        age = _coarse(duration(now - row.created))
        cells = [row.run_id[:8], one_line(row.assets or row.job), *partition, row.status, age]
        table.add_row(*map(Text, [*cells, row.happens] if wide else cells))
    return table


def _coarse(duration: str) -> str:
    """ "2 h 3 min" as "2 h"."""
    return " ".join(duration.split()[:2])


def _print_rest(console: "Console", rows: "Sequence[Row]") -> None:
    from rich.text import Text

    from dagster_taskiq.story.text import one_line

    console.print(f"… and {len(rows):,} more:", highlight=False)
    groups = Counter((row.assets or row.job, row.status) for row in rows).most_common()
    for (job, status), count in groups[:_MOST_GROUPS]:
        line = Text(f"  {count:>7,}  {status:<11}  {one_line(job)}")
        line.truncate(console.width, overflow="ellipsis")
        console.print(line)
    if len(groups) > _MOST_GROUPS:
        left = sum(count for _, count in groups[_MOST_GROUPS:])
        console.print(f"  {left:>7,}  of {len(groups) - _MOST_GROUPS} other kinds", highlight=False)


def summary(report: "CancelReport") -> str:
    """What became of how many, in one line."""
    counts = {
        "cancelled while waiting": len(report.withdrawn),
        "told to stop while running": len(report.told),
        "already finished": len(report.already_finished),
        "not found": len(report.not_found),
        "failed": len(report.failed),
        "not reached": len(report.left),
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "no run was left to cancel"


def report_as_json(report: "CancelReport") -> dict[str, Any]:
    """For programs: the ids of every kind."""
    return {
        "cancelled_while_waiting": list(report.withdrawn),
        "told_while_running": list(report.told),
        "without_message": list(report.marked),
        "already_finished": list(report.already_finished),
        "not_found": list(report.not_found),
        "failed": dict(report.failed),
        "not_reached": list(report.left),
    }


def named(run_ids: Iterable[str]) -> str:
    """The first ten ids, and how many follow."""
    ids = list(run_ids)
    more = f" and {len(ids) - _MOST_NAMED:,} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(ids[:_MOST_NAMED]) + more


def print_failed(failed: Mapping[str, str]) -> None:
    """Why, once for each reason, and of which runs."""
    from dagster_taskiq.story.text import one_line

    by_reason: dict[str, list[str]] = {}
    for run_id, why in failed.items():
        by_reason.setdefault(one_line(why, 300), []).append(run_id)
    for why, run_ids in by_reason.items():
        click.echo(f"failed: {why}: {named(run_ids)}", err=True)


class Bar:
    """A progress bar on stderr. `progress`: rich's; None shows nothing."""

    def __init__(self, progress: Any = None) -> None:
        self._progress = progress
        self._task: Any = progress.add_task("", total=None, visible=False) if progress is not None else None

    def tell(self, what: str) -> "Callable[[CancelProgress], None]":
        """A `tell` for `cancel_runs`."""
        return lambda now: self.show(what, now.done, now.of)

    def show(self, what: str, done: float, of: float) -> None:
        """Now it is so far."""
        if self._progress is not None:
            self._progress.update(self._task, description=what, completed=done, total=of, visible=True)


@contextmanager
def bar() -> "Iterator[Bar]":
    """A bar for as long as something lasts; without a terminal there is none, and rich is not imported."""
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress)
