"""Dagster's private types of what launches runs: schedules, sensors, backfills. Apart: they take long to import."""

from dagster._core.definitions.run_request import InstigatorType
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus
from dagster._core.scheduler.instigation import InstigatorState
from dagster._core.storage.tags import SCHEDULE_NAME_TAG, SENSOR_NAME_TAG

__all__ = [
    "BULK_ACTION_TERMINAL_STATUSES",
    "SCHEDULE_NAME_TAG",
    "SENSOR_NAME_TAG",
    "BulkActionStatus",
    "InstigatorState",
    "InstigatorType",
]
