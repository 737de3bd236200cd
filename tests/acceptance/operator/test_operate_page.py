"""The blocks of `docs/operate.md`, each command as an operator gives it, over a run that waits."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.shell import blocks

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

PAGE = Path(__file__).parents[3] / "docs" / "operate.md"


def commands() -> Iterator[list[str]]:
    for block in blocks(PAGE):
        if block.language == "bash":
            yield from (shlex.split(line)[1:] for line in block.text.splitlines())


def test_an_operator_holds_the_fleet_looks_and_stops_everything(endpoint: str) -> None:
    given = list(commands())
    assert len(given) > 3
    with open_platform(endpoint) as platform:
        run_id = platform.launch("sleepy_job")
        for command in given:
            asks = command[:2] == ["run", "cancel"] and "--dry-run" not in command
            said = platform.command(*command, *(["--yes"] if asks else []))
            assert said.returncode == 0, said
            assert (platform.status(run_id) is DagsterRunStatus.CANCELED) is asks, said
        assert run_id[:8] in said.stdout
