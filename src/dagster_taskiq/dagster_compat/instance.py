"""What `$DAGSTER_HOME/dagster.yaml` says, without opening what it names: no database, no launcher, no connection."""

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import yaml
from dagster import DagsterInstance

from dagster_taskiq.dagster_compat.api import ConfigurableClassData, InstanceRef
from dagster_taskiq.dagster_compat.mysql_connections import bounded_while_opening
from dagster_taskiq.errors import DriverMissing

__all__ = ["default_parts", "import_what_opening_takes", "open_instance", "read_env_file", "read_instance_ref"]

_CONNECT_S: Final = "10"
_NO_DRIVER: Final = (
    "No module named 'psycopg': the URL of Dagster's database asks for psycopg 3, as SQLAlchemy 2.1 also reads"
    " postgresql://; install dagster-taskiq[postgres], or write postgresql+psycopg2:// in the URL"
)


def read_instance_ref() -> InstanceRef:
    """The reference of the instance that `DagsterInstance.get` opens. Raises what that raises for a wrong file."""
    home = Path(os.environ.get("DAGSTER_HOME") or ".").expanduser()
    if not home.is_absolute() or not home.is_dir():
        with DagsterInstance.get() as instance:  # raises, and says what is wrong with it
            return instance.get_ref()
    return InstanceRef.from_dir(str(home))


def default_parts(home: Path, *, sqlite: bool) -> dict[str, Any]:
    """What Dagster would store in files of that DAGSTER_HOME, as sections of `dagster.yaml` for a file elsewhere.

    `sqlite`: the databases, too.
    """
    defaults = InstanceRef.config_defaults(str(home))
    names = (
        ("storage", "local_artifact_storage", "compute_logs") if sqlite else ("local_artifact_storage", "compute_logs")
    )
    parts: dict[str, Any] = {}
    for name in names:
        part = defaults[name]
        assert part is not None  # noqa: S101 - for the type checker: these three have defaults
        described = {"module": part.module_name, "class": part.class_name, "config": yaml.safe_load(part.config_yaml)}
        parts[name] = {"custom": described} if name == "storage" else described
    return parts


def read_env_file(folder: Path) -> dict[str, str]:
    """The variables in `.env` of that folder, as `dagster dev` reads them; they win over the environment."""
    from dagster._core.secrets.env_file import get_env_var_dict

    return get_env_var_dict(str(folder))


def import_what_opening_takes(reference: InstanceRef) -> None:
    """Import the modules of the instance's storages and its other parts. A module that cannot be imported is left out.

    Whoever opens the instance finds out, and says so.
    """
    for part in reference:
        if isinstance(part, ConfigurableClassData):
            with suppress(Exception):
                import_module(part.module_name)


def open_instance() -> DagsterInstance:
    """As `DagsterInstance.get`; a database that accepts connections and never answers makes it raise, not hang.

    Raises `DriverMissing` when the database's URL asks for psycopg 3, and that is not there.

    Our own bounds hold once the instance is open. Until then libpq and MySQL's driver have one, and users' code does
    not see it later.
    """
    bounded = "PGCONNECT_TIMEOUT" in os.environ
    os.environ.setdefault("PGCONNECT_TIMEOUT", _CONNECT_S)
    try:
        with bounded_while_opening(float(_CONNECT_S)):
            return DagsterInstance.get()
    except Exception as error:
        if _lacks_psycopg(error):
            raise DriverMissing(_NO_DRIVER) from error
        raise
    finally:
        if not bounded:
            del os.environ["PGCONNECT_TIMEOUT"]


def _lacks_psycopg(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
            return True
        error = error.__cause__ or error.__context__
    return False
