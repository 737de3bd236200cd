"""Single keys of Dagster's key-value storage: read, compared and swapped, found by their order.

Every call that decides something is one statement, so it is decided by the database: by SQLite, PostgreSQL and MySQL
alike. By default MySQL takes upper and lower case, and accents, for the same, in keys and in values: those that are to
be told apart must differ in more.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dagster import DagsterInstance, DagsterRunStatus

from dagster_taskiq._time_limit import check_time
from dagster_taskiq.dagster_compat.storage import put_value
from dagster_taskiq.errors import DagsterTaskiqError

if TYPE_CHECKING:
    from dagster._core.storage.runs import SqlRunStorage


def values_and_runs(
    instance: DagsterInstance, prefix: str, status: DagsterRunStatus, others: Iterable[DagsterRunStatus]
) -> tuple[dict[str, str], set[str], bool]:
    """All keys that begin so, without that beginning, and their values; and the ids of all runs of that status.

    And whether there is a run of one of the other statuses. In one query.
    """
    from dagster._core.storage.runs.schema import KeyValueStoreTable, RunsTable
    from sqlalchemy import literal, null, select, union_all

    table, runs = KeyValueStoreTable.c, RunsTable.c
    values = select(table.key, table.value).where(table.key.startswith(prefix, autoescape=True))
    ids = select(runs.run_id, null()).where(runs.status == status.value)
    other = select(runs.run_id).where(runs.status.in_([one.value for one in others])).limit(1).subquery()
    with _sql_storage(instance).connect() as connection:
        rows = connection.execute(union_all(values, ids, select(literal(""), other.c.run_id))).fetchall()
    stored = {row[0].removeprefix(prefix): row[1] for row in rows if row[0] and row[1] is not None}
    return stored, {row[0] for row in rows if row[1] is None}, any(not row[0] for row in rows)


def read_values(instance: DagsterInstance, keys: Iterable[str]) -> dict[str, str]:
    """The values of those keys of Dagster's key-value storage that are there."""
    wanted = set(keys)
    return dict(instance.daemon_cursor_storage.get_cursor_values(wanted)) if wanted else {}


def put_value_and_read(instance: DagsterInstance, key: str, value: str, others: Sequence[str]) -> dict[str, str]:
    """Set one key of Dagster's key-value storage; the values of those others that are there.

    On PostgreSQL in one statement: it is what every worker asks all the time. On SQLite and MySQL in two.
    """
    from dagster._core.storage.runs.schema import KeyValueStoreTable
    from sqlalchemy import select
    from sqlalchemy.dialects import postgresql

    with _sql_storage(instance).connect() as connection:
        if connection.dialect.name == "postgresql":
            table = KeyValueStoreTable.alias("other").c  # or else it would be the row that was just written
            insert = postgresql.insert(KeyValueStoreTable).values(key=key, value=value)
            upsert = insert.on_conflict_do_update(index_elements=["key"], set_={"value": value}).returning(
                *[select(table.value).where(table.key == other).scalar_subquery() for other in others]
            )
            found = connection.execute(upsert).fetchone()
            return {other: text for other, text in zip(others, found or (), strict=True) if text is not None}
    put_value(instance, key, value)
    return read_values(instance, others)


def insert_value(instance: DagsterInstance, key: str, value: str) -> bool:
    """Set a key of Dagster's key-value storage that is not there yet. False: it is. One statement decides that.

    Raises `TimeoutError` when the thread's `time_limit` is over.
    """
    from dagster._core.storage.runs.schema import KeyValueStoreTable
    from sqlalchemy.exc import IntegrityError

    check_time()  # a claim that comes late would be nobody's
    try:
        with _sql_storage(instance).connect() as connection:
            connection.execute(KeyValueStoreTable.insert().values(key=key, value=value))
    except IntegrityError:
        return False
    return True


def replace_value(instance: DagsterInstance, key: str, old: str, new: str) -> bool:
    """Set a key of Dagster's key-value storage that has the value `old`. False: it has another one, or is not there.

    One statement decides that. `new` must differ from `old`, or else two would have it. Raises `TimeoutError` when the
    thread's `time_limit` is over.
    """
    from dagster._core.storage.runs.schema import KeyValueStoreTable

    table = KeyValueStoreTable.c
    check_time()
    update = KeyValueStoreTable.update().where(table.key == key).where(table.value == old).values(value=new)
    with _sql_storage(instance).connect() as connection:
        return int(connection.execute(update).rowcount) == 1


def delete_value(instance: DagsterInstance, key: str, value: str) -> None:
    """Delete a key of Dagster's key-value storage, if it has this value."""
    from dagster._core.storage.runs.schema import KeyValueStoreTable

    table = KeyValueStoreTable.c
    with _sql_storage(instance).connect() as connection:
        connection.execute(KeyValueStoreTable.delete().where(table.key == key).where(table.value == value))


def values_between(instance: DagsterInstance, low: str, high: str, at_most: int | None = None) -> dict[str, str]:
    """The keys of Dagster's key-value storage from `low` to before `high`, and their values: by its index.

    `at_most`: only so many of them, the first ones.

    A search for a prefix reads the whole table of a PostgreSQL whose collation is not "C". In any other one punctuation
    may not count, so the keys and both limits must begin with the same characters, and go on with digits and letters.
    """
    from dagster._core.storage.runs.schema import KeyValueStoreTable
    from dagster._core.storage.sqlalchemy_compat import db_select

    table = KeyValueStoreTable.c
    query = db_select([table.key, table.value]).where(table.key >= low).where(table.key < high)
    if at_most is not None:
        query = query.order_by(table.key).limit(at_most)
    with _sql_storage(instance).connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query).fetchall()}


def delete_values_between(instance: DagsterInstance, low: str, high: str) -> None:
    """Delete the keys that `values_between` gives."""
    from dagster._core.storage.runs.schema import KeyValueStoreTable

    table = KeyValueStoreTable.c
    with _sql_storage(instance).connect() as connection:
        connection.execute(KeyValueStoreTable.delete().where(table.key >= low).where(table.key < high))


def _sql_storage(instance: DagsterInstance) -> "SqlRunStorage":
    """Where Dagster keeps its runs and its key-value storage. Raises `DagsterTaskiqError` when that is not SQL."""
    from dagster._core.storage.runs import SqlRunStorage

    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        raise DagsterTaskiqError(
            f"{type(storage).__name__} keeps the runs of this instance; claims need one of Dagster's own SQL storages:"
            " SQLite, PostgreSQL, MySQL"
        )
    return storage
