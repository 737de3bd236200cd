"""Hundreds of runs at once, as a backfill makes them, without waiting for Dagster to write one after the other."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from dagster import DagsterInstance, DagsterRun
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable

from dagster_taskiq.dagster_compat.api import serialize_value


def insert_runs(instance: DagsterInstance, runs: Sequence[DagsterRun]) -> None:
    """Write their rows and those of their tags, created now; none of their events."""
    rows = [
        {
            "run_id": run.run_id,
            "pipeline_name": run.job_name,
            "status": run.status.value,
            "run_body": serialize_value(run),
            "snapshot_id": run.job_snapshot_id,
            "create_timestamp": datetime.now(UTC).replace(tzinfo=None),
        }
        for run in runs
    ]
    tags = [{"run_id": run.run_id, "key": key, "value": value} for run in runs for key, value in run.tags.items()]
    storage: Any = instance.run_storage
    with storage.connect() as connection:
        connection.execute(RunsTable.insert(), rows)
        connection.execute(RunTagsTable.insert(), tags)
