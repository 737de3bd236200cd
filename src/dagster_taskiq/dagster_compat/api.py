"""Dagster's private types that several rooms need: launchers, the run queue, references, serialisation."""

from typing import Final

from dagster._core.errors import DagsterInvalidConfigError
from dagster._core.events import EngineEventData
from dagster._core.instance import InstanceRef
from dagster._core.launcher import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.run_coordinator.queued_run_coordinator import RunQueueConfig
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    AUTO_RETRY_RUN_ID_TAG,
    BACKFILL_ID_TAG,
    HIDDEN_TAG_PREFIX,
    MAX_RETRIES_TAG,
    MULTIDIMENSIONAL_PARTITION_PREFIX,
    PARENT_RUN_ID_TAG,
    PARTITION_NAME_TAG,
    PRIORITY_TAG,
    REPOSITORY_LABEL_TAG,
    RETRY_NUMBER_TAG,
    SCHEDULE_NAME_TAG,
    SENSOR_NAME_TAG,
)
from dagster._serdes import ConfigurableClass, ConfigurableClassData, deserialize_value, serialize_value

RESUME_RUN_LOG_MESSAGE: Final = "Launching a new run worker to resume run"
"""That of `dagster._daemon.monitoring`, by which Dagster counts how often a run was resumed. Not imported: it would
bring the daemon with it. A test says when Dagster's own is another one."""

__all__ = [
    "ASSET_PARTITION_RANGE_END_TAG",
    "ASSET_PARTITION_RANGE_START_TAG",
    "AUTO_RETRY_RUN_ID_TAG",
    "BACKFILL_ID_TAG",
    "FINISHED_STATUSES",
    "HIDDEN_TAG_PREFIX",
    "MAX_RETRIES_TAG",
    "MULTIDIMENSIONAL_PARTITION_PREFIX",
    "PARENT_RUN_ID_TAG",
    "PARTITION_NAME_TAG",
    "PRIORITY_TAG",
    "REPOSITORY_LABEL_TAG",
    "RESUME_RUN_LOG_MESSAGE",
    "RETRY_NUMBER_TAG",
    "SCHEDULE_NAME_TAG",
    "SENSOR_NAME_TAG",
    "CheckRunHealthResult",
    "ConfigurableClass",
    "ConfigurableClassData",
    "DagsterInvalidConfigError",
    "EngineEventData",
    "InstanceRef",
    "LaunchRunContext",
    "ResumeRunContext",
    "RunLauncher",
    "RunQueueConfig",
    "SubmitRunContext",
    "WorkerStatus",
    "deserialize_value",
    "serialize_value",
]
