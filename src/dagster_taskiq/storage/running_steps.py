"""Which steps of a run are being worked on, and by which worker, as the run's executor reads it in the event log."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from dagster import DagsterEvent

from dagster_taskiq.storage.engine_events import ENDED_KEY, TASK_ID_KEY, WORKER_KEY, Stage
from dagster_taskiq.storage.event_log import parse_event


@dataclass(slots=True)
class _Attempt:
    step_key: str
    claimants: dict[str, None] = field(default_factory=dict)
    """Workers that have claimed it and not released it, in the order of their claims."""
    over_on: set[str] = field(default_factory=set)
    """Workers that have finished it."""


class RunningSteps:
    """Which attempts of a run's steps are running on which worker, by the run's event log.

    An attempt is running until its worker reports that its processes are gone. The step's last event comes before
    that: then hooks run, and resources are released. The result does not depend on the order in which the log is read,
    because PostgreSQL may show an earlier event after a later one.
    """

    def __init__(self) -> None:
        self._attempts: dict[str, _Attempt] = {}
        self._open: dict[str, _Attempt] = {}

    @property
    def workers(self) -> dict[str, str]:
        """Task id to worker: the first claimant, because a later one gives way."""
        return {task_id: next(iter(attempt.claimants)) for task_id, attempt in self._open.items()}

    @property
    def step_keys(self) -> dict[str, str]:
        """Task id to step key."""
        return {task_id: attempt.step_key for task_id, attempt in self._open.items()}

    def handle_event(self, event: DagsterEvent) -> None:
        """Take in the next event of the log."""
        parsed = parse_event(event) if event.step_key is not None else None
        if parsed is None or event.step_key is None:
            return
        stage, facts = parsed
        worker_id, task_id = str(facts.get(WORKER_KEY)), str(facts.get(TASK_ID_KEY))
        attempt = self._attempts.setdefault(task_id, _Attempt(event.step_key))
        if stage is Stage.PICKED_UP:
            attempt.claimants.setdefault(worker_id)
        elif stage is Stage.RELEASED:
            attempt.claimants.pop(worker_id, None)
        elif stage is Stage.STEP_LOST or (stage is Stage.TREE_GONE and facts.get(ENDED_KEY)):
            attempt.over_on.add(worker_id)
        else:
            return
        at_work_on = next(iter(attempt.claimants), None)
        if at_work_on is None or at_work_on in attempt.over_on:
            self._open.pop(task_id, None)
        else:
            self._open[task_id] = attempt

    def close(self, task_id: str) -> None:
        """It is no longer running: its worker is dead."""
        attempt = self._open.pop(task_id, None)
        if attempt is not None:
            attempt.over_on.update(attempt.claimants)


class StopOfSteps:
    """Steps that are being stopped: which still need a cancel, and whether it takes too long. Sends nothing itself."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: seconds that the steps may take, from now."""
        self.patience_s = patience_s
        self.cancelled: set[str] = set()
        """Task ids of the steps that were cancelled."""
        self._began = time.monotonic()

    def not_yet_cancelled(self, task_ids: Iterable[str]) -> list[str]:
        """Those that have to be cancelled now, also a step that was claimed after the others were cancelled."""
        late = [task_id for task_id in task_ids if task_id not in self.cancelled]
        self.cancelled.update(late)
        return late

    @property
    def waited_s(self) -> float:
        """Seconds since the stop began."""
        return time.monotonic() - self._began

    @property
    def is_too_long(self) -> bool:
        """Whether the steps have used up their time."""
        return self.waited_s >= self.patience_s
