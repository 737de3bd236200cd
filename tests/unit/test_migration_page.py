"""`docs/migrate-from-dagster-celery.md`: what it tells people to write is accepted."""

from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster import DagsterInstance
from tests.support.pages import blocks

from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.launcher import TaskiqRunLauncher

PAGE = "docs/migrate-from-dagster-celery.md"
BLOCKS = {block.title: block for block in blocks(PAGE) if block.title}


def test_the_new_configuration_is_one(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(BLOCKS["after: dagster.yaml"].text)
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        assert isinstance(instance.run_launcher, TaskiqRunLauncher)
        assert isinstance(instance.run_coordinator, TaskiqRunCoordinator)


@pytest.mark.parametrize("title", ["after: run configuration", "after: steps.yaml"])
def test_a_job_with_the_new_executor_takes_its_run_configuration(title: str) -> None:
    names: dict[str, dg.JobDefinition] = {}
    exec(BLOCKS["after"].text, names)  # noqa: S102 - the page's own text
    assert dg.validate_run_config(names["daily"], yaml.safe_load(BLOCKS[title].text))
