"""`dagster-taskiq worker`: start a worker in the foreground, list all workers, stop them, ask for their health."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from dagster_taskiq._gc import collection_paused
from dagster_taskiq.cli.options import config_option, log_format_option, log_level_option, soon_over
from dagster_taskiq.cli.output import TableOrLines, age, shown
from dagster_taskiq.cli.watch import show, watch_options
from dagster_taskiq.cli.worker_stop import stop_workers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dagster import DagsterInstance
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from dagster_taskiq.cli.logs import LogFormat
    from dagster_taskiq.settings import Settings
    from dagster_taskiq.storage.workers import WorkerInfo, WorkInfo

_NOBODY: Final = "no worker is alive; start one with `dagster-taskiq worker start`"


@click.group()
def worker() -> None:
    """Start workers, see what they are working on, and stop them.

    \b
    Example:
      dagster-taskiq worker start -n loader-1 --max-runs 2 --max-steps 8
      dagster-taskiq worker list
      dagster-taskiq worker stop loader-1 --reason "a larger machine"
    """


@worker.command(short_help="Work on runs and steps until SIGTERM.")
@config_option
@click.option("-n", "--name", metavar="NAME", help="Name of the worker in logs and events. Default: a new one.")
@click.option(
    "-q",
    "--queue",
    "routes",
    metavar="ROUTE",
    multiple=True,
    help="A route to serve; several, also with commas: in order of preference. Default: the setting serves.",
)
@click.option("--max-runs", type=int, metavar="N", help="Runs at a time; the setting max_concurrent_runs.")
@click.option("--max-steps", type=int, metavar="N", help="Steps at a time; the setting max_concurrent_steps.")
@click.option("--runs-only", is_flag=True, help="Take no steps: for a separate fleet for runs.")
@click.option("--steps-only", is_flag=True, help="Take no runs: for a separate fleet for steps.")
@log_level_option
@log_format_option
def start(
    config_file: Path | None,
    name: str | None,
    routes: tuple[str, ...],
    max_runs: int | None,
    max_steps: int | None,
    log_level: str,
    log_format: "LogFormat",
    *,
    runs_only: bool,
    steps_only: bool,
) -> None:
    """Work on runs and steps until SIGTERM or Ctrl-C.

    Runs and steps have separate slots, so a run that waits for its steps never takes a slot that a step needs.
    Of several routes the first one's waiting work is taken first whenever a slot becomes free; `default` is the
    unnamed route. Prints one line with the word `ready` when it listens to all its queues. The Dagster instance is the
    one in $DAGSTER_HOME. A second SIGTERM skips the drain.

    \b
    Example:
      dagster-taskiq worker start
      dagster-taskiq worker start -n loader-1 --max-runs 2 --log-level DEBUG
      dagster-taskiq worker start --steps-only --max-steps 8
      dagster-taskiq worker start -q gpu -q default
    """
    if runs_only and steps_only:
        raise click.UsageError("--runs-only and --steps-only exclude each other; leave both out to serve both queues")
    if (runs_only and max_steps) or (steps_only and max_runs):
        raise click.UsageError("--runs-only goes with --max-runs, and --steps-only with --max-steps")
    max_runs, max_steps = (0 if steps_only else max_runs), (0 if runs_only else max_steps)
    overrides: dict[str, Any] = {"max_concurrent_runs": max_runs, "max_concurrent_steps": max_steps}
    if routes:
        from dagster_taskiq._route_rules import routes_of

        overrides["serves"] = routes_of("-q", ",".join(routes))
    raise SystemExit(run(config_file, name=name, log_level=log_level, log_format=log_format, overrides=overrides))


def run(
    config_file: Path | None,
    *,
    name: str | None = None,
    log_level: str,
    log_format: "LogFormat" = "auto",
    overrides: "Mapping[str, Any] | None" = None,
) -> int:
    """Start a worker and return its exit code when it has stopped. `overrides`: settings that win over the others."""
    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.cli.logs import log_to_stderr

    log_to_stderr(log_level, log_format)
    with collection_paused():
        settings = configured(config_file, **(overrides or {}))
        from dagster_taskiq.worker.service import run_worker

    def announce(worker_id: str) -> None:
        click.echo(f"worker {worker_id} is ready: it listens to {_listens_to(settings)}")

    return run_worker(settings, name=name, on_ready=announce, cancel_runs=_cancel_runs)


def _listens_to(settings: "Settings") -> str:
    """The queues of each route, in order of preference."""
    from dagster_taskiq.queue_names import queue_name

    routes = []
    for of_route in map(settings.of_route, settings.serves):
        urls = [of_route.queue_url] if settings.max_concurrent_runs else []
        urls += [of_route.steps_queue_url] if settings.max_concurrent_steps else []
        routes.append(" and ".join(map(queue_name, urls)))
    return ", then ".join(routes)


def _cancel_runs(
    instance: "DagsterInstance", run_ids: "Sequence[str]", reason: str, requested_by: str
) -> "Mapping[str, str]":
    from dagster_taskiq.cancel_many import cancel_runs

    return cancel_runs(instance, run_ids, reason=reason, requested_by=requested_by).failed


@worker.command(short_help="Is the worker of this container alive?")
@click.option("--pid", type=int, help="Only this worker. Default: every worker in this container.")
def health(pid: int | None) -> None:
    """Ask the worker of this container whether it is alive; for its health check. Exit code 1: none answers.

    It answers as long as its event loop runs. Neither the database nor SQS is asked: when one of them does not answer,
    a new worker does not help.

    \b
    Example:
      dagster-taskiq worker health

    In the task definition of a container:

    \b
      "healthCheck": {"command": ["CMD", "dagster-taskiq", "worker", "health"]}
    """
    from dagster_taskiq.worker.health import workers_here

    found = workers_here(pid)
    if not found:
        raise click.ClickException("no worker runs here; start one with `dagster-taskiq worker start`")
    for its_pid, answer in found.items():
        if answer is None:
            click.echo(f"pid {its_pid} does not answer; it hangs", err=True)
        else:
            click.echo(f"{answer['worker']} is {answer['state']}: {answer['runs']} runs, {answer['steps']} steps")
    if None in found.values():
        raise SystemExit(1)


@worker.command("list", short_help="Who is alive, and works on what?")
@config_option
@click.option("--all", "everybody", is_flag=True, help="Also workers of the last week that are dead or gone.")
@watch_options
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON array.")
@soon_over
def list_workers(config_file: Path | None, *, everybody: bool, every_s: float | None, as_json: bool) -> None:
    """Show which workers are alive, and what each one is working on, since when. Asks only Dagster's database.

    Every worker writes a heartbeat there. `silent`: its heartbeat is late, and nothing has been decided about its
    work yet. `draining`: it takes nothing new, and ends. Exit code 1 when no worker is alive; with --watch, 0 on
    Ctrl-C.

    \b
    Example:
      dagster-taskiq worker list
      dagster-taskiq worker list --watch
      dagster-taskiq worker list --json | jq '.[] | select(.work == []).worker_id'
    """
    from dataclasses import asdict

    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.storage.workers import ALIVE, list_workers

    settings = configured(config_file)
    with open_instance() as instance:

        def look() -> _Fleet:
            workers = list_workers(instance, settings, everybody=everybody)
            lines = [] if as_json else _about(instance, settings, workers)
            if every_s is not None and not any(worker.state == ALIVE for worker in workers):
                lines.append(_NOBODY)
            return _Fleet(workers, lines)

        def to_json(fleet: _Fleet) -> list[dict[str, Any]]:
            return [asdict(worker) for worker in fleet.workers]

        fleet = show(look, _Picture, to_json, as_json=as_json, every_s=every_s)
    if fleet is not None and not any(worker.state == ALIVE for worker in fleet.workers):
        click.echo(_NOBODY, err=True)
        raise SystemExit(1)


def _about(instance: "DagsterInstance", settings: "Settings", workers: "Sequence[WorkerInfo]") -> list[str]:
    """Who stops, who has which code, whether the fleet is held, and what waits."""
    from dagster_taskiq.storage.code_locations import who_has_it
    from dagster_taskiq.storage.fleet import read_hold
    from dagster_taskiq.storage.waiting import describe_waiting

    hold = read_hold(instance)
    code = who_has_it({worker.worker_id: worker.code for worker in workers if worker.state == "alive"})
    held = [hold.notice()] if hold is not None else []
    return [*_endings(workers), *code, *held, *describe_waiting(instance, settings, workers, hold)]


@dataclass(frozen=True, slots=True)
class _Fleet:
    workers: "Sequence[WorkerInfo]"
    lines: "Sequence[str]"
    """About workers that stop, a hold, the runs that wait, and about nobody being there."""


@dataclass(frozen=True, slots=True)
class _Picture:
    fleet: _Fleet

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        if workers := self.fleet.workers:
            yield TableOrLines(_table(workers), lambda: _lines(workers))
        yield from map(shown, self.fleet.lines)


def _table(workers: "Sequence[WorkerInfo]") -> "Table":
    from rich import box
    from rich.table import Table

    now = time.time()
    table = Table(box=box.SIMPLE)
    named = _uses_routes(workers)
    routes = ("routes",) if named else ()
    for heading in ("worker", "state", *routes, "heartbeat", "up", "runs", "steps", "working on", "status", "for"):
        table.add_column(heading, no_wrap=heading not in ("worker", "working on"), overflow="fold")
    for worker in workers:
        up = age(now - worker.since) if worker.since is not None and worker.state != "gone" else ""
        served = (", ".join(worker.routes),) if named else ()
        row = [worker.worker_id, worker.shown_state, *served, f"{age(now - worker.heard)} ago", up, *_slots(worker)]
        for work in worker.work or (None,):
            if work is None:
                table.add_row(*map(shown, row))
            else:
                table.add_row(*map(shown, (*row, _name(work), work.status or "", age(now - work.since))))
            row = [""] * len(row)
    return table


def _lines(workers: "Sequence[WorkerInfo]") -> "Iterator[str]":
    """For a narrow terminal: the same, one below the other."""
    now, named = time.time(), _uses_routes(workers)
    for worker in workers:
        runs, steps = _slots(worker)
        yield worker.worker_id
        heard, taken = age(now - worker.heard), f"runs {runs or '?'}, steps {steps or '?'}"
        yield f"  {worker.shown_state}, heartbeat {heard} ago, {taken}"
        if named:
            yield f"  routes {', '.join(worker.routes)}"
        for work in worker.work:
            yield f"  {_name(work)}"
            yield f"    {work.status or '?'} for {age(now - work.since)}"


def _uses_routes(workers: "Sequence[WorkerInfo]") -> bool:
    """Whether one of them serves a route with a name."""
    from dagster_taskiq.queue_names import DEFAULT_ROUTE

    return any(worker.routes != (DEFAULT_ROUTE,) for worker in workers)


def _endings(workers: "Sequence[WorkerInfo]") -> "Iterator[str]":
    """One line about each worker that stops: why, and what becomes of its work."""
    now = time.time()
    for worker in workers:
        if worker.stopping is not None and worker.state == "alive":
            until = worker.stopping.until
            then = f"what still runs is interrupted in {age(until - now)}" if until else "what runs is finished"
            yield f"{worker.worker_id} stops, by {worker.stopping.described()}; {then}"


def _slots(worker: "WorkerInfo") -> tuple[str, str]:
    """Taken and all slots: for runs, for steps."""
    at_runs = sum(work.step_key is None for work in worker.work)
    return (
        "" if worker.runs is None else f"{at_runs}/{worker.runs}",
        "" if worker.steps is None else f"{len(worker.work) - at_runs}/{worker.steps}",
    )


def _name(work: "WorkInfo") -> str:
    step = f" step {work.step_key}" if work.step_key else ""
    return f"{work.assets or work.job or '(deleted)'} {work.run_id[:8]}{step}"


worker.add_command(stop_workers)
