"""What the page says about shell completion completes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagster_taskiq.cli import main

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "command-line.md"
BLOCKS = dict(re.findall(r"^```(bash|zsh|fish)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
BESIDE = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_line_for_bash_completes_commands() -> None:
    asks = "COMP_WORDS=(dagster-taskiq run ca); COMP_CWORD=2; _dagster_taskiq_completion dagster-taskiq"
    done = subprocess.run(
        ["bash", "-ec", f"{BLOCKS['bash']}\ncomplete -p dagster-taskiq >&2\n{asks}\necho ${{COMPREPLY[@]}}"],
        env=BESIDE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "_dagster_taskiq_completion dagster-taskiq" in done.stderr
    assert done.stdout.split() == ["cancel"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    (variable, value) = re.findall(r"(_\w+)=(\w+) dagster-taskiq", BLOCKS[shell])[0]
    said = CliRunner().invoke(main, prog_name="dagster-taskiq", env={variable: value})
    assert said.exit_code == 0
    assert f"{variable}={shell}_complete" in said.output.replace("env ", "")


def test_options_are_completed() -> None:
    ask = {"COMP_WORDS": "dagster-taskiq worker start --ma", "COMP_CWORD": "3"}
    said = CliRunner().invoke(main, prog_name="dagster-taskiq", env=ask | {"_DAGSTER_TASKIQ_COMPLETE": "bash_complete"})
    assert {line.partition(",")[2] for line in said.output.splitlines()} == {"--max-runs", "--max-steps"}
