"""Stop what launches runs, a schedule, a sensor or a backfill, and then the runs that it has launched.

Knows what Dagster's instance stores about them; not their code.
"""

import logging
import time
from threading import Event
from typing import Any, Final

from dagster import DagsterInstance

from dagster_taskiq._text import clean_text
from dagster_taskiq.cancel_many import CancelReport, cancel_runs
from dagster_taskiq.dagster_compat.sources import (
    BULK_ACTION_TERMINAL_STATUSES,
    BulkActionStatus,
    InstigatorState,
    InstigatorType,
    PartitionBackfill,
)
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.run_query import RunQuery
from dagster_taskiq.run_selection import select_runs
from dagster_taskiq.runs import launcher_of

logger = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 0.5
_QUIET_S: Final = 3.0
"""The daemon reads a backfill and writes it back within milliseconds, or within a second or two on a busy machine."""
_AT_MOST_S: Final = 30.0


def cancel_schedule(
    instance: DagsterInstance, name: str, *, location: str | None = None, include_runs: bool = True, **options: Any
) -> CancelReport:
    """Stop a schedule, as in Dagster's UI, so that it launches no more runs; then cancel those that it has launched.

    `location`: the code location, where several have a schedule of that name. `include_runs=False` leaves its runs
    alone. `options`: as for `cancel_runs`. Raises `DagsterTaskiqError` when the instance knows no such schedule, or
    several.
    """
    return _cancel_source(instance, InstigatorType.SCHEDULE, name, location, include_runs, options)


def cancel_sensor(
    instance: DagsterInstance, name: str, *, location: str | None = None, include_runs: bool = True, **options: Any
) -> CancelReport:
    """As `cancel_schedule`, of a sensor."""
    return _cancel_source(instance, InstigatorType.SENSOR, name, location, include_runs, options)


def cancel_backfill(instance: DagsterInstance, backfill_id: str, **options: Any) -> CancelReport:
    """Have Dagster's daemon launch no more runs of a backfill, as in its UI, and cancel those that it has launched.

    The daemon makes the backfill CANCELED when its runs have ended. It takes some seconds: see `stay_cancelled`, which
    adds what the backfill still launches. `options`: as for `cancel_runs`. Raises `DagsterTaskiqError` when there is no
    such backfill.
    """
    launcher_of(instance)
    _mark_canceling(instance, backfill_id)
    its_runs = RunQuery(backfill=backfill_id)
    return stay_cancelled(instance, its_runs, cancel_runs(instance, its_runs, **options), **options)


def stay_cancelled(
    instance: DagsterInstance,
    query: RunQuery,
    report: CancelReport,
    *,
    quiet_s: float = _QUIET_S,
    at_most_s: float = _AT_MOST_S,
    **options: Any,
) -> CancelReport:
    """Look again and again whether the backfill of a query stays cancelled; cancel it, and what it launches, again.

    Dagster's daemon may be at work on the backfill: it launches the runs of its turn to the end, and may then write the
    backfill back as it had read it before, with the status REQUESTED. So one look is not enough. Returns, with what
    came added to `report`, when nothing of that has happened for `quiet_s` seconds, when the status is final, when
    `stop` is set, or after `at_most_s` seconds, with a warning in the log if it still comes back. `options`: as for
    `cancel_runs`.
    """
    stop: Event = options.setdefault("stop", None) or Event()
    began = changed_at = time.monotonic()
    seen = report.run_ids
    while not stop.is_set():
        came_back = _mark_canceling(instance, query.backfill or "")
        new = select_runs(instance, query).new_to(seen)
        if new:
            report += cancel_runs(instance, new, **options)
            seen = report.run_ids
        looked_at = time.monotonic()
        if came_back or new:
            changed_at = looked_at
        if looked_at - began >= at_most_s:
            if came_back:
                logger.warning("the backfill does not stay cancelled", extra={"backfill_id": query.backfill})
            break
        if looked_at - changed_at >= quiet_s or _is_over(instance, query.backfill or ""):
            break
        stop.wait(_LOOK_EVERY_S)
    return report


def stop_source(instance: DagsterInstance, query: RunQuery) -> str:
    """Stop the schedule, the sensor or the backfill of a query, so that it launches no more runs; its runs go on.

    Returns what it has stopped, in words. A second call is harmless. A backfill may come back: see `stay_cancelled`.
    Raises `DagsterTaskiqError` as `cancel_schedule` and `cancel_backfill`.
    """
    if query.backfill is not None:
        _mark_canceling(instance, query.backfill)
        return f"backfill {clean_text(query.backfill)}"
    kind = InstigatorType.SCHEDULE if query.schedule is not None else InstigatorType.SENSOR
    _, state = _find(instance, kind, query.schedule or query.sensor or "", query.location)
    _stop(instance, state)
    return f"{kind.value.lower()} {clean_text(state.name)}"


def check_source(instance: DagsterInstance, query: RunQuery) -> None:
    """Raise what `stop_source` would raise; stop nothing."""
    if query.backfill is not None:
        _backfill(instance, query.backfill)
    else:
        kind = InstigatorType.SCHEDULE if query.schedule is not None else InstigatorType.SENSOR
        _find(instance, kind, query.schedule or query.sensor or "", query.location)


def _is_over(instance: DagsterInstance, backfill_id: str) -> bool:
    backfill = instance.get_backfill(backfill_id)
    return backfill is None or backfill.status in BULK_ACTION_TERMINAL_STATUSES


def _backfill(instance: DagsterInstance, backfill_id: str) -> PartitionBackfill:
    backfill = instance.get_backfill(backfill_id)
    if backfill is None:
        raise DagsterTaskiqError(
            f"there is no backfill {clean_text(backfill_id)} in this Dagster instance; is DAGSTER_HOME the right one?"
        )
    return backfill


def _mark_canceling(instance: DagsterInstance, backfill_id: str) -> bool:
    """Whether there was need to."""
    backfill = _backfill(instance, backfill_id)
    if backfill.status in {*BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus.CANCELING}:
        return False
    instance.update_backfill(backfill.with_status(BulkActionStatus.CANCELING))  # type: ignore[no-untyped-call]
    return True


def _cancel_source(
    instance: DagsterInstance,
    kind: InstigatorType,
    name: str,
    location: str | None,
    include_runs: bool,
    options: dict[str, Any],
) -> CancelReport:
    launcher_of(instance)  # before anything is stopped
    is_alone, state = _find(instance, kind, name, location)
    _stop(instance, state)
    if not include_runs:
        return CancelReport((), (), (), {})
    schedule, sensor = (name, None) if kind is InstigatorType.SCHEDULE else (None, name)
    its_runs = RunQuery(schedule=schedule, sensor=sensor, location=None if is_alone else _location(state))
    return cancel_runs(instance, its_runs, **options)


def _find(
    instance: DagsterInstance, kind: InstigatorType, name: str, location: str | None
) -> tuple[bool, InstigatorState]:
    """What the instance stores of a schedule or sensor, and whether it is the only one of that name."""
    named = [state for state in instance.all_instigator_state(instigator_type=kind) if state.name == name]
    found = [state for state in named if location is None or _location(state) == location]
    what = kind.value.lower()
    if not found:
        raise DagsterTaskiqError(
            f"this Dagster instance knows no {what} {clean_text(name)}"
            f"{f' in {clean_text(location)}' if location is not None else ''}: it was never started, or the daemon has"
            f" not seen it yet; stop it in Dagster's UI, or with `dagster {what} stop`, which read its code"
        )
    if len(found) > 1:
        where = ", ".join(sorted(map(_location, found)))
        raise DagsterTaskiqError(
            f"several code locations have a {what} {name} ({where}); name one as location=, or --code-location"
        )
    return len(named) == 1, found[0]


def _stop(instance: DagsterInstance, state: InstigatorState) -> None:
    schedule = state.instigator_type is InstigatorType.SCHEDULE
    stop = instance.stop_schedule if schedule else instance.stop_sensor
    if state.is_running:
        stop(state.instigator_origin_id, state.selector_id, None)


def _location(state: InstigatorState) -> str:
    return state.origin.repository_origin.code_location_origin.location_name
