"""What Dagster's run monitoring says of a run. It terminates one that is too slow as a person would, without a name."""

from typing import Final

from dagster import DagsterEventType, DagsterInstance, DagsterRun
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG

__all__ = ["limit_of_monitoring", "max_runtime"]

_TAGS = (MAX_RUNTIME_SECONDS_TAG, "dagster/max_runtime_seconds")
_MARKS: Final = "Canceling due to exceeding maximum runtime"
"""So begins what its event CANCELING says."""
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


def limit_of_monitoring(instance: DagsterInstance, run: DagsterRun) -> tuple[float, str] | None:
    """That limit, if it was monitoring that has marked the run as CANCELING last. One query, where there is a limit."""
    limit = max_runtime(instance, run) if instance.run_monitoring_enabled else None
    if limit is None:
        return None
    last = instance.event_log_storage.get_logs_for_run(
        run.run_id, of_type=DagsterEventType.RUN_CANCELING, limit=1, ascending=False
    )
    return limit if any(entry.message.startswith(_MARKS) for entry in last) else None
