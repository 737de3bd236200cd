"""The part of a run's event log that its story is made of, with bounds on what is read. Calls block on the database.

A run of thousands of steps has a log of up to millions of events. When its steps began and ended is in the columns of
the table. The events themselves are read of the run, and of those steps that will be shown.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance

from dagster_taskiq import errors
from dagster_taskiq.dagster_compat.event_rows import (
    EventRow,
    count_events,
    entries_of_run,
    entries_of_steps,
    event_rows,
    latest_of_steps,
)
from dagster_taskiq.dagster_compat.execution import was_interrupted
from dagster_taskiq.dagster_compat.storage import event_of
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import parse_event
from dagster_taskiq.story.text import one_line

Kind = DagsterEventType

OF_STEPS: Final = frozenset(
    {
        Kind.STEP_WORKER_STARTING,
        Kind.STEP_START,
        Kind.STEP_RESTARTED,
        Kind.STEP_SUCCESS,
        Kind.STEP_FAILURE,
        Kind.STEP_SKIPPED,
        Kind.STEP_UP_FOR_RETRY,
    }
)
OF_THE_RUN: Final = frozenset(
    {
        Kind.RUN_ENQUEUED,
        Kind.RUN_DEQUEUED,
        Kind.RUN_STARTING,
        Kind.RUN_START,
        Kind.RUN_CANCELING,
        Kind.RUN_CANCELED,
        Kind.RUN_FAILURE,
        Kind.RUN_SUCCESS,
        Kind.ENGINE_EVENT,
    }
)
_DETAILS: Final = frozenset({Kind.ENGINE_EVENT, Kind.STEP_WORKER_STARTING, Kind.STEP_FAILURE, Kind.STEP_UP_FOR_RETRY})
_OUR_ERRORS: Final = f"{errors.__name__}."
_MOST_ROWS: Final = 200_000
_MOST_DETAILS: Final = 4_000
_FIRST: Final = 500
_LAST: Final = 1_500


@dataclass(frozen=True, slots=True)
class Logged:
    """One event. Where only its row was read, there is no text, and nobody knows whether it was an interrupt."""

    id: int
    at: float
    kind: str
    step_key: str | None = None
    text: str = ""
    stage: Stage | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    interrupted: bool | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """What was read."""

    events: tuple[Logged, ...] = ()
    """In the order of the log."""
    count: int = 0
    """Events and lines that the log has."""
    last_at: float | None = None
    """When the last of them was written."""
    latest: Mapping[str, float] = field(default_factory=dict)
    """The same of each step that was read in full."""
    incomplete: bool = False
    """Whether there were more than are read."""


def read_log(instance: DagsterInstance, run_id: str, choose: Callable[[Sequence[Logged]], Collection[str]]) -> Log:
    """Read what is needed. `choose`: of the events of all steps, the keys of those steps that will be shown.

    At most 200,000 rows, 2,000 events of the run, and 4,000 of the steps that were chosen.
    """
    rows = [_logged(row) for row in event_rows(instance, run_id, OF_STEPS, _MOST_ROWS)]
    own, gap = entries_of_run(instance, run_id, OF_THE_RUN, first=_FIRST, last=_LAST)
    chosen = choose(rows)
    details = entries_of_steps(instance, run_id, chosen, _DETAILS, _MOST_DETAILS)
    merged = {event.id: event for event in rows} | {row.id: _logged(row) for row in (*own, *details)}
    count, last_at = count_events(instance, run_id)
    return Log(
        events=tuple(merged[key] for key in sorted(merged)),
        count=count,
        last_at=last_at,
        latest=latest_of_steps(instance, run_id, list(chosen)),
        incomplete=gap or len(rows) == _MOST_ROWS or len(details) == _MOST_DETAILS,
    )


def _logged(row: EventRow) -> Logged:
    found = Logged(row.id, row.at, row.kind or "", row.step_key)
    event = event_of(row.entry) if row.entry is not None else None
    if row.entry is None or event is None:
        return found
    parsed = parse_event(event)
    error = _error(event)
    return replace(
        found,
        at=row.entry.timestamp,
        text=one_line(event.message or row.entry.user_message),
        stage=parsed[0] if parsed else None,
        facts=parsed[1] if parsed else _facts(event),
        error=error,
        interrupted=was_interrupted(event) if event.is_step_failure else None,
    )


def _facts(event: DagsterEvent) -> dict[str, Any]:
    """Of Dagster's own engine events: a process id, a pool; the route that a step was sent to."""
    if not event.is_engine_event and event.event_type is not Kind.STEP_WORKER_STARTING:
        return {}
    return {key: getattr(value, "value", None) for key, value in event.engine_event_data.metadata.items()}


def _error(event: DagsterEvent) -> str | None:
    """The first line of the innermost error: what went wrong, not where Dagster has noticed it.

    An error of ours counts before what has caused it: it says what to do.
    """
    error = getattr(event.event_specific_data, "error", None)
    while error is not None:
        name, _, text = error.message.partition(": ")
        if name.startswith(_OUR_ERRORS) and text:
            return one_line(text)
        if getattr(error, "cause", None) is None:
            return one_line(error.message)
        error = error.cause
    return None
