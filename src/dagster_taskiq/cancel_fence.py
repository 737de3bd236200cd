"""Cancel the runs that a query means, and for some time those that come to match it, before they start.

Knows fences and how many runs are cancelled; not who asks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Final

from dagster import DagsterInstance, RunsFilter

from dagster_taskiq._text import clean_text
from dagster_taskiq.cancel_many import CancelReport, cancel_runs
from dagster_taskiq.run_fence import Fence, put_up, take_down
from dagster_taskiq.run_query import RunQuery
from dagster_taskiq.run_selection import select_runs
from dagster_taskiq.runs import this_user
from dagster_taskiq.storage.tags import CANCEL_FENCE_TAG

_LOOK_EVERY_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class FenceProgress:
    """How long the fence still stands, in seconds, and how many runs have come since it was put up."""

    left_s: float
    of_s: float
    caught: int


def cancel_behind_fence(
    instance: DagsterInstance,
    query: RunQuery,
    *,
    hold_s: float,
    reason: str | None = None,
    requested_by: str | None = None,
    watch: Callable[[FenceProgress], None] = lambda _: None,
    stop: Event | None = None,
    **options: Any,
) -> CancelReport:
    """As `cancel_runs`; and runs that are launched within `hold_s` seconds and match are cancelled before they start.

    The fence is put up first, as a row of Dagster's key-value storage, so a launcher that sees it launches nothing that
    matches, whoever asks for it: a schedule, a sensor, a backfill, a person. Those that wait in Dagster's queue are
    ended there, twice a second. It is taken down at the end, also when `stop` is set or something goes wrong; if this
    process is killed, it ends by itself.

    A run of which the query's expression cannot be evaluated is launched, and is among those that failed, with the
    reason, unless it has ended before anybody has looked; its log says so, too. What is there before the fence is as
    for `cancel_runs`: `QueryError`, and nothing is cancelled.

    The query names no status and no age. `watch` is called twice a second. `options`: as for `cancel_runs`. Raises
    `QueryError`, and `DagsterTaskiqError` with a storage that is not SQL.
    """
    stop, began = stop or Event(), time.monotonic()
    by = clean_text(requested_by or this_user())
    fence = Fence(query, time.time() + hold_s, clean_text(reason) if reason else None, by)
    asked: dict[str, Any] = {"reason": reason, "requested_by": by, "stop": stop, **options}
    unclear: dict[str, str] = {}
    put_up(instance, fence)
    try:
        report = cancel_runs(instance, select_runs(instance, query), **asked)
        seen, caught = report.run_ids, 0
        while not stop.is_set():
            left_s = began + hold_s - time.monotonic()
            now = select_runs(instance, query, unclear=lambda run_id, why: unclear.update({run_id: str(why)}))
            new = now.new_to(seen)
            if new:
                report += cancel_runs(instance, new, **{**asked, "tell": lambda _: None})
                seen, caught = report.run_ids, caught + len(new)
            watch(FenceProgress(max(0.0, left_s), hold_s, caught))
            if left_s <= 0:
                break
            stop.wait(min(_LOOK_EVERY_S, left_s))
    finally:
        take_down(instance, fence)
    report = replace(report, failed={**unclear, **report.failed})
    return _with_those_at_the_fence(instance, fence, report)


def _with_those_at_the_fence(instance: DagsterInstance, fence: Fence, report: CancelReport) -> CancelReport:
    """The launcher has ended them; it says so in their tags."""
    runs = instance.get_runs(RunsFilter(tags={CANCEL_FENCE_TAG: fence.fence_id}))
    known = frozenset(report.cancelled)
    ids = [run.run_id for run in runs if run.run_id not in known]
    over = tuple(run_id for run_id in report.already_finished if run_id not in ids)
    failed = {run_id: why for run_id, why in report.failed.items() if run_id not in ids}
    more = CancelReport(tuple(ids), (), (), {}, withdrawn=tuple(ids))
    return replace(report, already_finished=over, failed=failed) + more
