"""Who works on a run, and is that worker alive? Claims and heartbeats in Dagster's own database.

A claim is an engine event; its order in the run's event log decides between two receivers of one message. A
heartbeat is a value in Dagster's key-value storage. Knows Dagster's storage; not SQS, not processes.
All calls block on the database.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import time
from typing import Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun

from dagster_taskiq import dagster_internals as core
from dagster_taskiq.events import STAGE_KEY, TASK_ID_KEY, WORKER_KEY, Note, Stage, picked_up, released

_HEARTBEAT_KEY: Final = "dagster-taskiq/heartbeat/"
_STAGES: Final = frozenset(Stage)
_STEP_ENDS: Final = {
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
}
_CLOSING: Final = {Stage.RELEASED, Stage.TREE_GONE, Stage.STEP_LOST}


@dataclass(frozen=True, slots=True)
class Owner:
    """The worker that holds the claim on a run."""

    worker_id: str
    alive: bool


@dataclass(frozen=True, slots=True)
class StepRef:
    """One attempt of one step: the key of the step and the task id of the attempt."""

    step_key: str
    task_id: str


def write_note(instance: DagsterInstance, run: DagsterRun, note: Note, step_key: str | None = None) -> None:
    """Append one engine event to the run's log, with the time at which it happened."""
    error = core.error_info(note.error) if note.error else None
    data = core.EngineEventData(metadata={STAGE_KEY: note.stage.value, **note.facts}, error=error)
    event = DagsterEvent(
        event_type_value=DagsterEventType.ENGINE_EVENT.value,
        job_name=run.job_name,
        message=note.message,
        event_specific_data=data,
        step_key=step_key,
    )
    instance.report_dagster_event(event, run.run_id, timestamp=note.at)


def note_in(event: DagsterEvent) -> tuple[Stage, dict[str, Any]] | None:
    """Stage and metadata, if the event is one of this package's."""
    metadata = getattr(event.event_specific_data, "metadata", None) if event.is_engine_event else None
    if not metadata or STAGE_KEY not in metadata or metadata[STAGE_KEY].value not in _STAGES:
        return None
    values = {key: value.value for key, value in metadata.items()}
    return Stage(values[STAGE_KEY]), values


def notes(
    instance: DagsterInstance, run_id: str, step: StepRef | None = None
) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Stage and metadata of this package's engine events in the run's log, in order: the run's own, or one step's."""
    if step is not None:
        for event in core.events_of_step(instance, run_id, step.step_key, [DagsterEventType.ENGINE_EVENT]):
            note = note_in(event)
            if note is not None and note[1].get(TASK_ID_KEY) == step.task_id:
                yield note
        return
    for entry in instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT):
        event_ = core.event_of(entry)
        note = note_in(event_) if event_ is not None and event_.step_key is None else None
        if note is not None:
            yield note


class OpenSteps:
    """Which steps of a run are at work on which worker, as its event log tells it."""

    def __init__(self) -> None:
        self.workers: dict[str, str] = {}
        """Step key to worker."""
        self.task_ids: dict[str, str] = {}
        """Step key to task id."""

    def hear(self, event: DagsterEvent) -> None:
        """Take in the next event of the log."""
        step_key = event.step_key
        if step_key is None:
            return
        if event.event_type in _STEP_ENDS:
            # One that was interrupted writes this before its process tree is gone; its worker says when that is.
            if not core.was_interrupted(event):
                self.close(step_key)
            return
        note = note_in(event)
        if note is None:
            return
        stage, facts = note
        worker_id, task_id = str(facts.get(WORKER_KEY)), str(facts.get(TASK_ID_KEY))
        if stage is Stage.PICKED_UP:
            # The first claim counts; a later one of the same attempt is a duplicate, which gives way.
            if self.task_ids.get(step_key) != task_id:
                self.workers[step_key], self.task_ids[step_key] = worker_id, task_id
        elif stage in _CLOSING and self.task_ids.get(step_key) == task_id and self.workers[step_key] == worker_id:
            self.close(step_key)

    def close(self, step_key: str) -> None:
        """It is not, or no longer, at work."""
        self.workers.pop(step_key, None)
        self.task_ids.pop(step_key, None)


def open_steps(instance: DagsterInstance, run_id: str) -> OpenSteps:
    """The steps of a run that are at work, as far as its log knows: the worker of one may have died since."""
    found = OpenSteps()
    for entry in instance.all_logs(run_id, of_type={DagsterEventType.ENGINE_EVENT, *_STEP_ENDS}):
        event = core.event_of(entry)
        if event is not None:
            found.hear(event)
    return found


class Claims:
    """Read and write claims and heartbeats. `dead_after_s`: a heartbeat older than this is a dead worker's."""

    def __init__(self, instance: DagsterInstance, dead_after_s: float, clock: Callable[[], float] = time) -> None:
        self._instance = instance
        self._dead_after_s = dead_after_s
        self._clock = clock

    def claim(self, run: DagsterRun, worker_id: str, task_id: str, where: str, step_key: str | None = None) -> None:
        """Append the claim. Whether it counts is for `owner` or `first_claimant` to say afterwards."""
        write_note(self._instance, run, picked_up(worker_id, task_id, where), step_key)

    def release(self, run: DagsterRun, worker_id: str, task_id: str, why: str, step_key: str | None = None) -> None:
        """Give the claim up, so that another worker's counts although this one is alive."""
        write_note(self._instance, run, released(worker_id, task_id, why), step_key)

    def first_claimant(self, run_id: str, step: StepRef) -> str | None:
        """The worker whose claim on a step counts, alive or not: an attempt is never started a second time."""
        return next(iter(self._claimants(run_id, step)), None)

    def owner(self, run_id: str, me: str | None = None) -> Owner | None:
        """The first claimant that is alive; if none is, the last one; None when nobody has claimed the run.

        `me` is alive by definition.
        """
        claimants = self._claimants(run_id)
        if not claimants:
            return None
        if me is not None and next(iter(claimants)) == me:
            return Owner(me, alive=True)
        alive = self.alive(claimants) | ({me} if me is not None else set())
        first = next((worker_id for worker_id in claimants if worker_id in alive), None)
        return Owner(first, alive=True) if first is not None else Owner([*claimants][-1], alive=False)

    def _claimants(self, run_id: str, step: StepRef | None = None) -> dict[str, None]:
        """Workers that have claimed and not released, in the order of their claims."""
        claimants: dict[str, None] = {}
        for stage, facts in notes(self._instance, run_id, step):
            worker_id = str(facts.get(WORKER_KEY))
            if stage is Stage.PICKED_UP:
                claimants.setdefault(worker_id)
            elif stage is Stage.RELEASED:
                claimants.pop(worker_id, None)
        return claimants

    def beat(self, worker_id: str, facts: dict[str, Any] | None = None) -> None:
        """Say that the worker is alive."""
        self._write_heartbeat(worker_id, {"at": self._clock(), **(facts or {})})

    def gone(self, worker_id: str) -> None:
        """Say that the worker has ended, so that nobody waits for its heartbeat to go stale."""
        self._write_heartbeat(worker_id, {"at": self._clock(), "gone": True})

    def alive(self, worker_ids: Iterable[str]) -> set[str]:
        """Those of the workers whose heartbeat is fresh."""
        keys = {_HEARTBEAT_KEY + worker_id: worker_id for worker_id in worker_ids}
        if not keys:
            return set()
        values = self._instance.daemon_cursor_storage.get_cursor_values(set(keys))
        now = self._clock()
        return {keys[key] for key, value in values.items() if self._is_fresh(json.loads(value), now)}

    def _is_fresh(self, heartbeat: dict[str, Any], now: float) -> bool:
        return not heartbeat.get("gone") and now - float(heartbeat["at"]) < self._dead_after_s

    def _write_heartbeat(self, worker_id: str, value: dict[str, Any]) -> None:
        self._instance.daemon_cursor_storage.set_cursor_values({_HEARTBEAT_KEY + worker_id: json.dumps(value)})
