"""Which workers are there, and what does each one work on? The answer of `worker list`, only from heartbeats.

Knows heartbeats and Dagster's runs; not SQS, not processes. All calls block on the database.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from dagster import DagsterInstance, RunsFilter

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeat, Heartbeats

ALIVE: Final = "alive"
SILENT: Final = "silent"
DEAD: Final = "dead"
GONE: Final = "gone"


@dataclass(frozen=True, slots=True)
class WorkInfo:
    """One run, or one step, that a worker is working on. `since`: in seconds since the epoch."""

    run_id: str
    job: str | None
    """None when the run was deleted."""
    status: str | None
    step_key: str | None
    since: float


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker, by its last heartbeat. Times are by its own clock, in seconds since the epoch."""

    worker_id: str
    state: str
    """`alive`; `silent`: too early to call it dead; `dead`; `gone`: it has reported its end."""
    where: str
    since: float | None
    heard: float
    """Time of its last heartbeat."""
    runs: int | None
    """Slots for runs."""
    steps: int | None
    """Slots for steps."""
    work: tuple[WorkInfo, ...]


def list_workers(instance: DagsterInstance, settings: Settings, *, everybody: bool = False) -> list[WorkerInfo]:
    """The workers that are alive or silent, the oldest first; with `everybody` those of the last week.

    One look cannot distinguish a dead worker from one whose heartbeat is late. So a worker is `dead` when it has been
    silent for longer than it takes to confirm a death.
    """
    now = time.time()
    heartbeats = Heartbeats.of_runs(instance, settings)
    given_up = settings.dead_after_s + settings.death_confirmed_after_s
    found = []
    for last in sorted(heartbeats.last(), key=lambda beat: (beat.facts.get("since", 0), beat.worker_id)):
        state = _state(last, now, settings.dead_after_s, given_up)
        if everybody or state in (ALIVE, SILENT):
            found.append((last, state))
    runs = _runs(instance, [last for last, _ in found])
    return [_worker_info(last, state, runs) for last, state in found]


def _state(last: Heartbeat, now: float, silent_after_s: float, dead_after_s: float) -> str:
    if last.gone:
        return GONE
    age = abs(now - last.at)
    return ALIVE if age < silent_after_s else SILENT if age < dead_after_s else DEAD


def _runs(instance: DagsterInstance, beats: Sequence[Heartbeat]) -> dict[str, tuple[str, str]]:
    """Job and status of every run that a worker is working on."""
    run_ids = {entry[0] for last in beats for entry in last.facts.get("work", ())}
    if not run_ids:
        return {}
    return {
        run.run_id: (run.job_name, run.status.value) for run in instance.get_runs(RunsFilter(run_ids=sorted(run_ids)))
    }


def _worker_info(last: Heartbeat, state: str, runs: dict[str, tuple[str, str]]) -> WorkerInfo:
    facts: dict[str, Any] = dict(last.facts)
    slots = facts.get("slots", (None, None))
    work = []
    for run_id, step_key, since in facts.get("work", ()):
        job, status = runs.get(run_id, (None, None))
        work.append(WorkInfo(run_id, job, status, step_key, since))
    return WorkerInfo(
        last.worker_id, state, str(facts.get("where", "")), facts.get("since"), last.at, slots[0], slots[1], tuple(work)
    )
