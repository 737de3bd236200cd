"""The state of ops, in Dagster's key-value storage. Knows that storage; not who reads or writes the state."""

import hashlib
import time
from collections.abc import Callable
from typing import Final

from dagster import DagsterInstance, RunsFilter

from dagster_taskiq.cancellation.state import State
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.storage import delete_values, put_value, values_under

_PREFIX: Final = "dagster-taskiq/state/"
_KEPT_AFTER_THE_END_S: Final = 7 * 86_400
"""For this time a cleanup can be run again by hand, and the state of an op that has failed is kept."""
_BATCH: Final = 500


def state_of(
    instance: DagsterInstance, run_id: str, step_key: str, saved: Callable[[], object] = lambda: None
) -> State:
    """The state of one step, written by any of its attempts. `saved` is called after each change."""
    key = _key(run_id, step_key)

    def load() -> str | None:
        return retry_storage(lambda: instance.daemon_cursor_storage.get_cursor_values({key}).get(key), "read a state")

    def save(text: str) -> None:
        retry_storage(lambda: put_value(instance, key, text), "write a state")
        saved()

    return State(load, save)


def forget_states(instance: DagsterInstance, run_id: str, step_key: str | None = None) -> None:
    """Delete the states of a run, or the state of one step."""

    def forget() -> None:
        keys = [_key(run_id, step_key)] if step_key is not None else [*values_under(instance, _of_run(run_id))]
        delete_values(instance, keys)

    # An outage that is raised inside an op that has just succeeded would make it fail.
    retry_storage(forget, "delete states")


def forget_old_states(instance: DagsterInstance, now: Callable[[], float] = time.time) -> None:
    """Delete the states of runs that ended more than a week ago, or were deleted."""
    keys: dict[str, list[str]] = {}
    for key in values_under(instance, _PREFIX):
        keys.setdefault(key.removeprefix(_PREFIX).partition("/")[0], []).append(key)
    run_ids = [*keys]
    for start in range(0, len(run_ids), _BATCH):
        some = run_ids[start : start + _BATCH]
        records = {one.dagster_run.run_id: one for one in instance.get_run_records(RunsFilter(run_ids=some))}
        ends = {run_id: records[run_id].end_time if run_id in records else 0.0 for run_id in some}
        over = [run_id for run_id, end in ends.items() if end is not None and now() - end > _KEPT_AFTER_THE_END_S]
        delete_values(instance, [key for run_id in over for key in keys[run_id]])


def _of_run(run_id: str) -> str:
    return f"{_PREFIX}{run_id}/"


def _key(run_id: str, step_key: str) -> str:
    return _of_run(run_id) + hashlib.blake2s(step_key.encode(), digest_size=8).hexdigest()
