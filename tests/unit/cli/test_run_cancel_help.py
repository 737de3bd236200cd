"""What the pages say of `run cancel` is what it takes."""

import re
import shlex
from pathlib import Path

import dagster_taskiq
from dagster_taskiq.cli.run_cancel import cancel

GUIDE = Path(dagster_taskiq.__file__).parents[2] / "CANCELLATION.md"


def test_the_guide_gives_commands_that_are_understood() -> None:
    help_text = cancel.help or ""
    commands = re.findall(r"^ *dagster-taskiq run cancel (.+)$", GUIDE.read_text() + help_text, re.MULTILINE)
    assert len(commands) >= 9
    for command in commands:
        cancel.make_context("cancel", shlex.split(command))
    assert set(re.findall(r"^ +(\d+)  ", help_text, re.MULTILINE)) == {"0", "1", "2", "3", "4", "130"}
