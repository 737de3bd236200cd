"""What Dagster's run monitoring says of a run. It terminates one that is too slow as a person would, without a name."""

import time
from typing import Final

from dagster import DagsterInstance, DagsterRun
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG

__all__ = ["exceeded_runtime", "max_runtime"]

_TAGS = (MAX_RUNTIME_SECONDS_TAG, "dagster/max_runtime_seconds")
_SETTING: Final = "max_runtime_seconds of run_monitoring"


def max_runtime(instance: DagsterInstance, run: DagsterRun) -> tuple[float, str] | None:
    """The longest time in seconds that the run may take, and where that is set; None: there is no limit.

    As monitoring sees it: the tag counts instead of the setting, also when it is longer, or no number.
    """
    tag = next((tag for tag in _TAGS if run.tags.get(tag)), None)
    if tag is None and not instance.run_monitoring_enabled:
        return None
    given, where = (run.tags[tag], tag) if tag is not None else (instance.run_monitoring_max_runtime_seconds, _SETTING)
    try:
        limit_s = float(given)
    except ValueError:
        return None
    return (limit_s, where) if 0 < limit_s < float("inf") else None


def exceeded_runtime(instance: DagsterInstance, run: DagsterRun) -> tuple[float, str] | None:
    """That limit, if monitoring looks at it and the run has taken longer. One query, where there is such a limit."""
    limit = max_runtime(instance, run) if instance.run_monitoring_enabled else None
    record = instance.get_run_record_by_id(run.run_id) if limit is not None else None
    if limit is None or record is None or record.start_time is None:
        return None
    return limit if time.time() - record.start_time > limit[0] else None
