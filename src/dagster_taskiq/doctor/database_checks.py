"""Does every connection to PostgreSQL or MySQL have a bound? Knows their parameters; asks nobody."""

import json
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, urlencode

from dagster import DagsterInstance

from dagster_taskiq.dagster_compat.connections import (
    CONNECT_PARAMETERS,
    STATEMENT_TIMEOUT_S,
    configured_connection,
)
from dagster_taskiq.dagster_compat.mysql_connections import CONNECT_TIMEOUTS, is_mysql, mysql_can_be_bounded
from dagster_taskiq.doctor.finding import Finding, ok

_CHECK: Final = "database timeouts"
_ON_BY_DEFAULT: Final = {"keepalives"}
_STATEMENT_TIMEOUT: Final = f"-c statement_timeout={STATEMENT_TIMEOUT_S * 1_000}"


def connection_bounds(instance: DagsterInstance) -> Finding | None:
    """Of Dagster's webserver and daemon, which take what `dagster.yaml` says. None for another database."""
    configured = configured_connection(instance)
    if configured is None:
        return _mysql_bounds(instance)
    missing: dict[str, object] = {
        name: value
        for name, value in CONNECT_PARAMETERS.items()
        if name not in configured.parameters and name not in _ON_BY_DEFAULT
    }
    options = configured.parameters.get("options", "")
    if "statement_timeout" not in options:
        missing["options"] = f"{options} {_STATEMENT_TIMEOUT}".strip()
    if not missing:
        return ok(_CHECK, "the connections of all processes have bounds")
    reason = "webserver and daemon may wait for ever for a database that does not answer: "
    reason += ", ".join("statement_timeout" if name == "options" else name for name in missing)
    return Finding(_CHECK, "warning", reason, _repair(missing, as_url=configured.as_url))


def _repair(missing: Mapping[str, object], *, as_url: bool) -> str:
    if as_url:
        return f"add to postgres_url: ?{urlencode(missing, quote_via=quote)}"
    return f"add to postgres_db: params: {json.dumps(missing)}"


def _mysql_bounds(instance: DagsterInstance) -> Finding | None:
    """dagster-mysql takes no limits of statements from `dagster.yaml`, so only those of connecting are asked for."""
    engine = getattr(instance.run_storage, "_engine", None)
    if not is_mysql(engine):
        return None
    if not mysql_can_be_bounded(engine):
        reason = (
            "workers may wait for ever for a MySQL that does not answer: its driver cannot be told how long to wait"
        )
        return Finding(_CHECK, "warning", reason, "pip install 'mysql-connector-python>=9.2'")
    if any(name in engine.url.query for name in CONNECT_TIMEOUTS):
        return ok(_CHECK, "connections of all processes have a bound, and the calls of workers")
    reason = f"webserver and daemon may wait for ever to connect to a MySQL that does not answer: {CONNECT_TIMEOUTS[0]}"
    return Finding(
        _CHECK, "warning", reason, f"write mysql_url, not mysql_db, and add to it: ?{CONNECT_TIMEOUTS[0]}=10"
    )
