"""What Dagster's storage can do and its interface does not offer: single keys, single steps, outages.

SQLAlchemy, alembic and Dagster's storages, a second of imports, are imported where they are used: they are there
when the instance is open, and who never opens it does without.
"""

import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
)
from dagster._core.events.log import EventLogEntry

from dagster_taskiq.dagster_compat.api import deserialize_value, serialize_value

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

__all__ = [
    "backfill_status",
    "delete_values",
    "deserialize_entry",
    "event_of",
    "events_of_step",
    "is_stored",
    "outages",
    "put_value",
    "read_migration_scripts_once",
    "remove_run_tags",
    "run_ids_beginning_with",
    "values_under",
    "with_stored_tags",
]


_LOOK_BACK: Final = 50
"""Events of one type; those of other processes of the run may have come between."""


def events_of_step(
    instance: DagsterInstance, run_id: str, step_key: str | None, of_type: Iterable[DagsterEventType]
) -> list[DagsterEvent]:
    """The events of one step, or with None those of no step, in order.

    Dagster's own interface reads those of the whole run, which for a run of a thousand steps would be a million.
    """
    from dagster._core.storage.event_log import SqlEventLogStorage, SqlEventLogStorageTable
    from dagster._core.storage.sqlalchemy_compat import db_select

    storage = instance.event_log_storage
    kinds = set(of_type)
    if not isinstance(storage, SqlEventLogStorage):
        entries: Iterable[EventLogEntry] = instance.all_logs(run_id, of_type=kinds)
    else:
        table = SqlEventLogStorageTable.c
        query = (
            db_select([table.event])
            .where(table.run_id == run_id)
            .where(table.step_key.is_(None) if step_key is None else table.step_key == step_key)
            .where(table.dagster_event_type.in_([kind.value for kind in kinds]))
            .order_by(table.id.asc())
        )
        with storage.run_connection(run_id) as connection:
            entries = [deserialize_entry(row[0]) for row in connection.execute(query).fetchall()]
    events = [event for event in map(event_of, entries) if event is not None]
    return [event for event in events if event.step_key == step_key]


def values_under(instance: DagsterInstance, prefix: str) -> dict[str, str]:
    """All keys that begin so, and their values, of Dagster's key-value storage, which itself only answers for one key.

    Empty for a storage that is not SQL.
    """
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import KeyValueStoreTable
    from dagster._core.storage.sqlalchemy_compat import db_select

    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        return {}
    table = KeyValueStoreTable.c
    query = db_select([table.key, table.value]).where(table.key.startswith(prefix, autoescape=True))
    with storage.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query).fetchall()}


def backfill_status(instance: DagsterInstance, backfill_id: str) -> str | None:
    """The name of a backfill's status; None when there is no such backfill.

    Dagster's own interface reads the whole backfill, which for assets with many partitions is large.
    """
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import BulkActionsTable
    from dagster._core.storage.sqlalchemy_compat import db_select

    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        backfill = instance.get_backfill(backfill_id)
        return backfill.status.value if backfill is not None else None
    query = db_select([BulkActionsTable.c.status]).where(BulkActionsTable.c.key == backfill_id)
    with storage.connect() as connection:
        row = connection.execute(query).fetchone()
        return str(row[0]) if row is not None else None


def put_value(instance: DagsterInstance, key: str, value: str) -> None:
    """Set one key of Dagster's key-value storage, in one statement also on SQLite.

    There Dagster's own way is an insert that fails and an update.
    """
    from dagster._core.storage.runs import SqliteRunStorage
    from dagster._core.storage.runs.schema import KeyValueStoreTable
    from sqlalchemy.dialects import sqlite

    storage = instance.run_storage
    if isinstance(storage, SqliteRunStorage):
        insert = sqlite.insert(KeyValueStoreTable).values(key=key, value=value)
        with storage.connect() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["key"], set_={"value": value}))
        return
    instance.daemon_cursor_storage.set_cursor_values({key: value})


def delete_values(instance: DagsterInstance, keys: Iterable[str]) -> None:
    """Delete keys of Dagster's key-value storage, which itself only adds to them."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import KeyValueStoreTable

    storage, gone = instance.run_storage, list(keys)
    if gone and isinstance(storage, SqlRunStorage):
        with storage.connect() as connection:
            connection.execute(KeyValueStoreTable.delete().where(KeyValueStoreTable.c.key.in_(gone)))


def run_ids_beginning_with(instance: DagsterInstance, beginning: str, at_most: int) -> list[str]:
    """The ids of runs that begin so, the latest first. In a storage that is not SQL only the run with that very id."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable
    from dagster._core.storage.sqlalchemy_compat import db_select

    storage, runs = instance.run_storage, RunsTable.c
    if not isinstance(storage, SqlRunStorage):
        return [beginning] if instance.has_run(beginning) else []
    query = db_select([runs.run_id]).where(runs.run_id.startswith(beginning, autoescape=True))
    with storage.connect() as connection:
        return [row[0] for row in connection.execute(query.order_by(runs.id.desc()).limit(at_most)).fetchall()]


def with_stored_tags(instance: DagsterInstance, run: DagsterRun) -> DagsterRun:
    """The run with all tags that it was given, in one query.

    Dagster keeps them twice: in the body of the run, which whoever writes its status, or another tag, at the same
    moment writes back as he has read it; and in rows of their own, which nobody overwrites.
    """
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunTagsTable
    from dagster._core.storage.sqlalchemy_compat import db_select

    storage, tags = instance.run_storage, RunTagsTable.c
    if not isinstance(storage, SqlRunStorage):
        return run
    query = db_select([tags.key, tags.value]).where(tags.run_id == run.run_id)
    with storage.connect() as connection:
        rows = {row[0]: row[1] for row in connection.execute(query).fetchall()}
    return run.with_tags({**rows, **run.tags})


def remove_run_tags(instance: DagsterInstance, run_id: str, names: Iterable[str]) -> None:
    """Remove tags of a run; Dagster itself only adds to them. In a storage that is not SQL they become empty."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable, RunTagsTable

    storage, gone = instance.run_storage, set(names)
    run = instance.get_run_by_id(run_id)
    if run is None:
        return
    if not isinstance(storage, SqlRunStorage):
        instance.add_run_tags(run_id, dict.fromkeys(gone, ""))
        return
    left = {name: value for name, value in run.tags.items() if name not in gone}
    tags, runs = RunTagsTable.c, RunsTable.c
    with storage.connect() as connection:
        body = serialize_value(run._replace(tags=left))
        connection.execute(RunsTable.update().where(runs.run_id == run_id).values(run_body=body))
        connection.execute(RunTagsTable.delete().where(tags.run_id == run_id).where(tags.key.in_(gone)))


def read_migration_scripts_once() -> None:
    """Have alembic keep what it has read of Dagster's migration scripts, in this process and its forks.

    For every SQLite file that Dagster opens, and it has one for each run, alembic loads some ninety Python files, two
    or three times; that was half of a short run (measured). The scripts do not change while a process lives.
    """
    from alembic.script import ScriptDirectory

    read = ScriptDirectory.from_config
    if getattr(read, "keeps", False):
        return
    kept = lru_cache(maxsize=8)(read)

    def from_config(config: "Config") -> "ScriptDirectory":
        # Dagster makes one configuration for each of its storages and keeps it, so it can be the key. Users'
        # migrations are read as ever: they may change while an op runs.
        ours = (config.get_main_option("script_location") or "").startswith("dagster")
        return kept(config) if ours else read(config)

    from_config.keeps = True  # type: ignore[attr-defined]
    ScriptDirectory.from_config = from_config  # type: ignore[method-assign]


def deserialize_entry(text: str) -> EventLogEntry:
    """An event log entry from what `serialize_value` made of it."""
    return deserialize_value(text, EventLogEntry)


def event_of(entry: EventLogEntry) -> DagsterEvent | None:
    """The Dagster event in an event log entry; None for a plain log line."""
    event = entry.dagster_event
    return event if isinstance(event, DagsterEvent) else None


def outages() -> tuple[type[Exception], ...]:
    """What Dagster's storage raises when its database cannot be reached, or is too busy; it may work again later.

    A `TimeoutError` is among them: a database that does not answer is away.
    """
    from sqlalchemy.exc import InterfaceError, OperationalError

    errors: list[type[Exception]] = [OperationalError, InterfaceError, TimeoutError]
    for module, name in (
        ("dagster_postgres.utils", "DagsterPostgresException"),
        ("dagster_mysql.utils", "DagsterMySQLException"),
    ):
        if module in sys.modules:  # or else that storage is not in use
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def with_causes(error: BaseException) -> str:
    """The texts of an error and of its causes, outermost first, each once.

    Of SQLAlchemy's errors only what the database's driver says: the rest is the statement, and a link.
    """
    from sqlalchemy.exc import DBAPIError

    texts: dict[str, None] = {}
    link: BaseException | None = error
    while link is not None:
        said = link.orig if isinstance(link, DBAPIError) and link.orig is not None else link
        texts[str(said).strip() or type(said).__name__] = None
        link = link.__cause__
    return ": ".join(texts)


def is_stored(instance: DagsterInstance, entry: EventLogEntry) -> bool:
    """Whether the log of its run holds this very event, by its time (in microseconds), step and type."""
    kind = entry.dagster_event_type
    page = instance.get_records_for_run(entry.run_id, of_type=kind, limit=_LOOK_BACK, ascending=False)
    return any(
        (found.timestamp, found.step_key, found.dagster_event_type) == (entry.timestamp, entry.step_key, kind)
        for found in (record.event_log_entry for record in page.records)
    )
