"""Fences: for some time, runs that a query means are cancelled where they would be launched.

Knows queries and Dagster's key-value storage, where all fences are one row; not who cancels. Every launch reads that
row, so a run that is launched after a fence was put up is never sent to a worker.
"""

import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.dagster_compat.key_values import insert_value, read_values, replace_value
from dagster_taskiq.errors import QueryError
from dagster_taskiq.run_query import RunQuery
from dagster_taskiq.storage.engine_events import unclear_at_fence
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.stored import Unreadable, is_number, stored_list, tell_unreadable

logger = logging.getLogger(__name__)

_KEY: Final = "dagster-taskiq/fences"
_TRIES: Final = 20
_FIELDS: Final = frozenset(one.name for one in fields(RunQuery)) - {"statuses", "older_than_s"}


@dataclass(frozen=True, slots=True)
class Fence:
    """`until`: seconds since the epoch, by the clock of who puts it up.

    Raises `QueryError` for a query that no new run can match.
    """

    query: RunQuery
    until: float
    reason: str | None
    requested_by: str
    fence_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        """A run is new when it is launched."""
        if self.query.statuses or self.query.older_than_s is not None:
            raise QueryError("a fence is for runs that are launched from now on: it goes with no status and no age")


def put_up(instance: DagsterInstance, fence: Fence) -> None:
    """From now on, runs that it means are not launched. Blocks on the database."""
    _change(instance, lambda stored: [*stored, _as_json(fence)])


def take_down(instance: DagsterInstance, fence: Fence) -> None:
    """Runs are launched again. Harmless when it is not there."""
    _change(instance, lambda stored: [one for one in stored if one.get("fence_id") != fence.fence_id])


def fence_for(instance: DagsterInstance, run: DagsterRun) -> Fence | None:
    """The fence that keeps this run from being launched, if there is one. One query as long as there is no fence.

    A fence that cannot be read, and one whose expression cannot be evaluated of this run, keeps nothing from being
    launched; the log says so, and in the second case the run's.
    """
    record = None
    for fence in filter(None, map(_from_json, _read(instance)[1])):
        record = record or instance.get_run_record_by_id(run.run_id)
        if record is None:
            return None
        try:
            if fence.query.matches(record.dagster_run, record.create_timestamp.timestamp()):
                return fence
        except QueryError as error:
            logger.warning("a fence cannot tell whether it means a run: %s", error, extra={"run_id": run.run_id})
            append_event(instance, record.dagster_run, unclear_at_fence(run.run_id, str(error)))
    return None


def _change(instance: DagsterInstance, change: Any) -> None:
    """Compared and swapped; those whose time is over are dropped."""
    for _ in range(_TRIES):
        old, stored = _read(instance)
        new = json.dumps(change(list(stored)))
        if new == old or (
            insert_value(instance, _KEY, new) if old is None else replace_value(instance, _KEY, old, new)
        ):
            return
    raise TimeoutError("others change the fences all the time")


def _read(instance: DagsterInstance) -> tuple[str | None, Sequence[Mapping[str, Any]]]:
    """The row, and what it says of those that still stand. What is no list of them is as good as none."""
    text = read_values(instance, [_KEY]).get(_KEY)
    try:
        found = stored_list(text) if text is not None else []
    except Unreadable as error:
        tell_unreadable("the row of the fences", error)
        found = []
    return text, [one for one in found if isinstance(one, dict) and _stands(one.get("until"))]


def _stands(until: object) -> bool:
    return is_number(until) and time.time() < float(until)  # type: ignore[arg-type]


def _as_json(fence: Fence) -> dict[str, Any]:
    given = {name: getattr(fence.query, name) for name in sorted(_FIELDS)}
    query = {name: value for name, value in given.items() if value not in (None, ())}
    return {
        "fence_id": fence.fence_id,
        "until": fence.until,
        "reason": fence.reason,
        "requested_by": fence.requested_by,
        "query": query,
    }


def _from_json(stored: Mapping[str, Any]) -> Fence | None:
    """None: it is not one of this version. What it means is not guessed: it might be fewer runs than it seems."""
    try:
        query = dict(stored["query"])
        query["tags"] = tuple((key, value) for key, value in query.get("tags", ()))
        if "partition_range" in query:
            first, last = query["partition_range"]
            query["partition_range"] = (first, last)
        reason, by = stored["reason"], str(stored["requested_by"])
        return Fence(RunQuery(**query), stored["until"], str(reason) if reason else None, by, stored["fence_id"])
    except Exception as error:  # noqa: BLE001 - whatever it is, no run has to wait for it
        tell_unreadable(f"fence {stored.get('fence_id')}", error)
        return None
