"""`dagster-taskiq worker stop`: have workers end, from afar."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from dagster_taskiq.cli.options import config_option, quiet, waiting
from dagster_taskiq.cli.output import say
from dagster_taskiq.cli.run_filters import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dagster import DagsterInstance

    from dagster_taskiq.settings import Settings
    from dagster_taskiq.storage.stop_workers import Stop
    from dagster_taskiq.storage.workers import WorkerInfo

_LOOK_EVERY_S: Final = 0.5
_TIMED_OUT: Final = 4
_ON_ECS: Final = (
    "ECS starts another task for each one that ends: to have fewer, lower the desired count of the service;"
    " to have none of them begin anything: dagster-taskiq fleet hold"
)


@click.command("stop", short_help="Have workers end, from afar.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@config_option
@click.option("--all", "everybody", is_flag=True, help="All workers that are alive.")
@click.option("-r", "--reason", help="Why: for `worker list`, and for the log of the worker.")
@click.option("--requested-by", help="Who stops it. Default: as for `fleet hold`.")
@click.option("--finish", is_flag=True, help="Let what runs end first, however long that takes.")
@click.option("--wait", is_flag=True, help="Return when the workers have ended.")
@click.option("--timeout", "timeout_s", type=duration, metavar="TIME", help="With --wait: so long at most, like 5m.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON array.")
@quiet
def stop_workers(
    names: tuple[str, ...],
    config_file: Path | None,
    reason: str | None,
    requested_by: str | None,
    timeout_s: float | None,
    *,
    everybody: bool,
    finish: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Have workers end, as SIGTERM does, from anywhere where Dagster's database can be reached.

    A worker that is asked takes nothing new. What runs has `drain_seconds` to end, and can be cancelled meanwhile; then
    it is interrupted, and goes on elsewhere where run monitoring allows it. With --finish nothing is interrupted.
    NAME is a worker's id, or its name if only one that is alive has it. The request is for this life of the worker: one
    that is started later under the same name works. Exit code 1: one is unknown, had ended before, or has not heard
    it; 4: with --timeout, one has not ended; 130: Ctrl-C while it waited.

    \b
    Example:
      dagster-taskiq worker stop loader-1 --reason "a larger machine" --wait
      dagster-taskiq worker stop --all --finish
    """
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.storage.stop_workers import Stop, look_at_stops

    if bool(names) == everybody:
        raise click.UsageError("give the NAME of a worker, or --all")
    if timeout_s is not None and not wait:
        raise click.UsageError("--timeout goes with --wait")
    settings = configured(config_file)
    with open_instance() as instance:
        found, troubles = _find(instance, settings, names)
        _ask(instance, found, reason, requested_by, finish=finish)
        ids = [one.worker_id for one in found]

        def look() -> list[Stop]:
            return look_at_stops(instance, settings, ids, finish=finish)

        with waiting("not waiting any longer; the workers stop all the same"):
            stops = _until_over(look, timeout_s) if wait else _until_heard(look, 3 * settings.heartbeat_every_s)
    _show(stops, as_json=as_json)
    unheard = [stop for stop in stops if stop.outcome == "asked"]
    left = [stop.worker.worker_id for stop in stops if wait and not stop.is_over]
    if left:
        troubles.append(f"not ended: {', '.join(left)}")
    if everybody and not found:
        click.echo("no worker is alive: nothing to stop", err=True)
    for trouble in troubles:
        click.echo(trouble, err=True)
    if unheard or troubles:
        raise SystemExit(_TIMED_OUT if left else 1)


def _find(
    instance: "DagsterInstance", settings: "Settings", names: tuple[str, ...]
) -> tuple[list["WorkerInfo"], list[str]]:
    """The workers that are meant, without names all; and of each that cannot be stopped why."""
    from dagster_taskiq._text import clean_text
    from dagster_taskiq.errors import DagsterTaskiqError
    from dagster_taskiq.storage.stop_workers import find_worker
    from dagster_taskiq.storage.workers import list_workers

    if not names:
        return list_workers(instance, settings), []
    workers, troubles = list_workers(instance, settings, everybody=True), []
    found: dict[str, WorkerInfo] = {}
    for name in dict.fromkeys(map(clean_text, names)):
        try:
            worker = find_worker(workers, name)
            found[worker.worker_id] = worker
        except DagsterTaskiqError as error:
            troubles.append(str(error))
    return [*found.values()], troubles


def _ask(
    instance: "DagsterInstance",
    workers: "Sequence[WorkerInfo]",
    reason: str | None,
    requested_by: str | None,
    *,
    finish: bool,
) -> None:
    import time

    from dagster_taskiq._text import clean_text
    from dagster_taskiq.runs import describe_user
    from dagster_taskiq.storage.fleet import StopRequest
    from dagster_taskiq.storage.stop_workers import ask_workers_to_stop

    if workers:
        by = clean_text(requested_by or describe_user(instance))
        request = StopRequest(time.time(), by, clean_text(reason) if reason else None, finish=finish)
        ask_workers_to_stop(instance, workers, request)


def _until_heard(look: "Callable[[], list[Stop]]", within_s: float) -> "list[Stop]":
    """Until all have heard it: that takes a heartbeat or two."""
    from time import monotonic, sleep

    until = monotonic() + within_s
    while True:
        stops = look()
        if monotonic() >= until or all(stop.outcome != "asked" for stop in stops):
            return stops
        sleep(_LOOK_EVERY_S)


def _until_over(look: "Callable[[], list[Stop]]", within_s: float | None) -> "list[Stop]":
    """Until all have ended. Says on stderr how many are left, when that changes."""
    from time import monotonic, sleep

    until, said = monotonic() + within_s if within_s is not None else float("inf"), ""
    while True:
        stops = look()
        left = [stop for stop in stops if not stop.is_over]
        if monotonic() >= until or not left:
            return stops
        heard = [stop for stop in left if stop.at_work is not None]
        line = f"workers that have not ended: {len(left)}"
        if len(heard) < len(left):
            line += f", not heard yet: {len(left) - len(heard)}"
        if heard:
            line += f", at work: {sum(stop.at_work or 0 for stop in heard)}"
        if line != said:
            said = line
            click.echo(line, err=True)
        sleep(_LOOK_EVERY_S)


def _show(stops: "Sequence[Stop]", *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([stop.to_json() for stop in stops], indent=2))
        return
    for stop in stops:
        say(f"{stop.worker.worker_id}: {_described(stop)}")
    if any("ecs task" in stop.worker.where for stop in stops):
        say(_ON_ECS)


def _described(stop: "Stop") -> str:
    import time

    at_work = stop.at_work
    if stop.outcome == "draining" and stop.worker.stopping is not None and stop.worker.stopping.until is not None:
        left_s = max(0.0, stop.worker.stopping.until - time.time())
        return f"drains; at work: {at_work}" + (f", interrupted in {left_s:.0f} s" if at_work else "")
    return {
        "asked": f"has not heard it yet, its state is {stop.worker.state}; it stops when it does",
        "finishing": f"ends after its work; at work: {at_work}",
        "ended": "has ended",
        "dead": "is dead",
    }.get(stop.outcome, stop.outcome)
