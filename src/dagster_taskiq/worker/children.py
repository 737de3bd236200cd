"""The runs that a run has launched: cancelled with it, and waited for, where a setting or a tag says so.

Knows Dagster's runs; how one is cancelled is handed to it. A run that somebody has launched again after the end of its
parent names the same parent (a re-execution), and is left alone.
"""

import asyncio
import logging
from datetime import UTC, datetime
from time import monotonic
from typing import Final

from dagster import DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.words import OURSELVES, UNKNOWN_AUTHOR
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, PARENT_RUN_ID_TAG
from dagster_taskiq.storage import step_events
from dagster_taskiq.storage.engine_events import EngineEvent
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, cancels_children, own_tags
from dagster_taskiq.worker.context import WorkerContext

logger = logging.getLogger(__name__)

_TOGETHER: Final = 10
"""Children that are cancelled in one call, so that it does not take too long for one."""
_LONGEST_PAUSE_S: Final = 1.0
_UNFINISHED: Final = [status for status in DagsterRunStatus if status not in FINISHED_STATUSES]


async def cancel_children(context: WorkerContext, run: DagsterRun, cancellation: Cancellation | None) -> bool:
    """Cancel the unfinished runs that this one launched, and wait until they are final, within their patience.

    Its own processes and steps are gone, so there will be no more of them. What was begun before, by a worker that has
    died, is found again. False: the worker stops, and it has to go on elsewhere.
    """
    if not context.settings.enable_cancellation or not cancels_children(run.tags, context.settings.cancel_children):
        return True
    began, pause_s, patience_s = monotonic(), 0.05, 0.0
    seen: set[str] = set()
    failed: dict[str, str] = {}
    reason, by = _why(run, cancellation)
    while left := await context.through_outages(lambda: _unfinished(context, run), "look for runs that a run launched"):
        if new := [child for child in left if child.run_id not in seen]:
            seen.update(child.run_id for child in new)
            patience_s = max(patience_s, *(context.settings.children_patience_s(context.grace_s(one)) for one in new))
            await _tell(context, run, step_events.cancelling_children([child.run_id for child in new]))
            for start in range(0, len(new), _TOGETHER):
                some = [child.run_id for child in new[start : start + _TOGETHER]]
                try:
                    failed |= await context.lane.call(context.cancel_runs, context.instance, some, reason, by)
                except Exception:  # whatever it is: it may have done it all the same, and the run itself is to end
                    logger.exception("runs that a run launched could not be cancelled", extra={"run_id": run.run_id})
            continue
        if context.shutdown.is_set:
            return False
        waited_s = monotonic() - began
        if waited_s >= patience_s or all(child.run_id in failed for child in left):
            why = next((failed[child.run_id] for child in left if child.run_id in failed), None)
            event = step_events.children_not_final([child.run_id for child in left], waited_s, why)
            await _tell(context, run, event)
            return True
        await asyncio.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)
    if seen:
        await _tell(context, run, step_events.children_final(len(seen), monotonic() - began))
    return True


async def _tell(context: WorkerContext, run: DagsterRun, event: EngineEvent) -> None:
    await context.through_outages(lambda: append_event(context.instance, run, event), "write an engine event")


def _unfinished(context: WorkerContext, run: DagsterRun) -> list[DagsterRun]:
    """Children that were there before the run was final, if it is: later ones are re-executions."""
    record = context.instance.get_run_record_by_id(run.run_id)
    ended_at = datetime.fromtimestamp(record.end_time, UTC) if record is not None and record.end_time else None
    children = RunsFilter(tags={PARENT_RUN_ID_TAG: run.run_id}, statuses=_UNFINISHED, created_before=ended_at)
    return [*context.instance.get_runs(children)]


def _why(run: DagsterRun, cancellation: Cancellation | None) -> tuple[str, str]:
    """The reason and the author that the children are given: those of their parent."""
    tags = own_tags(run)
    reason = tags.get(CANCEL_REASON_TAG) or (cancellation.reason if cancellation is not None else None)
    by = tags.get(CANCELLED_BY_TAG) or (cancellation.requested_by if cancellation is not None else None)
    if cancellation is not None and cancellation.kind is CancelKind.DEADLINE:
        return f"parent run {run.run_id} timed out", by or OURSELVES
    why = f"parent run {run.run_id} was terminated"
    return f"{why}: {reason}" if reason else why, by or UNKNOWN_AUTHOR
