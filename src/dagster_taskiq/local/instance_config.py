"""The `dagster.yaml` of the local environment: the user's own, and what it lacks.

Knows keys of that file; not processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from dagster_taskiq.dagster_compat.instance import default_parts
from dagster_taskiq.local.process_manager import StartFailed

FILE: Final = "dagster.yaml"
_OURS: Final = "# Written by dagster-taskiq; written again at every start.\n"
_LAUNCHER: Final = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher"}
_COORDINATOR: Final = {"module": "dagster_taskiq.coordinator", "class": "TaskiqRunCoordinator"}
_STORAGES: Final = frozenset({"storage", "run_storage", "event_log_storage", "schedule_storage"})


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """Where the file is written, where what Dagster stores in files goes, and the user's own configuration."""

    folder: Path
    storage: Path
    own: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    """The user's own file, if there is one."""

    @classmethod
    def found(cls, temporary: Path, home: Path | None, dagster_home: str | None, here: Path) -> "InstanceConfig":
        """As `dagster dev` finds it: in `home` or `$DAGSTER_HOME`, which keep the storage, or in the current folder.

        A file of the user is never changed: then ours is in `temporary`. Raises `StartFailed`.
        """
        if home is not None:
            kept = home.absolute()
            kept.mkdir(parents=True, exist_ok=True)
            own = _read(kept / FILE)
            return cls(kept, kept) if own is None else cls(temporary, kept, own, str(kept / FILE))
        if dagster_home:
            kept = Path(dagster_home).expanduser().absolute()
            kept.mkdir(parents=True, exist_ok=True)
            return cls(temporary, kept, _read(kept / FILE) or {}, str(kept / FILE))
        return cls(temporary, temporary, _read(here / FILE) or {}, str(here / FILE))

    def write(self, queue: Mapping[str, str], config_source: Mapping[str, Any]) -> list[str]:
        """Write the file. What the user has to know, in words: that it is his own, and what of it is not used.

        `queue`: where the launcher's queue is. `config_source`: of the launcher, if the user has none.
        """
        document = dict(self.own)
        changes = [f"using {self.source}, and its storage"] if self.own else []
        launcher = dict(document.get("run_launcher") or _LAUNCHER)
        if launcher.get("class") != _LAUNCHER["class"]:
            changes.append(f"run_launcher of {self.source} is not used: here it is TaskiqRunLauncher")
            launcher = dict(_LAUNCHER)
        config = {"config_source": dict(config_source), **(launcher.get("config") or {})}
        if "queue_url" in config:
            changes.append(f"queue_url of {self.source} is not used: here the queue is the embedded one")
        document["run_launcher"] = {**launcher, "config": {**config, **queue}}
        if not self._has_a_run_queue():
            document["run_coordinator"] = dict(_COORDINATOR)
        if self.storage != self.folder:
            document = default_parts(self.storage, sqlite=not _STORAGES & document.keys()) | document
        document = {"telemetry": {"enabled": False}, "nux": {"enabled": False}, **document}
        (self.folder / FILE).write_text(_OURS + yaml.safe_dump(document, sort_keys=False), "utf-8")
        return changes

    def _has_a_run_queue(self) -> bool:
        limits = (self.own.get("concurrency") or {}).get("runs") or {}
        return bool({"run_coordinator", "run_queue"} & self.own.keys()) or "max_concurrent_runs" in limits


def _read(path: Path) -> dict[str, Any] | None:
    """A user's file; None when there is none, or it is one of ours."""
    if not path.is_file() or (text := path.read_text("utf-8")).startswith(_OURS):
        return None
    try:
        document = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise StartFailed(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise StartFailed(f"{path} has no settings in it")
    return document
