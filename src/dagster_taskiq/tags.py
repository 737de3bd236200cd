"""The run tags of this package. Knows their names only."""

from typing import Final

TASK_ID_TAG: Final = "dagster-taskiq/task_id"
"""Set at launch: the taskiq task id of the run's work."""

GRACE_SECONDS_TAG: Final = "dagster-taskiq/grace_seconds"
"""May be set by users on a job or run: seconds between the interrupt and the kill, instead of the setting."""

CANCEL_REASON_TAG: Final = "dagster-taskiq/cancel_reason"
"""Set when somebody cancels a run and says why."""

CANCELLED_BY_TAG: Final = "dagster-taskiq/cancelled_by"
"""Set when somebody cancels a run and says who that is."""
