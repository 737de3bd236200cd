"""`dagster-taskiq run explain`: the life of one run, and what it waits for."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from dagster_taskiq._text import clean_text
from dagster_taskiq.cli.options import soon_over

if TYPE_CHECKING:
    from dagster_taskiq.settings import Settings
    from dagster_taskiq.story.surroundings import Messages

_STEPS_ON_A_TERMINAL: Final = 20
_QUEUE_ANSWERS_S: Final = 5.0


@click.command("explain", short_help="Show the life of one run, and what it waits for.")
@click.argument("run_id")
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="FILE", help="Write it as one HTML page.")
@click.option("--svg", "svg_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the chart as SVG.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
@click.option(
    "--steps",
    "most_steps",
    type=click.IntRange(1, 200),
    help="So many steps at most; those that are open or went wrong first, then the longest."
    " Default: 20 on the terminal, else 200.",
)
@soon_over
def explain_run(
    run_id: str, html_file: Path | None, svg_file: Path | None, most_steps: int | None, *, as_json: bool
) -> None:
    """Show the life of one run: where it waited, each step, who cancelled it and why, signals, cleanup, its end.

    Of a run that is not over also what it waits for, until when, and what to do. Changes nothing. The id may be its
    beginning, of eight characters or more.

    \b
    Example:
      dagster-taskiq run explain 3e4a5f60
      dagster-taskiq run explain 3e4a5f60 --html run.html --svg run.svg
      dagster-taskiq run explain 3e4a5f60 --json | jq .waits

    Exit code 0: the run was found, however it ended. 1: there is no such run, or another launcher has launched it, or
    the database does not answer. With --html or --svg only the names of the files are printed.
    """
    from dagster_taskiq.dagster_compat.instance import open_instance
    from dagster_taskiq.runs import find_run_id
    from dagster_taskiq.story.gather import story_of
    from dagster_taskiq.story.model import as_json as json_of
    from dagster_taskiq.story.model import with_most_steps

    with open_instance() as instance:
        given = clean_text(run_id)
        found = given if _is_whole(given) else find_run_id(instance, given)
        story = story_of(instance, found, _ask_queue)
    pictures = html_file is not None or svg_file is not None
    most = most_steps or (200 if pictures or as_json else _STEPS_ON_A_TERMINAL)
    story = with_most_steps(story, most)
    if as_json:
        click.echo(json.dumps(json_of(story), indent=2))
    if svg_file is not None:
        from dagster_taskiq.story.svg import svg_of

        svg_file.write_text(svg_of(story), "utf-8")
    if html_file is not None:
        from dagster_taskiq.story.html import html_of

        html_file.write_text(html_of(story), "utf-8")
    for file in filter(None, (svg_file, html_file)):
        click.echo(f"written: {file}", err=as_json)
    if not as_json and not pictures:
        from rich.console import Console

        from dagster_taskiq.story.terminal import print_story

        print_story(story, Console())


def _is_whole(run_id: str) -> bool:
    return len(run_id) == len("00000000-0000-0000-0000-000000000000")


def _ask_queue(settings: "Settings") -> "Messages":
    """How many messages the work queue has. Never raises: what is asked about is the run."""
    import asyncio

    from dagster_taskiq.sqs.admin import queue_status
    from dagster_taskiq.sqs.client import Connection
    from dagster_taskiq.story.surroundings import Messages
    from dagster_taskiq.story.text import one_line

    async def ask() -> Messages:
        connection = Connection(settings.region_name, settings.endpoint_url)
        try:
            async with asyncio.timeout(_QUEUE_ANSWERS_S):
                queues = await queue_status(await connection.client(), settings.queue_url)
        finally:
            await connection.close()
        work = next(queue for queue in queues if queue.role == "work")
        if not work.exists:
            return Messages(trouble="it does not exist; create it: dagster-taskiq queue create")
        return Messages(work.visible, work.in_flight)

    try:
        return asyncio.run(ask())
    except Exception as error:  # noqa: BLE001 - whatever it is, the rest is worth showing
        return Messages(trouble=one_line(str(error) or type(error).__name__))
