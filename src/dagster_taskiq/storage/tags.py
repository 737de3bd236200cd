"""The run tags of this package: their names, and how to read and write them.

Dagster copies a run's tags to its re-executions and retries, people copy them to new runs. Those that are about one
run only count for the run that the hidden tag `.dagster/taskiq_run_id` names.
"""

import logging
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.dagster_compat.api import HIDDEN_TAG_PREFIX
from dagster_taskiq.dagster_compat.storage import remove_run_tags
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import checked

logger = logging.getLogger(__name__)

TASK_ID_TAG: Final = "dagster-taskiq/task_id"
"""Set at launch: the taskiq task id of the run's work."""

GRACE_SECONDS_TAG: Final = "dagster-taskiq/grace_seconds"
"""May be set by users on a job or run: seconds between the interrupt and the kill, instead of the setting."""

QUEUE_TAG: Final = "dagster-taskiq/queue"
"""May be set by users on a job, run, op or asset: the route that it goes to, whatever the setting `routes` says."""

CELERY_QUEUE_TAG: Final = "dagster-celery/queue"
"""Read as `dagster-taskiq/queue`, where that is not set."""

ROUTE_TAG: Final = "dagster-taskiq/route"
"""Set at launch, or when a run is put into Dagster's queue: the route that it has gone to."""

TIMEOUT_TAG: Final = "dagster-taskiq/timeout_seconds"
"""May be set by users on a job, run, op or asset: how long it may take, counted from its start."""

QUEUE_TTL_TAG: Final = "dagster-taskiq/queue_ttl_seconds"
"""May be set by users on a job or run: how long a run may wait for its start, counted from its creation."""

SUPERSEDE_TAG: Final = "dagster-taskiq/supersede_key"
"""May be set by users on a job or run: a newer run with the same value cancels the older ones."""

INTERRUPTED_STEPS_TAG: Final = "dagster-taskiq/interrupted_steps"
"""May be set by users on an op or asset: `fail` or `retry`, instead of the setting."""

CANCEL_CHILDREN_TAG: Final = "dagster-taskiq/cancel_children"
"""May be set by users on a job or run: whether what it launched is cancelled with it, instead of the setting."""

CANCEL_REASON_TAG: Final = "dagster-taskiq/cancel_reason"
"""Set when somebody cancels a run with a reason."""

CANCELLED_BY_TAG: Final = "dagster-taskiq/cancelled_by"
"""Set when somebody cancels a run: who, or by which way. It makes the run CANCELED whatever else stops it."""

CANCEL_FENCE_TAG: Final = "dagster-taskiq/cancel_fence"
"""Set when a run was not launched because of a fence (`run cancel --until`): which fence."""

TIMED_OUT_TAG: Final = "dagster-taskiq/timed_out"
"""Set when a run has taken, or waited, longer than it may, and is being ended as a FAILURE: which limit it was."""

RUN_ID_TAG: Final = f"{HIDDEN_TAG_PREFIX}taskiq_run_id"
"""Set with the first of the tags above: the run that they are about. Dagster's UI does not show it."""

OF_THE_JOB: Final = frozenset({TIMEOUT_TAG, QUEUE_TTL_TAG, SUPERSEDE_TAG, GRACE_SECONDS_TAG, CANCEL_CHILDREN_TAG})
"""What users set on a job counts for its runs, also where the job has `run_tags` besides."""

_OF_ONE_RUN: Final = frozenset(
    {TASK_ID_TAG, CANCEL_REASON_TAG, CANCELLED_BY_TAG, CANCEL_FENCE_TAG, ROUTE_TAG, TIMED_OUT_TAG, RUN_ID_TAG}
)


def own_tags(run: DagsterRun) -> Mapping[str, str]:
    """The run's tags, without those of ours that are copies of another run's."""
    if run.tags.get(RUN_ID_TAG, run.run_id) == run.run_id:
        return run.tags
    return {name: value for name, value in run.tags.items() if name not in _OF_ONE_RUN}


def was_stopped(run: DagsterRun) -> bool:
    """Whether the run has ended because somebody wanted it, or because it took longer than it may."""
    if run.status is DagsterRunStatus.FAILURE:
        return TIMED_OUT_TAG in own_tags(run)
    return run.status is DagsterRunStatus.CANCELED


def inheritable_tags(run: DagsterRun) -> dict[str, str]:
    """The run's tags that count for a run that goes on from it, too."""
    return {name: value for name, value in run.tags.items() if name not in _OF_ONE_RUN}


def drop_copied_tags(instance: DagsterInstance, run: DagsterRun) -> None:
    """Remove tags of ours from a new run: what does not name it is from another one.

    In the launchpad, Dagster's UI copies those tags of a run that it shows, and so not the one that names it.
    """
    if stale := _not_naming(run):
        remove_run_tags(instance, run.run_id, stale)


def add_own_tags(instance: DagsterInstance, run: DagsterRun, tags: Mapping[str, str]) -> None:
    """Set tags of ours on this run, and remove those that are copies of another run's."""
    _replace(instance, run, run.tags.keys() - own_tags(run).keys(), tags)


def tag_launched_run(
    instance: DagsterInstance, run: DagsterRun, task_id: str, more: Mapping[str, str] | None = None
) -> None:
    """As `add_own_tags`, for the task id of a new launch: what does not name this run is from another one.

    Also what was written by a version that did not say which run its tags are about. `more`: tags of ours to set with
    it.
    """
    _replace(instance, run, _not_naming(run), {**(more or {}), TASK_ID_TAG: task_id})


def _not_naming(run: DagsterRun) -> AbstractSet[str]:
    return set() if run.tags.get(RUN_ID_TAG) == run.run_id else _OF_ONE_RUN & run.tags.keys()


def _replace(instance: DagsterInstance, run: DagsterRun, stale: Iterable[str], tags: Mapping[str, str]) -> None:
    tags = {**tags, RUN_ID_TAG: run.run_id}
    if gone := set(stale) - tags.keys():
        remove_run_tags(instance, run.run_id, gone)
    instance.add_run_tags(run.run_id, tags)


def grace_from_tag(value: str) -> float:
    """Seconds from the run tag `dagster-taskiq/grace_seconds`. Raises `SettingsError`."""
    return float(checked("grace_seconds", value))


def grace_of(tags: Mapping[str, str], default_s: float) -> float:
    """A run's own grace, if it has a tag with a valid one."""
    if GRACE_SECONDS_TAG not in tags:
        return default_s
    try:
        return grace_from_tag(tags[GRACE_SECONDS_TAG])
    except SettingsError as error:
        logger.warning("tag %s ignored: %s", GRACE_SECONDS_TAG, error)
        return default_s


def cancels_children(tags: Mapping[str, str], default: bool) -> bool:
    """Whether a run that is terminated takes the runs with it that it launched."""
    if CANCEL_CHILDREN_TAG not in tags:
        return default
    try:
        return bool(checked("cancel_children", tags[CANCEL_CHILDREN_TAG]))
    except SettingsError as error:
        logger.warning("tag %s ignored: %s", CANCEL_CHILDREN_TAG, error)
        return default
