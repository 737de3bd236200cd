"""Each command of ours that a page names is there, with the options that the page gives it."""

import re
from pathlib import Path

import click
import pytest

import dagster_taskiq
from dagster_taskiq.cli import main

ROOT = Path(dagster_taskiq.__file__).parents[2]
PAGES = [
    *(page for page in sorted(ROOT.glob("*.md")) if page.name != "CHANGELOG.md"),  # it has what was, too
    *(page for page in sorted(ROOT.glob("docs/**/*.md")) if page.parent.name != "decisions"),
    *sorted(ROOT.glob("examples/**/*.md")),
]
_COMMAND = re.compile(r"(?<!install )\bdagster-taskiq ([a-z-][^`\n|#&;)]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_on_it_is_there(page: Path) -> None:
    wrong = [line for line in _commands(page.read_text()) if _trouble(line)]
    assert [(line, _trouble(line)) for line in wrong] == []


def _commands(text: str) -> list[str]:
    """What stands in code: blocks, and words between backticks."""
    code = re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL)
    return sorted(
        {line for part in code for line in re.findall(r"(?<!install )\bdagster-taskiq ([a-z-][^`\n|#&;)]*)", part)}
    )


def _trouble(line: str) -> str | None:
    command: click.Command = main
    words = line.split()
    while words and isinstance(command, click.Group) and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        found = command.get_command(click.Context(command), words.pop(0))
        if found is None:
            return "no such command"
        command = found
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"no {unknown[0]}" if unknown else None
