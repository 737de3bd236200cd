"""The blocks of `docs/operate.md`, each command as an operator gives it, over a run that waits."""

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.pages import blocks, commands

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

PAGE = "docs/operate.md"


def test_an_operator_holds_the_fleet_looks_and_stops_everything(endpoint: str) -> None:
    given = [words[1:] for block in blocks(PAGE, "bash") for words in commands(block.text)]
    assert len(given) > 3
    with open_platform(endpoint) as platform:
        run_id = platform.launch("sleepy_job")
        for command in given:
            asks = command[:2] == ["run", "cancel"] and "--dry-run" not in command
            said = platform.command(*command, *(["--yes"] if asks else []))
            assert said.returncode == 0, said
            assert (platform.status(run_id) is DagsterRunStatus.CANCELED) is asks, said
        assert run_id[:8] in said.stdout
