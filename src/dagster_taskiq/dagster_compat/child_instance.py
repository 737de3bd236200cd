"""Dagster's instance inside a child. Knows that the worker has opened it before, and that a database may be away."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final

import yaml
from dagster import DagsterInstance

from dagster_taskiq._retry import DATABASE_RETRY_S, retry_blocking
from dagster_taskiq._time_limit import limited_until, time_limit
from dagster_taskiq.dagster_compat.api import ConfigurableClassData, InstanceRef
from dagster_taskiq.dagster_compat.connections import READ_S, bound_connections, is_bounded
from dagster_taskiq.dagster_compat.mysql_connections import bounded_while_opening
from dagster_taskiq.dagster_compat.storage import outages

__all__ = ["open_in_child"]

_POSTGRES: Final = "dagster_postgres"


@contextmanager
def open_in_child(reference: InstanceRef) -> Iterator[DagsterInstance]:
    """The instance, in a process whose worker has opened it before; with its connections bounded, and shared.

    What Dagster and ops read from a server, they read again while it is away: Dagster would have the run fail.
    """
    without = _without_looking_for_tables(reference)
    with bounded_while_opening(READ_S):  # on MySQL Dagster asks the server all the same
        opened = retry_blocking(
            lambda: DagsterInstance.from_ref(without), doing="open the instance", on=outages(), for_s=DATABASE_RETRY_S
        )
    with opened as instance:
        bound_connections(instance, ours=True)
        for storage in (instance.run_storage, instance.event_log_storage):
            if is_bounded(storage):
                _read_patiently(storage)
        yield instance


def _read_patiently(storage: Any) -> None:
    """Each reading method of a storage, in this process."""
    for name in dir(type(storage)):
        if name.startswith(("get_", "has_")) and callable(read := getattr(storage, name)):
            setattr(storage, name, _patient(read))


def _patient(read: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(read)
    def read_again(*args: Any, **kwargs: Any) -> Any:
        if limited_until() is not None:  # whoever set the limit is patient, or this is a part of another read
            return read(*args, **kwargs)

        def once() -> Any:
            with time_limit(READ_S):
                return read(*args, **kwargs)

        return retry_blocking(once, doing="read from the database", on=outages(), for_s=DATABASE_RETRY_S)

    return read_again


def _without_looking_for_tables(reference: InstanceRef) -> InstanceRef:
    """The worker has looked. It takes a connection, and some queries, for each of the storages."""
    storages: dict[str, Any] = {
        name: _configured(part) for name, part in reference._asdict().items() if name.endswith("storage_data")
    }
    return reference._replace(**storages)


def _configured(part: ConfigurableClassData | None) -> ConfigurableClassData | None:
    if part is None or part.module_name.partition(".")[0] != _POSTGRES:
        return part
    config = {"should_autocreate_tables": False} | yaml.safe_load(part.config_yaml)
    return ConfigurableClassData(part.module_name, part.class_name, yaml.safe_dump(config))
