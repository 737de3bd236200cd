"""The `dagster.yaml` that `dev` makes of the user's own: what is added, what is kept, what is replaced."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterInstance

from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.local.instance_config import InstanceConfig
from dagster_taskiq.local.process_manager import StartFailed

QUEUE = {"queue_url": "http://127.0.0.1:1/1/q", "region_name": "us-east-1", "endpoint_url": "http://a:b@127.0.0.1:1"}
OURS = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher"}


class Folders:
    def __init__(self, root: Path) -> None:
        self.temporary, self.home, self.here = root / "temporary", root / "home", root / "here"
        for folder in (self.temporary, self.home, self.here):
            folder.mkdir()

    def made(self, own: Any, *, where: str = "home") -> tuple[dict[str, Any], list[str]]:
        """What is written for a user's file in that place, and what is said of it."""
        if own is not None:
            (getattr(self, where) / "dagster.yaml").write_text(yaml.safe_dump(own))
        dagster_home = str(self.home) if where == "home" else None
        config = InstanceConfig.found(self.temporary, None, dagster_home, self.here)
        changes = config.write(QUEUE, {"grace_seconds": 3})
        return yaml.safe_load((self.temporary / "dagster.yaml").read_text()), changes


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def test_what_is_missing_is_added_and_the_storage_is_the_users(folders: Folders) -> None:
    made, changes = folders.made({"run_retries": {"enabled": True}})
    assert made["run_retries"] == {"enabled": True}
    assert made["run_launcher"] == {**OURS, "config": {"config_source": {"grace_seconds": 3}, **QUEUE}}
    assert changes == [f"using {folders.home / 'dagster.yaml'}, and its storage"]
    with DagsterInstance.from_config(str(folders.temporary)) as instance:
        assert isinstance(instance.run_launcher, TaskiqRunLauncher)
        assert isinstance(instance.run_coordinator, TaskiqRunCoordinator)
        assert (folders.home / "history" / "runs.db").exists()
        assert instance.root_directory == str(folders.home)
    assert sorted(path.name for path in folders.temporary.iterdir()) == ["dagster.yaml"]


def test_storage_that_is_configured_is_left_alone(folders: Folders) -> None:
    storage = {"postgres": {"postgres_url": {"env": "URL"}}}
    made, _ = folders.made({"storage": storage})
    assert made["storage"] == storage
    made, _ = folders.made({"run_storage": {"module": "mine", "class": "Storage"}})
    assert "storage" not in made


@pytest.mark.parametrize(
    "own",
    [
        {"run_coordinator": {"module": "dagster", "class": "DefaultRunCoordinator"}},
        {"run_queue": {"max_concurrent_runs": 3}},
        {"concurrency": {"runs": {"max_concurrent_runs": 3}}},
    ],
)
def test_a_run_queue_that_is_configured_is_left_alone(folders: Folders, own: dict[str, Any]) -> None:
    made, _ = folders.made(own)
    assert made.get("run_coordinator") == own.get("run_coordinator")


def test_runs_go_to_the_embedded_queue_whatever_is_configured_and_it_says_so(folders: Folders) -> None:
    launcher = {**OURS, "config": {"queue_url": "https://real", "config_source": {"grace_seconds": 60}}}
    made, changes = folders.made({"run_launcher": launcher})
    assert made["run_launcher"]["config"] == {"config_source": {"grace_seconds": 60}, **QUEUE}
    file = folders.home / "dagster.yaml"
    assert changes[1:] == [f"queue_url of {file} is not used: here the queue is the embedded one"]
    made, changes = folders.made({"run_launcher": {"module": "dagster", "class": "DefaultRunLauncher"}})
    assert made["run_launcher"]["class"] == "TaskiqRunLauncher"
    assert changes[1:] == [f"run_launcher of {file} is not used: here it is TaskiqRunLauncher"]


def test_without_a_dagster_home_the_file_in_the_current_folder_counts(folders: Folders) -> None:
    made, _ = folders.made({"run_retries": {"enabled": True}}, where="here")
    assert made["run_retries"] == {"enabled": True}
    assert "storage" not in made, "it goes with the temporary folder"


def test_a_folder_for_dev_alone_has_our_file_and_one_of_the_user_is_never_changed(folders: Folders) -> None:
    config = InstanceConfig.found(folders.temporary, folders.home, None, folders.here)
    assert (config.folder, config.storage) == (folders.home, folders.home)
    config.write(QUEUE, {})
    assert InstanceConfig.found(folders.temporary, folders.home, None, folders.here) == config, "started again"
    (folders.home / "dagster.yaml").write_text("run_retries: {enabled: true}")
    config = InstanceConfig.found(folders.temporary, folders.home, None, folders.here)
    assert (config.folder, config.storage) == (folders.temporary, folders.home)
    config.write(QUEUE, {})
    assert (folders.home / "dagster.yaml").read_text() == "run_retries: {enabled: true}"


@pytest.mark.parametrize(("text", "says"), [("a: [", "cannot be read"), ("- a", "has no settings")])
def test_a_file_that_is_none(folders: Folders, text: str, says: str) -> None:
    (folders.here / "dagster.yaml").write_text(text)
    with pytest.raises(StartFailed, match=says):
        InstanceConfig.found(folders.temporary, None, None, folders.here)
