"""What is new in a run's event log? Knows Dagster's event log, and nothing else. Calls block on the database."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance

from dagster_taskiq import dagster_internals as core
from dagster_taskiq.database import patiently_asking

_PAGE: Final = 1000
_EVERY_KIND: Final = set(DagsterEventType)


class RunLog:
    """The run's event log, from where it was last read.

    On PostgreSQL ids are given before events are committed, so one with a smaller id can appear after one with a
    larger id has been read. Therefore it is read again now and then from a little earlier.
    """

    def __init__(self, instance: DagsterInstance, run_id: str) -> None:
        self._instance = instance
        self._run_id = run_id
        self._cursor: str | None = None
        self._checkpoint: str | None = None
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()

    def new_events(self) -> Iterator[DagsterEvent]:
        """What has been written since."""
        while True:
            page = patiently_asking(
                lambda: self._instance.get_records_for_run(
                    self._run_id, self._cursor, of_type=_EVERY_KIND, limit=_PAGE
                ),
                "read the event log",
            )
            self._cursor = page.cursor
            yield from self._unseen(page.records)
            if not page.has_more:
                return

    def look_again(self) -> None:
        """Have the next `new_events` begin where the log had been read at the last call of this."""
        self._cursor, self._checkpoint = self._checkpoint, self._cursor
        self._seen_before, self._seen = self._seen, set()

    def _unseen(self, records: Sequence[Any]) -> Iterator[DagsterEvent]:
        for record in records:
            if record.storage_id not in self._seen and record.storage_id not in self._seen_before:
                self._seen.add(record.storage_id)
                event = core.event_of(record.event_log_entry)
                if event is not None:
                    yield event
