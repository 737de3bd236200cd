"""Which runs wait for a worker? Knows Dagster's runs; not SQS, not workers."""

import time
from dataclasses import dataclass
from typing import Final

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

_WAITING: Final = RunsFilter(statuses=[DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING])


@dataclass(frozen=True, slots=True)
class WaitingRuns:
    """How many runs wait, and since when the oldest one has been there, in seconds; 0 when there is none."""

    count: int
    oldest_s: float


def waiting_runs(instance: DagsterInstance) -> WaitingRuns:
    """The runs in Dagster's queue, and those that were handed over and are not at work yet. Blocks on the database.

    Those that a limit of the run queue, of a tag or of a pool holds back are among them.
    """
    count = instance.get_runs_count(_WAITING)
    oldest = instance.get_run_records(_WAITING, limit=1, ascending=True) if count else ()
    return WaitingRuns(count, max((time.time() - one.create_timestamp.timestamp() for one in oldest), default=0.0))
