"""What `dagster-taskiq queue status` shows: the queues of each route, and what is known of the runs that wait."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dagster_taskiq.cli.output import TableOrLines, shown
from dagster_taskiq.queue_names import DEFAULT_ROUTE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from dagster_taskiq.sqs.admin import QueueStatus
    from dagster_taskiq.storage.fleet import Hold
    from dagster_taskiq.storage.waiting import CancelledRuns, WaitingRuns


@dataclass(frozen=True, slots=True)
class RunsSeen:
    """What Dagster's database knows. Messages are not runs: some wait in Dagster's queue, others are only messages."""

    waiting: "Mapping[str, WaitingRuns]"
    """By route; one of which no run waits may be left out."""
    why: Mapping[str, str]
    """Why they wait, by route."""
    without_steps: "Sequence[str]"
    """Routes without a living worker that takes steps."""
    cancelled: "CancelledRuns"
    unusable: "Sequence[Mapping[str, Any]]"
    """Of the work queue and the steps queue."""
    hold: "Hold | None"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look has found."""

    queues: "Sequence[QueueStatus]"
    runs: RunsSeen | None
    trouble: str | None
    """Why there are no `runs`, where there is an instance."""


def to_json(seen: Seen) -> list[dict[str, Any]]:
    """For programs: one object for each queue."""

    def of_work(route: str) -> dict[str, Any]:
        runs = seen.runs
        if runs is None:
            return dict.fromkeys(("runs_waiting", "cancelled", "unusable", "hold"))
        own = {
            "runs_waiting": {**asdict(runs.waiting.get(route, WaitingRuns(0, 0.0))), "why": runs.why.get(route)},
            "hold": asdict(runs.hold) if runs.hold else None,
        }
        of_all = {"cancelled": asdict(runs.cancelled), "unusable": runs.unusable}
        return {**own, **(of_all if route == DEFAULT_ROUTE else dict.fromkeys(of_all))}

    from dagster_taskiq.storage.waiting import WaitingRuns

    return [
        {"name": one.name, **asdict(one), **(of_work(one.route) if one.role == "work" else {})} for one in seen.queues
    ]


@dataclass(frozen=True, slots=True)
class Picture:
    """For people."""

    seen: Seen
    with_trouble: bool

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield TableOrLines(_table(self.seen.queues), lambda: _lines(self.seen.queues))
        for warning in (warning for queue in self.seen.queues if queue.exists for warning in queue.warnings):
            yield Text.assemble(("warning", "yellow"), " ", warning)
        if self.seen.runs is not None:
            yield from map(shown, _said_of_runs(self.seen.runs, self.seen.queues))
        if self.with_trouble and self.seen.trouble is not None:
            yield Text(self.seen.trouble, style="yellow")


def _table(queues: "Sequence[QueueStatus]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("queue", overflow="fold")
    named = any(queue.route != DEFAULT_ROUTE for queue in queues)
    for heading in ("route", "role") if named else ("role",):
        table.add_column(heading, no_wrap=True)
    for heading in ("waiting", "in flight", "hidden for", "kept for"):
        table.add_column(heading, justify="right")
    for queue in queues:
        numbers = _numbers(queue) if queue.exists else ("missing",)
        route = (queue.route,) if named else ()
        table.add_row(*map(shown, (queue.name, *route, queue.role, *numbers)))
    return table


def _lines(queues: "Iterable[QueueStatus]") -> "Iterator[str]":
    for queue in queues:
        yield f"{queue.name}, {queue.role}"
        waiting, in_flight, hidden, kept = _numbers(queue)
        numbers = f"{waiting} wait, {in_flight} in flight; hidden for {hidden}, kept for {kept}"
        yield f"  {numbers}" if queue.exists else "  missing"


def _numbers(queue: "QueueStatus") -> tuple[str, str, str, str]:
    if not queue.known:
        return "?", "?", "?", "?"
    hidden, kept = map(_duration, (queue.visibility_timeout_s, queue.retention_s))
    return str(queue.visible), str(queue.in_flight), hidden, kept


def _said_of_runs(runs: RunsSeen, queues: "Sequence[QueueStatus]") -> "Iterator[str]":
    from dagster_taskiq.storage.waiting import all_waiting

    if runs.hold is not None:
        yield runs.hold.notice()
    visible = sum(queue.visible for queue in queues if queue.role == "work")
    waiting = all_waiting(runs.waiting.values())
    if not waiting.count:
        yield "no run waits for a worker"
    yield from _said_of_routes(runs, queues)
    if ended := waiting.of_cancelled_backfills:
        yield f"{ended} more wait and will not start: their backfill was cancelled, and Dagster's daemon ends them"
    cancelled = runs.cancelled
    if cancelled.canceling:
        nobody = f"; no worker has {cancelled.without_worker} of them" if cancelled.without_worker else ""
        yield f"being cancelled: {cancelled.canceling}{nobody}"
    if cancelled.messages:
        yield (
            f"of the {visible} messages that wait in the work queue, about {cancelled.messages} are of runs that are"
            " cancelled already; a worker that receives one deletes it"
        )
    for message in runs.unusable:
        again = datetime.fromtimestamp(message["again_at"], UTC)
        yield (
            f"message {message['id']} is of no use to any worker: received {message['received']} times,"
            f" comes again at {again:%Y-%m-%d %H:%M} UTC: {message['why']}"
        )


def _said_of_routes(runs: RunsSeen, queues: "Sequence[QueueStatus]") -> "Iterator[str]":
    """Why the runs of each route wait, and whose steps wait for nobody."""
    from dagster_taskiq.storage.waiting import HELD, no_worker

    named = any(queue.route != DEFAULT_ROUTE for queue in queues)
    for route, of_route in runs.waiting.items():
        why = runs.why.get(route, "") if runs.hold is None else HELD
        if (line := of_route.described(why)) is not None:
            yield f"route {route}: {line}" if named else line
    for queue in queues:
        if queue.role == "steps" and queue.visible and queue.route in runs.without_steps:
            steps = "1 step waits" if queue.visible == 1 else f"{queue.visible} steps wait"
            yield f"{steps} in {queue.name}: {no_worker(queue.route, 'steps')}"


def _duration(seconds: int) -> str:
    """`345600` as `4 d`."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
