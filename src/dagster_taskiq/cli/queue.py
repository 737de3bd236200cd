"""`dagster-taskiq queue`: create the queues, show their status."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from dagster_taskiq.cli.options import config_option, soon_over
from dagster_taskiq.cli.output import TableOrLines, shown
from dagster_taskiq.cli.watch import show, watch_options

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from dagster_taskiq.settings import Settings
    from dagster_taskiq.sqs.admin import QueueStatus
    from dagster_taskiq.storage.fleet import Hold
    from dagster_taskiq.storage.heartbeats import Heartbeat
    from dagster_taskiq.storage.waiting import CancelledRuns, WaitingRuns

T = TypeVar("T")
_ANSWER_S: Final = 15.0
"""For the database; the queues are shown without it."""


@click.group()
def queue() -> None:
    """Create and inspect the queues.

    \b
    Example:
      dagster-taskiq queue create && dagster-taskiq queue status
    """


@queue.command(short_help="Create those of the queues that are missing.")
@config_option
@click.option(
    "--route",
    "routes",
    metavar="ROUTE",
    multiple=True,
    help="A route whose queues are to be there; several, also with commas. Default: the unnamed one.",
)
@soon_over
def create(config_file: Path | None, routes: tuple[str, ...]) -> None:
    """Create those of the three queues that are missing: work, steps, cancels. Existing ones are not changed.

    In production, create them with infra/queues.yaml: it adds permissions and allows only TLS.

    \b
    Example:
      dagster-taskiq queue create
      dagster-taskiq queue create --route gpu
      dagster-taskiq queue create -y config.yaml
    """
    from dagster_taskiq._route_rules import routes_of
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
    from dagster_taskiq.sqs.admin import queue_urls

    settings = configured(config_file)
    for route in routes_of("--route", ",".join(routes or (DEFAULT_ROUTE,))):
        of_route = settings.of_route(route)
        created = create_missing(of_route)
        for url in queue_urls(of_route.queue_url).values():
            name = queue_name(url)
            click.echo(f"{name}: {'created' if name in created else 'exists'}")


def create_missing(settings: "Settings") -> tuple[str, ...]:
    """Create the queues that are missing, and return their names."""
    from dagster_taskiq.sqs.admin import create_queues

    return _ask(
        settings,
        lambda client: create_queues(
            client, settings.queue_url, visibility_timeout_s=settings.visibility_timeout_seconds
        ),
    )


@queue.command(short_help="What waits in each queue, and why.")
@config_option
@watch_options
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON array.")
@soon_over
def status(config_file: Path | None, *, every_s: float | None, as_json: bool) -> None:
    """Show how many messages wait in each queue, and what is wrong with it. Exit code 1 when a queue is missing.

    Where there is a $DAGSTER_HOME, also how many runs wait for a worker, for how long, and why; how many of them, and
    of the messages, are cancelled already and will not start; and which messages living workers have found to be of no
    use: those come again, ever more rarely, until they expire or are purged.
    With --json that is in `runs_waiting`, `cancelled` and `unusable` of the work queue; null: the database was not
    asked, or did not answer. A fleet that is held (`fleet hold`) says so, with --json in `hold`.

    \b
    Example:
      dagster-taskiq queue status
      dagster-taskiq queue status --watch
      dagster-taskiq queue status --json | jq '.[] | {name, visible}'
    """
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.errors import QueueMissing

    settings = configured(config_file)

    def draw(seen: _Seen) -> _Picture:
        return _Picture(seen, with_trouble=every_s is not None)

    seen = show(lambda: _look(settings), draw, _to_json, as_json=as_json, every_s=every_s)
    if seen is None:
        return
    if seen.trouble is not None:
        click.echo(seen.trouble, err=True)
    missing = [warning for queue in seen.queues if not queue.exists for warning in queue.warnings]
    if missing:
        raise QueueMissing(missing[0])


@dataclass(frozen=True, slots=True)
class _Runs:
    """What Dagster's database knows. Messages are not runs: some wait in Dagster's queue, others are only messages."""

    waiting: "WaitingRuns"
    why: str
    cancelled: "CancelledRuns"
    unusable: "Sequence[Mapping[str, Any]]"
    """Of the work queue and the steps queue."""
    hold: "Hold | None"


@dataclass(frozen=True, slots=True)
class _Seen:
    queues: "Sequence[QueueStatus]"
    runs: _Runs | None
    trouble: str | None
    """Why there are no `runs`, where there is an instance."""


def _look(settings: "Settings") -> _Seen:
    """Raises what SQS answers; the database is asked besides, with a bound of its own."""
    import asyncio

    from dagster_taskiq._lane import Lane
    from dagster_taskiq.cli.explain import explain
    from dagster_taskiq.sqs.admin import queue_status

    queues = _ask(settings, lambda client: queue_status(client, settings.queue_url))
    visible = next((one.visible for one in queues if one.role == "work" and one.exists and one.known), None)
    lane = Lane("the database", _ANSWER_S)
    try:
        return _Seen(queues, asyncio.run(lane.call(_look_at_runs, settings, visible)), None)
    except Exception as error:  # noqa: BLE001 - what was asked for are the queues, and they have answered
        return _Seen(queues, None, f"runs that wait: {explain(error) or repr(error)}")
    finally:
        lane.close()


def _look_at_runs(settings: "Settings", visible: int | None) -> _Runs | None:
    """None where no instance is configured. Raises what Dagster and its database raise."""
    import os

    if not os.environ.get("DAGSTER_HOME"):
        return None
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.queue_names import queue_name
    from dagster_taskiq.storage.fleet import read_hold
    from dagster_taskiq.storage.heartbeats import Heartbeats
    from dagster_taskiq.storage.waiting import cancelled_runs, waiting_runs, why_runs_wait
    from dagster_taskiq.storage.workers import list_workers

    with open_instance() as instance:
        hold = read_hold(instance)
        living = Heartbeats.of_runs(instance, settings).living()
        workers = list_workers(instance, settings)
        return _Runs(
            waiting_runs(instance),
            hold.described() if hold is not None else why_runs_wait(workers, settings),
            cancelled_runs(instance, workers, visible),
            _unusable(living, queue_name(settings.queue_url)),
            hold,
        )


def _to_json(seen: _Seen) -> list[dict[str, Any]]:
    runs = seen.runs
    of_work = {
        "runs_waiting": runs and {**asdict(runs.waiting), "why": runs.why},
        "cancelled": runs and asdict(runs.cancelled),
        "unusable": runs and runs.unusable,
        "hold": asdict(runs.hold) if runs and runs.hold else None,
    }
    return [{"name": one.name, **asdict(one), **(of_work if one.role == "work" else {})} for one in seen.queues]


@dataclass(frozen=True, slots=True)
class _Picture:
    seen: _Seen
    with_trouble: bool

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield TableOrLines(_table(self.seen.queues), lambda: _lines(self.seen.queues))
        for warning in (warning for queue in self.seen.queues if queue.exists for warning in queue.warnings):
            yield Text.assemble(("warning", "yellow"), " ", warning)
        if self.seen.runs is not None:
            visible = sum(queue.visible for queue in self.seen.queues if queue.role == "work")
            yield from map(shown, _said_of_runs(self.seen.runs, visible))
        if self.with_trouble and self.seen.trouble is not None:
            yield Text(self.seen.trouble, style="yellow")


def _table(queues: "Sequence[QueueStatus]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("queue", overflow="fold")
    table.add_column("role", no_wrap=True)
    for heading in ("waiting", "in flight", "hidden for", "kept for"):
        table.add_column(heading, justify="right")
    for queue in queues:
        numbers = _numbers(queue) if queue.exists else ("missing",)
        table.add_row(*map(shown, (queue.name, queue.role, *numbers)))
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


def _said_of_runs(runs: _Runs, visible: int) -> "Iterator[str]":
    from dagster_taskiq.storage.waiting import HELD

    if runs.hold is not None:
        yield runs.hold.notice()
    why = runs.why if runs.hold is None else HELD
    yield runs.waiting.described(why) or "no run waits for a worker"
    if ended := runs.waiting.of_cancelled_backfills:
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


def _unusable(heartbeats: "Iterable[Heartbeat]", queue_name: str) -> "list[Mapping[str, Any]]":
    """The messages of which workers report that nobody can use them: only workers know, by having received them."""
    found: dict[str, Mapping[str, Any]] = {}
    for heartbeat in heartbeats:
        for message in heartbeat.facts.get("unusable", ()) if heartbeat.facts.get("queue") == queue_name else ():
            known = found.get(message["id"])
            if known is None or known["received"] < message["received"]:
                found[message["id"]] = message
    return sorted(found.values(), key=lambda one: -one["received"])


def _duration(seconds: int) -> str:
    """`345600` as `4 d`."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _ask(settings: "Settings", question: Callable[[Any], Awaitable[T]]) -> T:
    """Send one request to SQS, with a client of its own."""
    import asyncio

    from dagster_taskiq.sqs.client import Connection

    async def ask() -> T:
        connection = Connection(settings.region_name, settings.endpoint_url)
        try:
            return await question(await connection.client())
        finally:
            await connection.close()

    return asyncio.run(ask())
