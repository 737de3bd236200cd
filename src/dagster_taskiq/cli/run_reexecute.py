"""`dagster-taskiq run reexecute`: a cancelled or failed run goes on from its finished steps."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from dagster_taskiq._text import clean_text
from dagster_taskiq.cli.options import quiet

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from dagster_taskiq.reexecution import Reexecution

_NAMED_STEPS: Final = 10
_LOOK_EVERY_S: Final = 1.0


def _parsed_tags(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    wrong = next((tag for tag in given if not tag.partition("=")[0] or "=" not in tag), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} is no KEY=VALUE")
    return {key: value for key, _, value in (tag.partition("=") for tag in given)}


@click.command("reexecute", short_help="Go on with a cancelled or failed run.")
@click.argument("run_id")
@click.option("--all-steps", is_flag=True, help="Run everything once more, also of a run that succeeded.")
@click.option(
    "--tag", "tags", multiple=True, metavar="KEY=VALUE", callback=_parsed_tags, help="A tag more. Repeatable."
)
@click.option("--dry-run", is_flag=True, help="Say which steps would run, and launch nothing.")
@click.option("--wait", is_flag=True, help="Wait until the new run is finished.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
@click.option("-w", "--workspace", multiple=True, metavar="FILE", help="workspace.yaml with the run's code location.")
@click.option("-m", "--module-name", multiple=True, metavar="MODULE", help="The module that has the run's job.")
@click.option("-f", "--python-file", multiple=True, metavar="FILE", help="The file that has the run's job.")
@click.option("-d", "--working-directory", metavar="FOLDER", help="For -m and -f: where the code is imported from.")
@quiet
def reexecute(
    run_id: str,
    *,
    tags: Mapping[str, str],
    all_steps: bool,
    dry_run: bool,
    wait: bool,
    as_json: bool,
    workspace: tuple[str, ...],
    module_name: tuple[str, ...],
    python_file: tuple[str, ...],
    working_directory: str | None,
) -> None:
    """Go on with a cancelled or failed run: a new run, in which no finished step runs again.

    It has the configuration, the partition, the selection and the tags of the first one. Steps that were interrupted
    run again from their beginning. The id may be its beginning, of eight characters or more.

    The code is loaded as the run says: from its code server, or, of a module or file, here. Where that is not
    reachable or not here, give your webserver's workspace.yaml with -w, or -m or -f, as to `dagster job launch`.

    \b
    Example:
      dagster-taskiq run reexecute 3e4a5f60 --dry-run
      dagster-taskiq run reexecute 3e4a5f60 --wait
      dagster-taskiq run reexecute 3e4a5f60 -w workspace.yaml --tag ticket=OPS-7

    Exit code 0: launched; with --wait: it ended as SUCCESS. 1: nothing was launched, because the run is not over,
    nothing of it is left, or its code cannot be loaded; or, with --wait, the new run ended otherwise.
    """
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.dagster_compat.reexecution import CodeSource
    from dagster_taskiq.reexecution import launch, plan
    from dagster_taskiq.runs import find_run_id

    source = CodeSource(workspace, module_name, python_file, working_directory)
    if sum(map(bool, (workspace, module_name, python_file))) > 1:
        raise click.UsageError("give one of -w, -m and -f")
    with open_instance() as instance:
        planned = plan(instance, find_run_id(instance, clean_text(run_id)), all_steps=all_steps)
        if dry_run:
            _print(planned.described(), as_json=as_json)
            return
        with _stdout_for_us():
            done = launch(instance, planned, tags, source, tell=_tell)
        _print(done, as_json=as_json)
        if wait and done.run_id is not None:
            succeeded = _wait(instance, done.run_id, as_json=as_json)
            sys.exit(0 if succeeded else 1)


@contextmanager
def _stdout_for_us() -> Iterator[None]:
    """What the users' code prints in a code server goes to stderr: stdout may be read by a program."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(ours, 1)
        os.close(ours)


def _tell(what: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"{what} …", err=True)


def _print(what: "Reexecution", *, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps(asdict(what), indent=2))
        return
    if what.run_id is None:
        click.echo(f"{what.parent_run_id}: would go on as a new run")
    else:
        click.echo(f"{what.parent_run_id}: goes on as run {what.run_id}, it is {what.status}")
    if what.all_steps:
        click.echo("  all steps run")
        return
    click.echo(f"  {_steps(what.finished)} finished, and {_do(what.finished)} not run again")
    click.echo(f"  {_steps(what.to_run)} to run: {_listed(what.to_run)}")


def _steps(keys: tuple[str, ...]) -> str:
    return "1 step" if len(keys) == 1 else f"{len(keys)} steps"


def _do(keys: tuple[str, ...]) -> str:
    return "does" if len(keys) == 1 else "do"


def _listed(keys: tuple[str, ...]) -> str:
    more = f", … ({len(keys) - _NAMED_STEPS} more)" if len(keys) > _NAMED_STEPS else ""
    return ", ".join(map(clean_text, keys[:_NAMED_STEPS])) + more


def _wait(instance: "DagsterInstance", run_id: str, *, as_json: bool) -> bool:
    """Until the run is finished. Says each status once; with JSON on stderr."""
    from dagster import DagsterRunStatus

    from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES

    seen: DagsterRunStatus | None = None
    began = time.monotonic()
    try:
        while seen not in FINISHED_STATUSES:
            run = instance.get_run_by_id(run_id)
            if run is None:
                raise click.ClickException(f"run {run_id} was deleted")
            if run.status is not seen:
                seen = run.status
                click.echo(f"{run_id}: {seen.value} after {time.monotonic() - began:.0f} s", err=as_json)
            if seen not in FINISHED_STATUSES:
                time.sleep(_LOOK_EVERY_S)
    except KeyboardInterrupt:
        raise click.ClickException(
            f"no longer waiting; run {run_id} goes on, to stop it: dagster-taskiq run cancel {run_id}"
        ) from None
    return seen is DagsterRunStatus.SUCCESS
