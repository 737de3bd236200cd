"""Where a command's settings come from: `-y FILE`, else the instance's run launcher, else only the environment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import QUEUE_URL_VARIABLE, SOURCE_KEYS, Settings

_RUN_CONFIG_KEYS: Final = {"execution", "ops", "resources", "loggers", "inputs"}
_EXECUTOR_KEYS: Final = {"max_concurrent", "tag_concurrency_limits", "retries", "step_dependency_config"}
"""Keys of the executor that the worker does not use."""


def configured(config_file: Path | None, **overrides: Any) -> Settings:
    """The settings for a command. Overrides (flags) win; those that are None are ignored. Raises `SettingsError`."""
    if config_file is not None:
        return Settings.from_config(_from_file(config_file), **overrides)
    settings = _from_instance()
    if settings is None:
        return Settings.from_config({}, **overrides)
    if all(value is None for value in overrides.values()):
        return settings
    return settings.overridden_by({}, **overrides)


def _from_instance() -> Settings | None:
    """Settings of `run_launcher` in `$DAGSTER_HOME/dagster.yaml`; None when the environment names the queue instead."""
    if not os.environ.get("DAGSTER_HOME"):
        if os.environ.get(QUEUE_URL_VARIABLE):
            return None
        raise SettingsError(
            f"no settings: set DAGSTER_HOME (the folder of dagster.yaml), or give -y FILE, or set {QUEUE_URL_VARIABLE}"
        )
    home = Path(os.environ["DAGSTER_HOME"])
    if home.is_dir() and not (home / "dagster.yaml").exists():
        if os.environ.get(QUEUE_URL_VARIABLE):
            return None
        raise SettingsError(
            f"there is no {home / 'dagster.yaml'}: is DAGSTER_HOME the right folder? Or give -y FILE,"
            f" or set {QUEUE_URL_VARIABLE}"
        )
    from dagster_shared.check import CheckError

    from dagster_taskiq.dagster_compat.instance import read_instance_ref

    # Without opening the instance: the database is for those commands that need it.
    reference = read_instance_ref()
    try:
        launcher = reference.run_launcher
    except CheckError as error:
        cause = f"{error}: {error.__context__}" if error.__context__ else str(error)
        raise SettingsError(f"run_launcher in $DAGSTER_HOME/dagster.yaml cannot be loaded: {cause}") from error
    settings = getattr(launcher, "settings", None)
    if isinstance(settings, Settings):
        return settings
    if os.environ.get(QUEUE_URL_VARIABLE):
        return None
    raise SettingsError(
        f"run_launcher in $DAGSTER_HOME/dagster.yaml is {type(launcher).__name__}: make it module"
        " dagster_taskiq.launcher, class TaskiqRunLauncher, or give -y FILE"
    )


def _from_file(path: Path) -> Mapping[str, Any]:
    """The configuration in a YAML file: an executor's run configuration, or only its keys."""
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not readable as YAML: {error}") from error
    document = _mapping(path, "the file", {} if document is None else document)
    if "execution" in document:
        if unknown := document.keys() - _RUN_CONFIG_KEYS:
            raise SettingsError(f"{path}: {min(map(str, unknown))!r} has no place beside 'execution'")
        document = _mapping(path, "execution", document["execution"] or {})
        if unknown := document.keys() - {"config"}:
            raise SettingsError(f"{path}: {min(map(str, unknown))!r} in 'execution'; only 'config' is known there")
        document = _mapping(path, "execution: config", document.get("config") or {})
        document = {key: value for key, value in document.items() if key not in _EXECUTOR_KEYS}
    resolved: Mapping[str, Any] = _resolved(document)
    if misplaced := [key for key in resolved if key in SOURCE_KEYS]:
        raise SettingsError(f"{path}: {misplaced[0]!r} belongs into config_source")
    return resolved


def _mapping(path: Path, where: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise SettingsError(f"{path}: {where} must be a mapping of settings, such as 'queue_url: https://…'")


def _resolved(value: Any) -> Any:
    """Replace Dagster's `{env: NAME}` by the value of the variable."""
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"env"}:
        name = str(value["env"])
        if name not in os.environ:
            raise SettingsError(f"the configuration asks for the environment variable {name}, which is not set")
        return os.environ[name]
    return {key: _resolved(nested) for key, nested in value.items()}
