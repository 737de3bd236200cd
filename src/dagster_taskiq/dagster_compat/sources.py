"""Dagster's private types of what launches runs: schedules, sensors, backfills. Apart: they take long to import."""

from dagster._core.definitions.run_request import InstigatorType
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus, PartitionBackfill
from dagster._core.scheduler.instigation import InstigatorState

__all__ = [
    "BULK_ACTION_TERMINAL_STATUSES",
    "BulkActionStatus",
    "InstigatorState",
    "InstigatorType",
    "PartitionBackfill",
]
