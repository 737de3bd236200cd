"""`dagster-taskiq queue`: create the queues, show their status."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from dagster_taskiq.cli.options import config_option, soon_over

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dagster_taskiq.settings import Settings
    from dagster_taskiq.sqs.admin import QueueStatus
    from dagster_taskiq.storage.heartbeats import Heartbeat
    from dagster_taskiq.storage.waiting import WaitingRuns

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


@queue.command()
@config_option
@soon_over
def create(config_file: Path | None) -> None:
    """Create those of the three queues that are missing: work, steps, cancels. Existing ones are not changed.

    In production, create them with infra/queues.yaml: it adds permissions and allows only TLS.

    \b
    Example:
      dagster-taskiq queue create
      dagster-taskiq queue create -y config.yaml
    """
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.queue_names import queue_name
    from dagster_taskiq.sqs.admin import queue_urls

    settings = configured(config_file)
    created = create_missing(settings)
    for url in queue_urls(settings.queue_url).values():
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


@queue.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON array.")
@soon_over
def status(config_file: Path | None, *, as_json: bool) -> None:
    """Show how many messages wait in each queue, and what is wrong with it. Exit code 1 when a queue is missing.

    Where there is a $DAGSTER_HOME, also how many runs wait for a worker, for how long, and why; and which messages
    living workers have found to be of no use: those come again, ever more rarely, until they expire or are purged.
    With --json that is in `runs_waiting` and `unusable` of the work queue; null: the database was not asked.

    \b
    Example:
      dagster-taskiq queue status
      dagster-taskiq queue status --json | jq '.[] | select(.role == "work").visible'
    """
    import asyncio

    from dagster_taskiq._lane import Lane
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.cli.explain import explain
    from dagster_taskiq.errors import QueueMissing
    from dagster_taskiq.sqs.admin import queue_status

    settings = configured(config_file)
    queues = _ask(settings, lambda client: queue_status(client, settings.queue_url))
    trouble = None
    try:
        runs = asyncio.run(Lane("the database", _ANSWER_S).call(_look_at_runs, settings))
    except Exception as error:  # noqa: BLE001 - what was asked for are the queues, and they have answered
        runs, trouble = None, f"runs that wait: {explain(error) or repr(error)}"
    if as_json:
        of_work = {
            "runs_waiting": runs and {**asdict(runs.waiting), "why": runs.why},
            "unusable": runs and runs.unusable,
        }
        listed = [{"name": one.name, **asdict(one), **(of_work if one.role == "work" else {})} for one in queues]
        click.echo(json.dumps(listed, indent=2))
    else:
        _show(queues)
        _show_runs(runs)
    if trouble is not None:
        click.echo(trouble, err=True)
    missing = [warning for queue in queues if not queue.exists for warning in queue.warnings]
    if missing:
        raise QueueMissing(missing[0])


def _show(queues: "Sequence[QueueStatus]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("queue", no_wrap=True)
    table.add_column("role")
    for heading in ("waiting", "in flight", "hidden for", "kept for"):
        table.add_column(heading, justify="right")
    for queue in queues:
        seen = [
            str(queue.visible),
            str(queue.in_flight),
            *map(_duration, (queue.visibility_timeout_s, queue.retention_s)),
        ]
        table.add_row(queue.name, queue.role, *(seen if queue.known else "????") if queue.exists else ["missing"])
    console = Console()
    console.print(table)
    for warning in (warning for queue in queues if queue.exists for warning in queue.warnings):
        console.print(f"[yellow]warning[/yellow] {warning}", highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Runs:
    """What Dagster's database knows. Messages are not runs: some wait in Dagster's queue, others are only messages."""

    waiting: "WaitingRuns"
    why: str
    unusable: "Sequence[Mapping[str, Any]]"
    """Of the work queue and the steps queue."""


def _look_at_runs(settings: "Settings") -> _Runs | None:
    """None where no instance is configured. Raises what Dagster and its database raise."""
    import os

    if not os.environ.get("DAGSTER_HOME"):
        return None
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.queue_names import queue_name
    from dagster_taskiq.storage.heartbeats import Heartbeats
    from dagster_taskiq.storage.waiting import waiting_runs, why_runs_wait
    from dagster_taskiq.storage.workers import list_workers

    with open_instance() as instance:
        living = Heartbeats.of_runs(instance, settings).living()
        return _Runs(
            waiting_runs(instance),
            why_runs_wait(list_workers(instance, settings), settings),
            _unusable(living, queue_name(settings.queue_url)),
        )


def _show_runs(runs: _Runs | None) -> None:
    if runs is None:
        return
    click.echo(runs.waiting.described(runs.why) or "no run waits for a worker")
    for message in runs.unusable:
        again = datetime.fromtimestamp(message["again_at"], UTC)
        click.echo(
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
