"""`dagster-taskiq dev`: everything on this machine, with Dagster's UI."""

from pathlib import Path

import click


@click.command(short_help="Everything on this machine, with Dagster's UI.")
@click.option(
    "-f",
    "--python-file",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A Python file with your definitions.",
)
@click.option("-m", "--module-name", "module", metavar="MODULE", help="A Python module with your definitions.")
@click.option("--port", type=click.IntRange(1, 65_535), help="Port of the UI. Default: a free one.")
@click.option(
    "--dagster-home",
    "home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep runs and storage in this folder. Default: $DAGSTER_HOME, or a temporary one, removed at the end.",
)
@click.option(
    "-q",
    "--queue",
    "routes",
    metavar="ROUTE",
    multiple=True,
    help="A route with queues here, which the worker serves, too; several, also with commas. Those that the rules in"
    " your dagster.yaml name are here anyway.",
)
@click.option("--no-worker", is_flag=True, help="Start no worker: runs wait in the queue.")
def dev(
    file: Path | None,
    module: str | None,
    port: int | None,
    home: Path | None,
    routes: tuple[str, ...],
    *,
    no_worker: bool,
) -> None:
    """Run Dagster's UI, its daemon, a worker and an embedded SQS on this machine; one Ctrl-C stops them all.

    Without -f and -m: the project of this folder, if it has workspace.yaml or a pyproject.toml with [tool.dagster];
    else an example, the books of a bakery. Your environment, .env in this folder, and your dagster.yaml (of
    --dagster-home, $DAGSTER_HOME or this folder) count as in 'dagster dev'. Added are queue, launcher and coordinator.
    Needs the extra [local]. All connections are on loopback.

    \b
    Example:
      dagster-taskiq dev
      dagster-taskiq dev -f my_definitions.py --port 3000
      dagster-taskiq dev -q gpu
    """
    if file is not None and module is not None:
        raise click.UsageError("give -f or -m, not both")
    from dagster_taskiq._route_rules import routes_of
    from dagster_taskiq.local.dev import serve

    code = ["-f", str(file)] if file else ["-m", module] if module else None
    named = routes_of("-q", ",".join(routes)) if routes else ()
    serve(code, home=home, port=port, with_worker=not no_worker, routes=named, print_line=print_line)


_COLOURS = {"dev": "green", "worker": "cyan", "dagster": "blue", "aws": "yellow"}


def print_line(who: str, line: str) -> None:
    """Print one line of one process."""
    click.echo(f"{click.style(f'{who:>7} |', fg=_COLOURS.get(who))} {line}")
