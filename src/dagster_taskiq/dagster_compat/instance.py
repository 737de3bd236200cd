"""What `$DAGSTER_HOME/dagster.yaml` says, without opening what it names: no database, no launcher, no connection."""

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from dagster import DagsterInstance

from dagster_taskiq.dagster_compat.api import ConfigurableClassData, InstanceRef

__all__ = ["import_what_opening_takes", "read_instance_ref"]


def read_instance_ref() -> InstanceRef:
    """The reference of the instance that `DagsterInstance.get` opens. Raises what that raises for a wrong file."""
    home = Path(os.environ.get("DAGSTER_HOME") or ".").expanduser()
    if not home.is_absolute() or not home.is_dir():
        with DagsterInstance.get() as instance:  # raises, and says what is wrong with it
            return instance.get_ref()
    return InstanceRef.from_dir(str(home))


def import_what_opening_takes(reference: InstanceRef) -> None:
    """Import the modules of the instance's storages and its other parts. A module that cannot be imported is left out.

    Whoever opens the instance finds out, and says so.
    """
    for part in reference:
        if isinstance(part, ConfigurableClassData):
            with suppress(Exception):
                import_module(part.module_name)
