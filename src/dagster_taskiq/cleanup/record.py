"""What a run's event log says about its cleanup handlers: are some of them due, and which have failed?"""

from dataclasses import dataclass
from typing import Final

from dagster import DagsterInstance

from dagster_taskiq.storage.engine_events import FAILED_KEY, Stage
from dagster_taskiq.storage.event_log import read_engine_events


@dataclass(frozen=True, slots=True)
class CleanupRecord:
    """What a run's event log says about its cleanup handlers."""

    due: bool = False
    """Whether there are handlers that have to run, if the run was cancelled."""
    failures: tuple[str, ...] = ()
    """One line for each handler that had no attempt left."""


NO_CLEANUP: Final = CleanupRecord()


def cleanup_record(instance: DagsterInstance, run_id: str) -> CleanupRecord:
    """Read the record of a run."""
    record = NO_CLEANUP
    for stage, facts in read_engine_events(instance, run_id):
        if stage is Stage.CLEANUP_HANDLERS:
            record = CleanupRecord(due=True)
        elif stage is Stage.CLEANUP_ENDED:
            record = CleanupRecord(failures=tuple(str(facts[FAILED_KEY]).splitlines()) if FAILED_KEY in facts else ())
    return record
