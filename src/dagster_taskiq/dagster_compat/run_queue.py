"""What holds back a run in Dagster's queue, by the same counters that Dagster's daemon asks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

__all__ = [
    "DAEMON_OF_THE_QUEUE",
    "LimitHit",
    "daemon_heard",
    "limits_that_hold",
    "pool_waits",
    "priority_of",
    "run_queue_config",
]

DAEMON_OF_THE_QUEUE: Final = "QUEUED_RUN_COORDINATOR"
_MOST_IN_PROGRESS: Final = 2_000
_MOST_POOLS: Final = 100


@dataclass(frozen=True, slots=True)
class LimitHit:
    """A limit that a run would exceed. `kind`: "tag" or "pool"."""

    kind: str
    name: str
    limit: int | None


def run_queue_config(instance: DagsterInstance) -> Any:
    """Dagster's `RunQueueConfig`, with what `concurrency:` in `dagster.yaml` adds; None without a run queue."""
    return instance.get_concurrency_config().run_queue_config


def daemon_heard(instance: DagsterInstance) -> float | None:
    """When the daemon of the run queue has written its last heartbeat; None: never."""
    beat = instance.get_daemon_heartbeats().get(DAEMON_OF_THE_QUEUE)
    return float(beat.timestamp) if beat is not None else None


def priority_of(tags: Mapping[str, str]) -> int:
    """As the daemon reads it: 0 for what is no number."""
    from dagster._core.storage.tags import PRIORITY_TAG

    try:
        return int(tags.get(PRIORITY_TAG, "0"))
    except ValueError:
        return 0


def limits_that_hold(instance: DagsterInstance, run_id: str) -> list[LimitHit]:
    """The limits of tags and pools that keep this run in the queue. Reads 2,000 runs in progress at most."""
    from dagster._core.op_concurrency_limits_counter import GlobalOpConcurrencyLimitsCounter
    from dagster._core.storage.dagster_run import ACTIVE_RUN_STATUSES, RunOpConcurrency
    from dagster._utils.tags import TagConcurrencyLimitsCounter

    run, config = instance.get_run_by_id(run_id), run_queue_config(instance)
    if run is None or config is None:
        return []
    records = instance.get_run_records(RunsFilter(statuses=list(ACTIVE_RUN_STATUSES)), limit=_MOST_IN_PROGRESS)
    in_progress = [record.dagster_run for record in records]
    found = []
    for limit in config.tag_concurrency_limits or ():
        if TagConcurrencyLimitsCounter([dict(limit)], in_progress).is_blocked(run):
            value = limit.get("value")
            name = f"{limit['key']}={run.tags.get(limit['key'])}" if value else str(limit["key"])
            found.append(LimitHit("tag", name, limit["limit"]))
    if not config.should_block_op_concurrency_limited_runs or run.run_op_concurrency is None:
        return found
    storage, pools = instance.event_log_storage, sorted(run.run_op_concurrency.all_pools or ())
    counter = GlobalOpConcurrencyLimitsCounter(
        instance,
        [run],
        records,
        concurrency_keys=storage.get_concurrency_keys(),
        pool_limits=storage.get_pool_limits(),
        slot_count_offset=config.op_concurrency_slot_buffer,
        pool_granularity=instance.get_concurrency_config().pool_config.pool_granularity,
    )
    if counter.is_blocked(run):
        for name in pools[:_MOST_POOLS]:
            alone = RunOpConcurrency(root_key_counts={name: 1}, has_unconstrained_root_nodes=False, all_pools={name})
            if counter.is_blocked(run._replace(run_op_concurrency=alone)):  # a NamedTuple's own way
                found.append(LimitHit("pool", name, storage.get_concurrency_info(name).limit))
    return found


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step of a run that waits for a slot of a pool."""

    step_key: str
    pool: str
    since: float
    limit: int | None
    holders: tuple[str, ...]
    """Run ids."""


def pool_waits(instance: DagsterInstance, run_id: str) -> Sequence[PendingStep]:
    """The steps of a run that wait for a slot of a pool. One query for each pool, of a hundred at most."""
    storage = instance.event_log_storage
    if not storage.supports_global_concurrency_limits:
        return []
    found = []
    for pool in sorted(storage.get_concurrency_keys())[:_MOST_POOLS]:
        info = storage.get_concurrency_info(pool)
        found += [
            PendingStep(
                step.step_key,
                pool,
                step.enqueued_timestamp.timestamp(),
                info.limit,
                tuple(sorted({slot.run_id for slot in info.claimed_slots})),
            )
            for step in info.pending_steps
            if step.run_id == run_id and step.assigned_timestamp is None
        ]
    return found


def queued_tags(instance: DagsterInstance, most: int) -> list[tuple[str, Mapping[str, str]]]:
    """Run id and tags of the runs in Dagster's queue, the oldest first."""
    runs = instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.QUEUED]), limit=most, ascending=True)
    return [(run.run_id, run.tags) for run in runs]
