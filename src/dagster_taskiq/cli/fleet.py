"""`dagster-taskiq fleet`: hold all workers, and let them go on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from dagster_taskiq.cli.options import config_option, quiet, soon_over, waiting
from dagster_taskiq.cli.output import say
from dagster_taskiq.cli.run_filters import duration, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dagster import DagsterInstance

    from dagster_taskiq.settings import Settings
    from dagster_taskiq.storage.fleet_state import FleetState, RouteState

_LOOK_EVERY_S: Final = 0.5
_TIMED_OUT: Final = 4


@click.group(short_help="Hold all workers, and let them go on.")
def fleet() -> None:
    """Hold all workers: what runs goes on, and nothing new begins, until the fleet is released.

    \b
    Example, around a migration of a database:
      dagster-taskiq fleet hold --reason "migration of the warehouse" --wait
      ...
      dagster-taskiq fleet release
    """


_json = click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")


@fleet.command(short_help="Begin nothing new; what runs goes on.")
@config_option
@click.option("-r", "--reason", type=text, required=True, help="Why, for whoever wonders why runs wait.")
@click.option(
    "--requested-by", help="Who holds. Default: the user of this system; for root, in a container, the IAM identity."
)
@click.option("--wait", is_flag=True, help="Return when nothing runs any more.")
@click.option("--timeout", "timeout_s", type=duration, metavar="TIME", help="With --wait: so long at most, like 30m.")
@_json
@quiet
def hold(
    config_file: Path | None,
    reason: str,
    requested_by: str | None,
    timeout_s: float | None,
    *,
    wait: bool,
    as_json: bool,
) -> None:
    """Begin nothing new: runs stay in Dagster's queue, and no worker takes one. What runs goes on, with all its steps.

    Runs can be cancelled meanwhile as ever. It is written into Dagster's database, so it outlives restarts of
    everything. Each worker hears of it with its next heartbeat: this command waits for that, and names those that have
    not heard it. Of a fleet that is held, it changes the reason. Exit code 1: a worker has not heard it; 4: with
    --timeout, something still runs; 130: Ctrl-C while it waited. In each case the fleet is held.

    \b
    Example:
      dagster-taskiq fleet hold --reason "migration of the warehouse"
      dagster-taskiq fleet hold --reason "deploy 4.2" --wait --timeout 30m
    """
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.runs import describe_user
    from dagster_taskiq.storage.fleet import hold_fleet

    if timeout_s is not None and not wait:
        raise click.UsageError("--timeout goes with --wait")
    settings = configured(config_file)
    with open_instance() as instance:
        by = requested_by or describe_user(instance)
        held = hold_fleet(instance, reason=reason, by=by)
        if not as_json:
            say(held.notice())
        with waiting("not waiting any longer; the fleet stays held"):
            state = _until(instance, settings, lambda now: not now.not_heard, 3 * settings.heartbeat_every_s)
            if wait:
                state = _until(instance, settings, lambda now: now.hold is None or now.is_idle, timeout_s, aloud=True)
    _show(state, as_json=as_json)
    if state.hold is None:
        raise click.ClickException("somebody has released the fleet meanwhile")
    if wait and not state.is_idle:
        click.echo("something still runs; the fleet stays held", err=True)
        raise SystemExit(_TIMED_OUT)
    if state.not_heard:
        raise SystemExit(1)


@fleet.command(short_help="Let runs begin again.")
@_json
@soon_over
def release(*, as_json: bool) -> None:
    """Let runs begin again. Says so when the fleet is not held; that is no error.

    Workers hear of it with their next heartbeat, within seconds.

    \b
    Example:
      dagster-taskiq fleet release
    """
    from dataclasses import asdict

    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.storage.fleet import release_fleet
    from dagster_taskiq.storage.waiting import waiting_runs

    with open_instance() as instance:
        held = release_fleet(instance)
        waiting = waiting_runs(instance)
    if as_json:
        was = asdict(held) if held is not None else None
        click.echo(json.dumps({"hold": None, "released": was, "runs_waiting": waiting.count}, indent=2))
    elif held is None:
        click.echo("the fleet is not held")
    else:
        say(f"released; {held.described().replace(' is held ', ' was held ')}")
        click.echo(f"runs that wait: {waiting.count}")


@fleet.command(short_help="Is it held, who knows, what still runs?")
@config_option
@_json
@soon_over
def status(config_file: Path | None, *, as_json: bool) -> None:
    """Whether the fleet is held, by whom and why, which workers have heard of it, and what still runs.

    Where routes with names are in use, also the workers of each, what is at work of it, and the runs that wait for
    it. A worker of several routes is counted for each; what is at work is counted once, for the route it has come on.

    \b
    Example:
      dagster-taskiq fleet status
      dagster-taskiq fleet status --json | jq .hold.reason
    """
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.dagster_compat.instance import open_instance

    settings = configured(config_file)
    with open_instance() as instance:
        state = _look(instance, settings)
    if not as_json:
        say(state.hold.notice() if state.hold is not None else "the fleet is not held")
    _show(state, as_json=as_json)


def _look(instance: "DagsterInstance", settings: "Settings") -> "FleetState":
    from dagster_taskiq.storage.fleet_state import look_at_fleet

    return look_at_fleet(instance, settings)


def _show(state: "FleetState", *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(state.to_json(), indent=2))
        return
    for line in _lines(state):
        say(line)


def _lines(state: "FleetState") -> "Iterator[str]":
    knows = f", {len(state.workers) - len(state.not_heard)} of them know of it" if state.hold is not None else ""
    yield f"workers: {len(state.workers)}{knows}"
    if state.not_heard:
        yield f"not heard yet, and may begin runs: {', '.join(state.not_heard)}; see: dagster-taskiq worker list"
    yield f"{_at_work(state)}; runs that wait: {state.runs_waiting}"
    yield from _of_routes(state)
    if state.hold is not None and state.handed_over and state.start_timeout_s is not None:
        yield (
            f"{state.handed_over} of them had been handed over to the workers: Dagster's run monitoring fails a run"
            f" that has not started after {state.start_timeout_s:.0f} s"
        )


def _of_routes(state: "FleetState") -> "Iterator[str]":
    """Where routes with names are in use."""
    if len(state.routes) == 1:
        return
    for route, one in state.routes.items():
        told = [_many(len(one.workers), "worker") if one.workers else "no worker"]
        if one.workers or one.work:
            told.append(_at_work(one))
        yield f"route {route}: {', '.join(told)}; runs that wait: {one.runs_waiting}"


def _at_work(state: "FleetState | RouteState") -> str:
    return f"at work: {_many(state.runs, 'run')}, {_many(state.steps, 'step')}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _until(
    instance: "DagsterInstance",
    settings: "Settings",
    is_so: "Callable[[FleetState], bool]",
    within_s: float | None,
    *,
    aloud: bool = False,
) -> "FleetState":
    """Look until it is so, or that time is over. `aloud`: says on stderr what is at work, whenever that changes."""
    from time import monotonic, sleep

    until, said = monotonic() + within_s if within_s is not None else float("inf"), ""
    while not is_so(state := _look(instance, settings)) and monotonic() < until:
        if aloud and said != _at_work(state):
            said = _at_work(state)
            click.echo(f"waiting until nothing runs; {said}", err=True)
        sleep(_LOOK_EVERY_S)
    return state
