"""Reading and writing a run's event log. Knows only Dagster's event log. Calls block on the database."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, MetadataValue

from dagster_taskiq._text import clean_text
from dagster_taskiq.dagster_compat.api import RESUME_RUN_LOG_MESSAGE, EngineEventData
from dagster_taskiq.dagster_compat.execution import error_info
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.storage import event_of, events_of_step
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.storage.engine_events import (
    MOST_INTERRUPTIONS_KEY,
    STAGE_KEY,
    TASK_ID_KEY,
    EngineEvent,
    Link,
    Stage,
)

_PAGE: Final = 1000
_EVERY_KIND: Final = set(DagsterEventType)
_FOR_PROGRAMS: Final = "dagster-taskiq/"
_DIGITS: Final = 3
"""Of a number of seconds: milliseconds."""


class RunLog:
    """The run's event log, from the place where it was last read.

    PostgreSQL gives ids before it commits events, so an event with a smaller id can appear after one with a larger id
    has been read. Therefore the last part of the log is read again from time to time.
    """

    def __init__(self, instance: DagsterInstance, run_id: str) -> None:
        self._instance = instance
        self._run_id = run_id
        self._cursor: str | None = None
        self._checkpoint: str | None = None
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()

    def new_events(self) -> Iterator[DagsterEvent]:
        """The events written since the last call."""
        while True:
            page = retry_storage(
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
        """Make the next `new_events` begin where the log had been read to at the last call of `look_again`."""
        self._cursor, self._checkpoint = self._checkpoint, self._cursor
        self._seen_before, self._seen = self._seen, set()

    def _unseen(self, records: Sequence[Any]) -> Iterator[DagsterEvent]:
        for record in records:
            if record.storage_id not in self._seen and record.storage_id not in self._seen_before:
                self._seen.add(record.storage_id)
                event = event_of(record.event_log_entry)
                if event is not None:
                    yield event


_STAGES: Final = frozenset(Stage)


@dataclass(frozen=True, slots=True)
class StepRef:
    """One attempt of one step: the key of the step, the task id of the attempt, and the route on which it was sent."""

    step_key: str
    task_id: str
    route: str = DEFAULT_ROUTE


def append_event(instance: DagsterInstance, run: DagsterRun, event: EngineEvent, step_key: str | None = None) -> None:
    """Append one engine event to the run's log, with the time at which it happened. Its texts are cleaned."""
    level = logging.WARNING if event.warns else logging.INFO
    instance.report_dagster_event(as_dagster_event(run, event, step_key), run.run_id, level, timestamp=event.at)


def as_dagster_event(run: DagsterRun, event: EngineEvent, step_key: str | None = None) -> DagsterEvent:
    """What `append_event` appends: first what is for people, then what is for programs. Its texts are cleaned.

    Parts of them come from users' errors and names, and a page of Dagster's UI that shows half a character fails.
    """
    error = error_info(clean_text(event.error, None)) if event.error else None
    facts = sorted(event.facts.items(), key=lambda fact: fact[0].startswith(_FOR_PROGRAMS))
    metadata = {key: _fit(value) for key, value in (*facts, (STAGE_KEY, event.stage.value))}
    data = EngineEventData(metadata=metadata, error=error)
    return DagsterEvent(
        event_type_value=DagsterEventType.ENGINE_EVENT.value,
        job_name=run.job_name,
        message=clean_text(event.message, None),
        event_specific_data=data,
        step_key=step_key,
    )


def _fit(value: str | float) -> str | float | MetadataValue[Any]:
    if isinstance(value, Link):
        return MetadataValue.url(value)
    if isinstance(value, str):
        return clean_text(value, None)
    return value if isinstance(value, int) else round(value, _DIGITS)


def parse_event(event: DagsterEvent) -> tuple[Stage, dict[str, Any]] | None:
    """Stage and metadata, if the event is one of this package."""
    metadata = getattr(event.event_specific_data, "metadata", None) if event.is_engine_event else None
    if not metadata or STAGE_KEY not in metadata or metadata[STAGE_KEY].value not in _STAGES:
        return None
    values = {key: value.value for key, value in metadata.items()}
    return Stage(values[STAGE_KEY]), values


def read_engine_events(
    instance: DagsterInstance, run_id: str, step: StepRef | None = None
) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Stage and metadata of this package's engine events in a run's log, in order: those of the run, or of one step.

    Neither reads what the other steps of the run have written.
    """
    step_key = step.step_key if step is not None else None
    for event in events_of_step(instance, run_id, step_key, [DagsterEventType.ENGINE_EVENT]):
        parsed = parse_event(event)
        if parsed is not None and (step is None or parsed[1].get(TASK_ID_KEY) == step.task_id):
            yield parsed


def was_launched(instance: DagsterInstance, run_id: str) -> bool:
    """Whether anybody has given the run to a launcher, whichever that was, or has executed it without; one query."""
    begun = [DagsterEventType.RUN_STARTING, DagsterEventType.RUN_START]
    return bool(events_of_step(instance, run_id, None, begun))


def run_will_resume(instance: DagsterInstance, run_id: str) -> bool:
    """Whether the run goes on when its worker stops or dies; one query.

    Where its own log says that it does, and where Dagster's run monitoring would resume it
    (`DagsterInstance.run_will_resume`, which reads every engine event of the run's steps). Interruptions have a limit
    of their own.
    """
    events = list(events_of_step(instance, run_id, None, [DagsterEventType.ENGINE_EVENT]))
    ours = [parsed for parsed in map(parse_event, events) if parsed is not None]
    limits = [facts for stage, facts in ours if stage in (Stage.GOES_ON_ELSEWHERE, Stage.RUN_INTERRUPTED)]
    interruptions = sum(stage is Stage.RUN_INTERRUPTED for stage, _ in ours)
    may_be_interrupted = not limits or interruptions < int(limits[-1][MOST_INTERRUPTIONS_KEY])
    if any(stage is Stage.GOES_ON_ELSEWHERE for stage, _ in ours):
        return may_be_interrupted
    allowed = instance.run_monitoring_max_resume_run_attempts if instance.run_monitoring_enabled else 0
    if interruptions:
        return may_be_interrupted and allowed > 0
    return sum(event.message == RESUME_RUN_LOG_MESSAGE for event in events) < allowed


def interruptions_of_run(instance: DagsterInstance, run_id: str) -> int:
    """How often it was interrupted by the end of its worker, and went on elsewhere."""
    return sum(stage is Stage.RUN_INTERRUPTED for stage, _ in read_engine_events(instance, run_id))
