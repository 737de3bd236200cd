"""Many runs of Dagster's storage in few transactions: their statuses with their tags, and their events.

Dagster's own interface takes five transactions for every event that ends a run, each of which waits for the disk, and
does not look which status a run has when it writes the next one.
"""

import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, QueuedRunCoordinator
from dagster._core.events.log import EventLogEntry

from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, serialize_value

if TYPE_CHECKING:
    from dagster._core.storage.event_log import SqliteEventLogStorage
    from sqlalchemy.engine import Engine

_TRIES: Final = 20
_ENDS_BADLY: Final = frozenset({DagsterEventType.RUN_CANCELED, DagsterEventType.RUN_FAILURE})
_AT_ONCE: Final = 8
"""Threads that write events: each waits for the disk, or for the server, most of the time."""


def can_move_runs(instance: DagsterInstance) -> bool:
    """Whether `move_runs` can take runs from Dagster's queue: it is Dagster's own, in one of Dagster's SQL storages."""
    from dagster._core.storage.runs import SqlRunStorage

    return isinstance(instance.run_storage, SqlRunStorage) and isinstance(
        instance.run_coordinator, QueuedRunCoordinator
    )


def move_runs(
    instance: DagsterInstance,
    runs: Iterable[DagsterRun],
    old: DagsterRunStatus,
    new: DagsterRunStatus,
    tags: Mapping[str, Mapping[str, str]] | None = None,
) -> set[str]:
    """Give a status to those runs that have the status `old`, and their new tags; returns their ids.

    Each run is decided by one statement, so nobody who writes in between is overwritten. `tags`: by run, all that it is
    to have. Raises `TypeError` where `can_move_runs` is False.
    """
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable, RunTagsTable

    storage, rows, tag_rows = instance.run_storage, RunsTable.c, RunTagsTable.c
    if not isinstance(storage, SqlRunStorage):
        raise TypeError(type(storage).__name__)
    now, moved = datetime.now(UTC), set()
    values: dict[str, Any] = {"status": new.value, "update_timestamp": now}
    if new in FINISHED_STATUSES and storage.has_run_stats_index_cols():
        values["end_time"] = now.timestamp()
    with storage.connect() as connection:
        for run in runs:
            wanted = (tags or {}).get(run.run_id, run.tags)
            # The status in the body is not read (see `_row_to_run`), so the body only changes with the tags.
            body = {"run_body": serialize_value(run.with_tags(wanted).with_status(new))} if wanted != run.tags else {}
            update = RunsTable.update().where(rows.run_id == run.run_id).where(rows.status == old.value)
            if connection.execute(update.values(**values, **body)).rowcount != 1:
                continue
            moved.add(run.run_id)
            changed = {key for key in {*run.tags, *wanted} if run.tags.get(key) != wanted.get(key)}
            if changed:
                gone = RunTagsTable.delete().where(tag_rows.run_id == run.run_id).where(tag_rows.key.in_(changed))
                connection.execute(gone)
            if added := [{"run_id": run.run_id, "key": key, "value": wanted[key]} for key in changed & wanted.keys()]:
                connection.execute(RunTagsTable.insert(), added)
    return moved


def set_status(instance: DagsterInstance, run_id: str, status: DagsterRunStatus) -> DagsterRunStatus | None:
    """Give a run this status, without an event; returns the one that it had, or None when nothing had to be done.

    Whoever writes another status at the same moment is not overwritten unseen: it looks again. Raises `TimeoutError`
    when others write all the time, and `TypeError` for a storage that is not one of Dagster's SQL storages.
    """
    for _ in range(_TRIES):
        run = instance.get_run_by_id(run_id)
        if run is None or run.status is status:
            return None
        if move_runs(instance, [run], run.status, status):
            return run.status
    raise TimeoutError(f"others change the status of run {run_id} all the time")


def statuses_of(instance: DagsterInstance, run_ids: Sequence[str]) -> dict[str, DagsterRunStatus]:
    """The statuses of these runs, in one query; one that is not there is left out."""
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable
    from dagster._core.storage.sqlalchemy_compat import db_select

    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        found = {run_id: instance.get_run_by_id(run_id) for run_id in run_ids}
        return {run_id: run.status for run_id, run in found.items() if run is not None}
    query = db_select([RunsTable.c.run_id, RunsTable.c.status]).where(RunsTable.c.run_id.in_(run_ids))
    with storage.connect() as connection:
        return {row[0]: DagsterRunStatus(row[1]) for row in connection.execute(query).fetchall()}


def store_events(instance: DagsterInstance, events: Mapping[str, Sequence[DagsterEvent]]) -> dict[str, Exception]:
    """Write events, by run, into their logs; the status of a run does not follow them. Returns what failed, by run."""
    from dagster._core.storage.event_log import SqliteEventLogStorage

    storage, now = instance.event_log_storage, datetime.now(UTC).timestamp()
    entries = {run_id: [_entry(run_id, event, now) for event in some] for run_id, some in events.items()}

    def store(run_id: str) -> Exception | None:
        try:
            if isinstance(storage, SqliteEventLogStorage):
                _store_in_shard(storage, run_id, entries[run_id])
            else:
                for entry in entries[run_id]:
                    storage.store_event(entry)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other runs' events can be written
            return error
        return None

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="events") as pool:
        failed = {run_id: error for run_id, error in zip(entries, pool.map(store, entries), strict=True) if error}
    if isinstance(storage, SqliteEventLogStorage):
        with storage.index_connection() as connection:  # what sensors of run statuses read
            for run_id, some in entries.items():
                for entry in some if run_id not in failed else ():
                    if entry.is_dagster_event and entry.get_dagster_event().is_job_event:
                        connection.execute(storage.prepare_insert_event(entry))
    return failed


def _entry(run_id: str, event: DagsterEvent, now: float) -> EventLogEntry:
    return EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None,
        user_message="",
        # As Dagster writes it.
        level=logging.ERROR if event.event_type in _ENDS_BADLY else logging.INFO,
        run_id=run_id,
        timestamp=now,
        job_name=event.job_name,
        dagster_event=event,
    )


def _store_in_shard(storage: "SqliteEventLogStorage", run_id: str, entries: Iterable[EventLogEntry]) -> None:
    """All of a run's events in one transaction of its file, side by side with other files.

    Dagster opens them one after another, and looks into each for migrations. A file that is not there yet is its.
    """
    path = Path(storage.path_for_shard(run_id))
    if not path.exists():
        for entry in entries:
            storage.store_event(entry)
        return
    _shard.path = path
    with _shards().begin() as connection:
        for entry in entries:
            connection.execute(storage.prepare_insert_event(entry))


_shard = threading.local()
"""Which file the next connection of this thread is for."""


@lru_cache(maxsize=1)
def _shards() -> "Engine":
    """One engine for all files, which have the same tables: a third of the time was for engines and their SQL."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    return create_engine("sqlite://", creator=lambda: sqlite3.connect(_shard.path, timeout=60), poolclass=NullPool)
