"""`dagster-taskiq queue`: create the queues, show their status."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from dagster_taskiq.cli.options import config_option, soon_over
from dagster_taskiq.cli.queue_show import Picture, RunsSeen, Seen, to_json
from dagster_taskiq.cli.watch import show, watch_options
from dagster_taskiq.queue_names import DEFAULT_ROUTE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dagster_taskiq.settings import Settings
    from dagster_taskiq.sqs.admin import QueueStatus
    from dagster_taskiq.storage.heartbeats import Heartbeat

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
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.queue_names import queue_name
    from dagster_taskiq.sqs.admin import queue_urls

    settings = configured(config_file)
    for route in _chosen(routes) or (DEFAULT_ROUTE,):
        of_route = settings.of_route(route)
        created = create_missing(of_route)
        for url in queue_urls(of_route.queue_url).values():
            name = queue_name(url)
            click.echo(f"{name}: {'created' if name in created else 'exists'}")


def _chosen(routes: tuple[str, ...]) -> tuple[str, ...]:
    """What was given with `--route`. Raises `SettingsError` for what is no route."""
    from dagster_taskiq._route_rules import routes_of

    return routes_of("--route", ",".join(routes)) if routes else ()


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
@click.option(
    "--route",
    "routes",
    metavar="ROUTE",
    multiple=True,
    help="A route to look at; several, also with commas. Default: all that are in use.",
)
@watch_options
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON array.")
@soon_over
def status(config_file: Path | None, routes: tuple[str, ...], *, every_s: float | None, as_json: bool) -> None:
    """Show how many messages wait in each queue, and what is wrong with it.

    Exit code 1: a queue is missing; or Dagster's database does not answer, then the queues are shown all the same.

    Of every route that is in use: one that a rule names, that a living worker serves, that a run waits for, or whose
    queues SQS lists (sqs:ListQueues).

    Where there is a $DAGSTER_HOME, also how many runs wait for a worker, for how long, and why; how many of them, and
    of the messages, are cancelled already and will not start; and which messages living workers have found to be of no
    use: those come again, ever more rarely, until they expire or are purged.
    With --json that is in `runs_waiting`, `cancelled` and `unusable` of the work queue; null: the database was not
    asked, or did not answer. A fleet that is held (`fleet hold`) says so, with --json in `hold`.

    \b
    Example:
      dagster-taskiq queue status
      dagster-taskiq queue status --watch
      dagster-taskiq queue status --route gpu
      dagster-taskiq queue status --json | jq '.[] | {name, visible}'
    """
    from dagster_taskiq.cli.configured import configured

    settings, chosen = configured(config_file), _chosen(routes)

    def draw(seen: Seen) -> Picture:
        return Picture(seen, with_trouble=every_s is not None)

    seen = show(lambda: _look(settings, chosen), draw, to_json, as_json=as_json, every_s=every_s)
    if seen is None:
        return
    if seen.trouble is not None:
        click.echo(seen.trouble, err=True)
    _refuse_missing(seen)
    if seen.trouble is not None:
        raise SystemExit(1)


def _refuse_missing(seen: "Seen") -> None:
    """Raises `QueueMissing` for a queue that is missing, and `UnknownRoute` for a route that is."""
    from dagster_taskiq.errors import QueueMissing, UnknownRoute

    there = {one.route for one in seen.queues if one.exists}
    for one in seen.queues:
        if not one.exists and one.route != DEFAULT_ROUTE and one.route not in there:
            raise UnknownRoute(one.route, sorted(there))
        if not one.exists:
            raise QueueMissing(one.warnings[0])


def _look(settings: "Settings", chosen: tuple[str, ...]) -> Seen:
    """Raises what SQS answers; the database is asked besides, with a bound of its own."""
    import asyncio

    from dagster_taskiq._lane import Lane
    from dagster_taskiq.cli.explain import explain

    lane = Lane("the database", _ANSWER_S)
    in_use, trouble = chosen, None
    try:
        try:
            in_use = chosen or asyncio.run(lane.call(_routes_in_use, settings))
        except Exception as error:  # noqa: BLE001 - what was asked for are the queues
            trouble = f"runs that wait: {explain(error) or repr(error)}"
        queues = _ask(settings, lambda client: _statuses(client, settings, in_use, chosen))
        if trouble is not None:
            return Seen(queues, None, trouble)
        works = [one for one in queues if one.role == "work"]
        all_known = not chosen and all(one.exists and one.known for one in works)
        visible = sum(one.visible for one in works) if all_known else None
        routes = [one.route for one in works]
        try:
            return Seen(queues, asyncio.run(lane.call(_look_at_runs, settings, routes, visible)), None)
        except Exception as error:  # noqa: BLE001 - as above; and they have answered
            return Seen(queues, None, f"runs that wait: {explain(error) or repr(error)}")
    finally:
        lane.close()


async def _statuses(
    client: Any, settings: "Settings", in_use: tuple[str, ...], chosen: tuple[str, ...]
) -> "list[QueueStatus]":
    """Of the chosen routes, or of those in use and those that SQS lists."""
    from dagster_taskiq.errors import QueueError
    from dagster_taskiq.sqs.admin import list_routes, queue_status
    from dagster_taskiq.storage.routing import sorted_routes

    routes = chosen
    if not chosen:
        listed: tuple[str, ...] = ()
        with suppress(QueueError):  # a permission that nobody needs
            listed = await list_routes(client, settings.queue_url)
        routes = sorted_routes([DEFAULT_ROUTE, *(rule.route for rule in settings.routes), *in_use, *listed])
    return [one for route in routes for one in await queue_status(client, settings.queue_url, route)]


def _routes_in_use(settings: "Settings") -> tuple[str, ...]:
    """As the database knows them. Raises what Dagster and its database raise."""
    import os

    if not os.environ.get("DAGSTER_HOME"):
        return ()
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.storage.waiting import routes_in_use
    from dagster_taskiq.storage.workers import list_workers

    with open_instance() as instance:
        return routes_in_use(instance, settings, list_workers(instance, settings))


def _look_at_runs(settings: "Settings", routes: "Sequence[str]", visible: int | None) -> RunsSeen | None:
    """None where no instance is configured. Raises what Dagster and its database raise."""
    import os

    if not os.environ.get("DAGSTER_HOME"):
        return None
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.queue_names import queue_name
    from dagster_taskiq.storage.fleet import read_hold
    from dagster_taskiq.storage.heartbeats import Heartbeats
    from dagster_taskiq.storage.waiting import cancelled_runs, serving_steps, waiting_by_route, why_runs_wait
    from dagster_taskiq.storage.workers import list_workers

    with open_instance() as instance:
        hold = read_hold(instance)
        living = Heartbeats.of_runs(instance, settings).living()
        workers = list_workers(instance, settings)
        waiting = waiting_by_route(instance)
        held = hold.described() if hold is not None else None
        return RunsSeen(
            {route: waiting[route] for route in routes if route in waiting},
            {route: held or why_runs_wait(workers, settings, route) for route in routes},
            [route for route in routes if not serving_steps(workers, settings, route)],
            cancelled_runs(instance, workers, visible),
            _unusable(living, queue_name(settings.queue_url)),
            hold,
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
