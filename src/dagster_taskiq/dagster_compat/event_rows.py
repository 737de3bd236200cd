"""Parts of a run's event log, by what its table says without reading the events themselves: type, step, time.

A log may have a million events, and to read and parse one costs many times what its row costs.
SQLAlchemy is imported where it is used, as in `storage`.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from dagster import DagsterEventType, DagsterInstance
from dagster._core.events.log import EventLogEntry

from dagster_taskiq.dagster_compat.api import deserialize_value

__all__ = ["EventRow", "count_events", "entries_of_run", "entries_of_steps", "event_rows", "latest_of_steps"]

_PAGE: Final = 5_000
_STEPS_IN_A_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class EventRow:
    """One row. `entry`: the event itself, where it was asked for."""

    id: int
    at: float
    """In seconds since the epoch."""
    kind: str | None
    """The value of a `DagsterEventType`; None for a plain log line."""
    step_key: str | None
    entry: EventLogEntry | None = None


def event_rows(
    instance: DagsterInstance, run_id: str, kinds: Collection[DagsterEventType], most: int
) -> list[EventRow]:
    """The rows of these types in order, without their events; the first `most` of them. Pages of five thousand."""
    if not _is_sql(instance):
        return _from_interface(instance, run_id, kinds, most)
    found: list[EventRow] = []
    while len(found) < most:
        after = found[-1].id if found else 0
        page = list(_select(instance, run_id, kinds, after=after, most=min(_PAGE, most - len(found))))
        found += page
        if len(page) < _PAGE:
            break
    return found[:most]


def entries_of_run(
    instance: DagsterInstance, run_id: str, kinds: Collection[DagsterEventType], *, first: int, last: int
) -> tuple[list[EventRow], bool]:
    """The events of these types that are about no step: the first and the last ones, in order.

    And whether some between them are missing.
    """
    if not _is_sql(instance):
        rows = [row for row in _from_interface(instance, run_id, kinds, first + last) if row.step_key is None]
        return rows, len(rows) == first + last
    head = list(_select(instance, run_id, kinds, step_keys=(), most=first, events=True))
    if len(head) < first:
        return head, False
    tail = list(
        _select(instance, run_id, kinds, step_keys=(), after=head[-1].id, most=last + 1, events=True, backwards=True)
    )
    return head + list(reversed(tail[:last])), len(tail) > last


def entries_of_steps(
    instance: DagsterInstance,
    run_id: str,
    step_keys: Collection[str],
    kinds: Collection[DagsterEventType],
    most: int,
) -> list[EventRow]:
    """The events of these types that are about these steps, `most` of them, in order."""
    if not step_keys:
        return []
    if not _is_sql(instance):
        wanted = set(step_keys)
        return [row for row in _from_interface(instance, run_id, kinds, most) if row.step_key in wanted]
    found: list[EventRow] = []
    keys = list(step_keys)
    for start in range(0, len(keys), _STEPS_IN_A_QUERY):
        some = keys[start : start + _STEPS_IN_A_QUERY]
        found += _select(instance, run_id, kinds, step_keys=some, most=most - len(found), events=True)
    return sorted(found, key=lambda row: row.id)


def count_events(instance: DagsterInstance, run_id: str) -> tuple[int, float | None]:
    """How many events and lines the log has, and when the last one was written; 0 and None for an empty one."""
    if not _is_sql(instance):
        entries = instance.all_logs(run_id)
        return len(entries), max((entry.timestamp for entry in entries), default=None)
    from dagster._core.storage.sqlalchemy_compat import db_select
    from sqlalchemy import func

    table = _table()
    query = db_select([func.count(), func.max(table.timestamp)]).where(table.run_id == run_id)
    with _connection(instance, run_id) as connection:
        count, last = connection.execute(query).fetchone()
    return count, _seconds(last) if last is not None else None


def latest_of_steps(instance: DagsterInstance, run_id: str, step_keys: Sequence[str]) -> dict[str, float]:
    """When the last event or line of each of these steps was written."""
    if not step_keys:
        return {}
    if not _is_sql(instance):
        wanted, found = set(step_keys), {}
        for entry in instance.all_logs(run_id):
            if entry.step_key in wanted:
                found[str(entry.step_key)] = entry.timestamp
        return found
    from dagster._core.storage.sqlalchemy_compat import db_select
    from sqlalchemy import func

    table = _table()
    query = (
        db_select([table.step_key, func.max(table.timestamp)])
        .where(table.run_id == run_id)
        .where(table.step_key.in_(list(step_keys)[:_STEPS_IN_A_QUERY]))
        .group_by(table.step_key)
    )
    with _connection(instance, run_id) as connection:
        return {row[0]: _seconds(row[1]) for row in connection.execute(query).fetchall()}


def _select(
    instance: DagsterInstance,
    run_id: str,
    kinds: Collection[DagsterEventType],
    *,
    most: int,
    step_keys: Collection[str] | None = None,
    after: int = 0,
    events: bool = False,
    backwards: bool = False,
) -> Iterator[EventRow]:
    """`step_keys`: None for all, empty for what is about no step."""
    from dagster._core.storage.sqlalchemy_compat import db_select

    table = _table()
    columns = [table.id, table.timestamp, table.dagster_event_type, table.step_key, *([table.event] if events else [])]
    query = (
        db_select(columns)
        .where(table.run_id == run_id)
        .where(table.id > after)
        .where(table.dagster_event_type.in_([kind.value for kind in kinds]))
        .order_by(table.id.desc() if backwards else table.id.asc())
        .limit(most)
    )
    if step_keys is not None:
        query = query.where(table.step_key.in_(list(step_keys)) if step_keys else table.step_key.is_(None))
    with _connection(instance, run_id) as connection:
        rows = connection.execute(query).fetchall()
    for row in rows:
        yield EventRow(
            row[0], _seconds(row[1]), row[2], row[3], deserialize_value(row[4], EventLogEntry) if events else None
        )


def _from_interface(
    instance: DagsterInstance, run_id: str, kinds: Collection[DagsterEventType], most: int
) -> list[EventRow]:
    """Of a storage that is not SQL."""
    found: list[EventRow] = []
    cursor = None
    while len(found) < most:
        page = instance.get_records_for_run(run_id, cursor, of_type=set(kinds), limit=_PAGE)
        for record in page.records:
            entry = record.event_log_entry
            kind = entry.dagster_event_type
            found.append(
                EventRow(record.storage_id, entry.timestamp, kind.value if kind else None, entry.step_key, entry)
            )
        cursor = page.cursor
        if not page.has_more:
            break
    return found[:most]


def _is_sql(instance: DagsterInstance) -> bool:
    from dagster._core.storage.event_log import SqlEventLogStorage

    return isinstance(instance.event_log_storage, SqlEventLogStorage)


def _table() -> Any:
    from dagster._core.storage.event_log import SqlEventLogStorageTable

    return SqlEventLogStorageTable.c


def _connection(instance: DagsterInstance, run_id: str) -> Any:
    storage: Any = instance.event_log_storage
    return storage.run_connection(run_id)


def _seconds(stored: datetime) -> float:
    """The table has times in UTC, without saying so."""
    return stored.replace(tzinfo=UTC).timestamp()
