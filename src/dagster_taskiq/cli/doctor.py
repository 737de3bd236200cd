"""`dagster-taskiq doctor`: what is wrong here, and how to fix it."""

import json
import os
from collections import Counter
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Final

import click

from dagster_taskiq.cli.options import config_option, soon_over
from dagster_taskiq.cli.output import is_terminal

if TYPE_CHECKING:
    from dagster_taskiq.doctor.finding import Finding

_INDENT: Final = " " * 9
_COLOURS: Final = {"ok": "green", "unknown": "cyan", "warning": "yellow", "error": "red"}


@click.command(short_help="Find out what is wrong here, and how to fix it.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON array.")
@soon_over
def doctor(config_file: Path | None, *, as_json: bool) -> None:
    """Check what is wrong: configuration, credentials, queues, permissions, workers, monitoring, clocks.

    Shows the result of each check, the reason, and how to fix it; `unknown` is what could not be checked here. Takes no
    message from a queue and leaves none; in a payload bucket it writes one object, and deletes it. Run it where the
    webserver runs and where a worker runs: their credentials differ. Exit code 1 when there is an error; `warning` and
    `unknown` do not count. NO_COLOR is respected.

    \b
    Example:
      dagster-taskiq doctor
      dagster-taskiq doctor --json | jq '.[] | select(.verdict != "ok")'
    """
    import asyncio
    from dataclasses import asdict

    from dagster_taskiq.cli.configured import configured
    from dagster_taskiq.doctor.checks import examine

    settings = configured(config_file) if config_file is not None else None

    async def all_findings() -> "list[Finding]":
        found = []
        async for finding in examine(settings):
            found.append(finding)
            if not as_json:
                _show(finding)
        return found

    found = asyncio.run(all_findings())
    if not as_json:
        counted = Counter[str](finding.verdict for finding in found)
        click.echo(", ".join(f"{counted[verdict]} {verdict}" for verdict in _COLOURS if counted[verdict]))
    else:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    if any(finding.verdict == "error" for finding in found):
        raise SystemExit(1)


def _show(finding: "Finding") -> None:
    """A finding as lines of the terminal's width, in a pipe as one line. A repair is to be copied: it stays whole."""
    said = f"{finding.check}: {finding.reason}"
    if is_terminal():
        said = click.wrap_text(said, max(40, get_terminal_size().columns), _INDENT, _INDENT).lstrip()
    verdict = click.style(f"{finding.verdict:8}", fg=_COLOURS[finding.verdict])
    click.echo(f"{verdict} {said}", color=False if os.environ.get("NO_COLOR") else None)
    if finding.repair:
        click.echo(f"{_INDENT}→ {finding.repair}")
