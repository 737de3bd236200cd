"""What holds back a run in Dagster's queue, by the same counters that Dagster's daemon asks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord, RunsFilter

from dagster_taskiq.dagster_compat.api import PRIORITY_TAG, RunQueueConfig
from dagster_taskiq.dagster_compat.run_counts import tag_values

__all__ = [
    "DAEMON_OF_THE_QUEUE",
    "LimitHit",
    "MoreLimits",
    "daemon_heard",
    "limits_that_hold",
    "pool_waits",
    "priority_of",
    "queue_order",
    "run_queue_config",
]

DAEMON_OF_THE_QUEUE: Final = "QUEUED_RUN_COORDINATOR"
_MOST_IN_PROGRESS: Final = 2_000
_MOST_POOLS: Final = 100
_TAG_LIMITS: Final = "tag_concurrency_limits"


@dataclass(frozen=True, slots=True)
class LimitHit:
    """A limit that a run would exceed. `kind`: "tag" or "pool"."""

    kind: str
    name: str
    limit: int | None


def run_queue_config(instance: DagsterInstance) -> Any:
    """Dagster's `RunQueueConfig`, with what `concurrency:` in `dagster.yaml` adds; None without a run queue."""
    return instance.get_concurrency_config().run_queue_config


class MoreLimits:
    """Limits of tags that count besides those that are configured, in this process. Keep the object.

    What `concurrency: runs: tag_concurrency_limits` in `dagster.yaml` says takes the place of all that a run
    coordinator says. So ours are put among those.
    """

    def __init__(self, instance: DagsterInstance) -> None:
        self._runs: Any = (instance.get_settings("concurrency") or {}).get("runs") or {}
        self._configured = self._runs.get(_TAG_LIMITS)

    def added_to(self, config: RunQueueConfig, limits: Sequence[Mapping[str, Any]]) -> RunQueueConfig:
        """The configuration of the run queue, with these limits instead of those of the last call."""
        if self._configured is not None:
            self._runs[_TAG_LIMITS] = [*self._configured, *limits]
        return config._replace(tag_concurrency_limits=[*(config.tag_concurrency_limits or ()), *limits])

    def of_tag(self, config: RunQueueConfig, key: str) -> dict[str, int]:
        """The configured limits of that tag, by value: Dagster takes the last one of each."""
        configured = config.tag_concurrency_limits if self._configured is None else self._configured
        return {
            limit["value"]: limit["limit"]
            for limit in configured or ()
            if limit["key"] == key and isinstance(limit.get("value"), str)
        }


def daemon_heard(instance: DagsterInstance) -> float | None:
    """When the daemon of the run queue has written its last heartbeat; None: never."""
    beat = instance.get_daemon_heartbeats().get(DAEMON_OF_THE_QUEUE)
    return float(beat.timestamp) if beat is not None else None


def priority_of(tags: Mapping[str, str]) -> int:
    """As the daemon reads it: 0 for what is no number."""
    try:
        return int(tags.get(PRIORITY_TAG, "0"))
    except ValueError:
        return 0


def limits_that_hold(instance: DagsterInstance, runs: Sequence[DagsterRun]) -> dict[str, list[LimitHit]]:
    """By run, the limits of tags and pools that keep it in the queue. Reads 2,000 runs in progress at most, once."""
    from dagster._core.storage.dagster_run import ACTIVE_RUN_STATUSES

    config = run_queue_config(instance)
    if config is None:
        return {}
    of_pools = (
        [run for run in runs if run.run_op_concurrency] if config.should_block_op_concurrency_limited_runs else []
    )
    if not config.tag_concurrency_limits and not of_pools:
        return {}
    records = instance.get_run_records(RunsFilter(statuses=list(ACTIVE_RUN_STATUSES)), limit=_MOST_IN_PROGRESS)
    found: dict[str, list[LimitHit]] = {}
    for limit in config.tag_concurrency_limits or ():
        _hits_of_a_tag(limit, runs, [record.dagster_run for record in records], found)
    if of_pools:
        _hits_of_pools(instance, config, of_pools, records, found)
    return found


def _hits_of_a_tag(
    limit: Mapping[str, Any],
    runs: Iterable[DagsterRun],
    in_progress: Sequence[DagsterRun],
    found: dict[str, list[LimitHit]],
) -> None:
    from dagster._utils.tags import TagConcurrencyLimitsCounter

    counter = TagConcurrencyLimitsCounter([dict(limit)], in_progress)
    for run in runs:
        if counter.is_blocked(run):
            name = f"{limit['key']}={run.tags.get(limit['key'])}" if limit.get("value") else str(limit["key"])
            found.setdefault(run.run_id, []).append(LimitHit("tag", name, limit["limit"]))


def _hits_of_pools(
    instance: DagsterInstance,
    config: Any,
    runs: Sequence[DagsterRun],
    records: Sequence[RunRecord],
    found: dict[str, list[LimitHit]],
) -> None:
    from dagster._core.op_concurrency_limits_counter import GlobalOpConcurrencyLimitsCounter
    from dagster._core.storage.dagster_run import RunOpConcurrency

    storage = instance.event_log_storage
    counter = GlobalOpConcurrencyLimitsCounter(
        instance,
        runs,
        records,
        concurrency_keys=storage.get_concurrency_keys(),
        pool_limits=storage.get_pool_limits(),
        slot_count_offset=config.op_concurrency_slot_buffer,
        pool_granularity=instance.get_concurrency_config().pool_config.pool_granularity,
    )
    limits = {pool.name: pool.limit for pool in storage.get_pool_limits()}  # now also those by default
    for run in filter(counter.is_blocked, runs):
        for name in sorted(run.run_op_concurrency.all_pools or ())[:_MOST_POOLS] if run.run_op_concurrency else ():
            alone = RunOpConcurrency(root_key_counts={name: 1}, has_unconstrained_root_nodes=False, all_pools={name})
            if counter.is_blocked(run._replace(run_op_concurrency=alone)):  # a NamedTuple's own way
                found.setdefault(run.run_id, []).append(LimitHit("pool", name, limits.get(name)))


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step of a run that waits for a slot of a pool."""

    step_key: str
    pool: str
    since: float
    limit: int | None
    holders: tuple[str, ...]
    """Run ids."""


def pool_waits(instance: DagsterInstance, run_ids: Iterable[str]) -> dict[str, list[PendingStep]]:
    """By run, its steps that wait for a slot of a pool. One query for each pool, of a hundred at most."""
    storage, wanted = instance.event_log_storage, set(run_ids)
    found: dict[str, list[PendingStep]] = {}
    if not wanted or not storage.supports_global_concurrency_limits:
        return found
    for pool in sorted(storage.get_concurrency_keys())[:_MOST_POOLS]:
        info = storage.get_concurrency_info(pool)
        for step in info.pending_steps:
            if step.run_id not in wanted or step.assigned_timestamp is not None:
                continue
            holders = tuple(sorted({slot.run_id for slot in info.claimed_slots}))
            pending = PendingStep(step.step_key, pool, step.enqueued_timestamp.timestamp(), info.limit, holders)
            found.setdefault(step.run_id, []).append(pending)
    return found


def queue_order(instance: DagsterInstance) -> list[str]:
    """The ids of all runs in Dagster's queue, in the order in which its daemon takes them: by priority, then by age.

    In a SQL storage it reads ids, and priorities of 500 at a time: of thousands of runs in some 0.1 seconds.
    """
    from dagster._core.storage.runs import SqlRunStorage
    from dagster._core.storage.runs.schema import RunsTable
    from sqlalchemy import select

    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        runs = instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.QUEUED]), ascending=True)
        return _by_priority([run.run_id for run in runs], {run.run_id: run.tags.get(PRIORITY_TAG, "0") for run in runs})
    rows = RunsTable.c
    queued = select(rows.run_id).where(rows.status == DagsterRunStatus.QUEUED.value).order_by(rows.id)
    with storage.connect() as connection:
        run_ids = [row[0] for row in connection.execute(queued).fetchall()]
    return _by_priority(run_ids, tag_values(instance, PRIORITY_TAG, run_ids))


def _by_priority(run_ids: Iterable[str], priorities: Mapping[str, str]) -> list[str]:
    """`run_ids`: the oldest first, and that stays so among equals."""
    return sorted(run_ids, key=lambda run_id: -priority_of({PRIORITY_TAG: priorities.get(run_id, "0")}))
