"""What Dagster's run monitoring says of a run. It terminates one that is too slow as a person would, without a name."""

import time

from dagster import DagsterInstance, DagsterRun
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG

__all__ = ["exceeded_runtime"]

_TAGS = (MAX_RUNTIME_SECONDS_TAG, "dagster/max_runtime_seconds")


def exceeded_runtime(instance: DagsterInstance, run: DagsterRun) -> float | None:
    """The longest time in seconds that the run may take, if monitoring looks at that and the run has taken longer.

    One query, where there is such a limit.
    """
    if not instance.run_monitoring_enabled:
        return None
    given = next((run.tags[tag] for tag in _TAGS if run.tags.get(tag)), None)
    try:
        limit_s = float(given if given is not None else instance.run_monitoring_max_runtime_seconds)
    except ValueError:
        return None
    record = instance.get_run_record_by_id(run.run_id) if limit_s > 0 else None
    if record is None or record.start_time is None:
        return None
    return limit_s if time.time() - record.start_time > limit_s else None
