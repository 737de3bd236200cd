"""Ask workers to stop, by their names, and see what becomes of it. Knows heartbeats; not how a worker stops.

All calls that take an instance block on the database.
"""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dagster import DagsterInstance

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.fleet import StopRequest, ask_to_stop
from dagster_taskiq.storage.workers import ALIVE, DEAD, GONE, SILENT, WorkerInfo, list_workers

_LIFE: Final = re.compile(r"-[0-9a-f]{8}$")
"""What a worker's id has after its name, for each life another one."""
_NAMED: Final = 5
_LIVES: Final = (ALIVE, SILENT)


def name_of(worker: WorkerInfo) -> str:
    """The name that its lives have in common."""
    return _LIFE.sub("", worker.worker_id)


def find_worker(workers: Sequence[WorkerInfo], given: str) -> WorkerInfo:
    """The living worker that is meant by its id, or by its name. `workers`: those of the last week.

    Raises `DagsterTaskiqError` when there is none, or more than one.
    """
    meant = [one for one in workers if given in (one.worker_id, name_of(one))]
    living = [one for one in meant if one.state in _LIVES]
    if len(living) == 1:
        return living[0]
    if living:
        more = ", …" if len(living) > _NAMED else ""
        ids = ", ".join(one.worker_id for one in living[:_NAMED])
        raise DagsterTaskiqError(f"{len(living)} workers are called {given}: {ids}{more}; give an id, or --all")
    if meant:
        last = max(meant, key=lambda one: one.heard)
        state = "has ended already" if last.state == GONE else "is dead"
        ago = time.time() - last.heard
        raise DagsterTaskiqError(f"worker {last.worker_id} {state}, last heard of {ago:.0f} s ago; nothing to stop")
    raise DagsterTaskiqError(f"no worker is called {given}; those that there are: dagster-taskiq worker list --all")


@dataclass(frozen=True, slots=True)
class Stop:
    """What has become of one request so far."""

    worker: WorkerInfo
    """As it was last seen."""
    outcome: str
    """`asked`: it has not heard it yet; `draining`; `finishing`: it ends after its work; `ended`; `dead`."""

    @property
    def is_over(self) -> bool:
        """Whether the worker is no more."""
        return self.outcome in ("ended", "dead")

    @property
    def at_work(self) -> int | None:
        """How many runs and steps it works on; None: it has not heard the request yet, and may begin more."""
        return len(self.worker.work) if self.outcome != "asked" else None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        stopping = self.worker.stopping
        return {
            "worker_id": self.worker.worker_id,
            "where": self.worker.where,
            "outcome": self.outcome,
            "interrupts_at": stopping.until if stopping is not None else None,
            "at_work": self.at_work,
        }


def ask_workers_to_stop(instance: DagsterInstance, workers: Iterable[WorkerInfo], request: StopRequest) -> None:
    """Each of them hears it with its next heartbeat. It is for this life of the worker only."""
    for worker in workers:
        ask_to_stop(instance, worker.worker_id, request)


def look_at_stops(
    instance: DagsterInstance, settings: Settings, worker_ids: Iterable[str], *, finish: bool
) -> list[Stop]:
    """What has become of the requests to these workers until now, in that order. `finish`: as they were asked."""
    known = {one.worker_id: one for one in list_workers(instance, settings, everybody=True)}
    asked = [known[worker_id] for worker_id in worker_ids if worker_id in known]
    return [Stop(worker, _outcome(worker, finish=finish)) for worker in asked]


def _outcome(worker: WorkerInfo, *, finish: bool) -> str:
    if worker.state in (GONE, DEAD):
        return "ended" if worker.state == GONE else "dead"
    stopping = worker.stopping
    if stopping is not None and stopping.until is not None:
        return "draining"
    # One that was to finish its work may not have heard yet that it is not to.
    return "finishing" if stopping is not None and finish else "asked"
