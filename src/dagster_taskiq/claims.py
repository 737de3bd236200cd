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
from dagster_taskiq.events import STAGE_KEY, WORKER_KEY, Note, Stage, picked_up, released

_HEARTBEAT_KEY: Final = "dagster-taskiq/heartbeat/"
_STAGES: Final = frozenset(Stage)


@dataclass(frozen=True, slots=True)
class Owner:
    """The worker that holds the claim on a run."""

    worker_id: str
    alive: bool


def write_note(instance: DagsterInstance, run: DagsterRun, note: Note) -> None:
    """Append one engine event to the run's log, with the time at which it happened."""
    error = core.error_info(note.error) if note.error else None
    data = core.EngineEventData(metadata={STAGE_KEY: note.stage.value, **note.facts}, error=error)
    event = DagsterEvent(
        event_type_value=DagsterEventType.ENGINE_EVENT.value,
        job_name=run.job_name,
        message=note.message,
        event_specific_data=data,
    )
    instance.report_dagster_event(event, run.run_id, timestamp=note.at)


def notes(instance: DagsterInstance, run_id: str) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Stage and metadata of this package's engine events in the run's log, in order."""
    for entry in instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT):
        event = core.event_of(entry)
        metadata = getattr(event.event_specific_data, "metadata", None) if event is not None else None
        if metadata and STAGE_KEY in metadata and metadata[STAGE_KEY].value in _STAGES:
            values = {key: value.value for key, value in metadata.items()}
            yield Stage(values[STAGE_KEY]), values


class Claims:
    """Read and write claims and heartbeats. `dead_after_s`: a heartbeat older than this is a dead worker's."""

    def __init__(self, instance: DagsterInstance, dead_after_s: float, clock: Callable[[], float] = time) -> None:
        self._instance = instance
        self._dead_after_s = dead_after_s
        self._clock = clock

    def claim(self, run: DagsterRun, worker_id: str, task_id: str, where: str) -> None:
        """Append the claim. Whether it counts is for `owner` to say afterwards."""
        write_note(self._instance, run, picked_up(worker_id, task_id, where))

    def release(self, run: DagsterRun, worker_id: str, task_id: str, why: str) -> None:
        """Give the claim up, so that another worker's counts although this one is alive."""
        write_note(self._instance, run, released(worker_id, task_id, why))

    def owner(self, run_id: str, me: str | None = None) -> Owner | None:
        """The first claimant that is alive; if none is, the last one; None when nobody has claimed the run.

        `me` is alive by definition.
        """
        claimants: dict[str, None] = {}
        for stage, facts in notes(self._instance, run_id):
            worker_id = str(facts.get(WORKER_KEY))
            if stage is Stage.PICKED_UP:
                claimants.setdefault(worker_id)
            elif stage is Stage.RELEASED:
                claimants.pop(worker_id, None)
        if not claimants:
            return None
        if me is not None and next(iter(claimants)) == me:
            return Owner(me, alive=True)
        alive = self.alive(claimants) | ({me} if me is not None else set())
        first = next((worker_id for worker_id in claimants if worker_id in alive), None)
        return Owner(first, alive=True) if first is not None else Owner([*claimants][-1], alive=False)

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
