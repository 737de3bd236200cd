"""Stop what launches runs, a schedule, a sensor or a backfill, and then the runs that it has launched.

Knows what Dagster's instance stores about them; not their code.
"""

from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, RunsFilter

from dagster_taskiq._text import clean_text
from dagster_taskiq.cancel_many import CancelReport, cancel_runs
from dagster_taskiq.dagster_compat.api import BACKFILL_ID_TAG
from dagster_taskiq.dagster_compat.sources import (
    BULK_ACTION_TERMINAL_STATUSES,
    SCHEDULE_NAME_TAG,
    SENSOR_NAME_TAG,
    BulkActionStatus,
    InstigatorState,
    InstigatorType,
)
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.run_selection import WhichRuns
from dagster_taskiq.runs import launcher_of

_TRIES: Final = 3


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

    The daemon makes the backfill CANCELED when its runs have ended. `options`: as for `cancel_runs`. Raises
    `DagsterTaskiqError` when there is no such backfill.
    """
    launcher_of(instance)
    for _ in range(_TRIES):  # the daemon may be about to write the status that it has read before
        _mark_canceling(instance, backfill_id)
        report = cancel_runs(instance, RunsFilter(tags={BACKFILL_ID_TAG: backfill_id}), **options)
        if not _goes_on(instance, backfill_id):
            break
    return report


def _goes_on(instance: DagsterInstance, backfill_id: str) -> bool:
    backfill = instance.get_backfill(backfill_id)
    over = {*BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus.CANCELING}
    return backfill is not None and backfill.status not in over


def _mark_canceling(instance: DagsterInstance, backfill_id: str) -> None:
    backfill = instance.get_backfill(backfill_id)
    if backfill is None:
        raise DagsterTaskiqError(
            f"there is no backfill {clean_text(backfill_id)} in this Dagster instance; is DAGSTER_HOME the right one?"
        )
    if _goes_on(instance, backfill_id):
        canceling = backfill.with_status(BulkActionStatus.CANCELING)  # type: ignore[no-untyped-call]
        instance.update_backfill(canceling)


def _cancel_source(
    instance: DagsterInstance,
    kind: InstigatorType,
    name: str,
    location: str | None,
    include_runs: bool,
    options: dict[str, Any],
) -> CancelReport:
    launcher_of(instance)  # before anything is stopped
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
        raise DagsterTaskiqError(f"several code locations have a {what} {name} ({where}); name one as location=")
    (state,) = found
    stop = instance.stop_schedule if kind is InstigatorType.SCHEDULE else instance.stop_sensor
    if state.is_running:
        stop(state.instigator_origin_id, state.selector_id, None)
    if not include_runs:
        return CancelReport((), (), (), {})
    tag = SCHEDULE_NAME_TAG if kind is InstigatorType.SCHEDULE else SENSOR_NAME_TAG
    which: WhichRuns = RunsFilter(tags={tag: name})
    if len(named) > 1:
        which = _Launched(tag, name, _location(state))
    return cancel_runs(instance, which, **options)


class _Launched:
    """The runs of one of several of the same name."""

    def __init__(self, tag: str, name: str, location: str) -> None:
        self._tag, self._name, self._location = tag, name, location

    def __call__(self, run: DagsterRun) -> bool:
        origin = run.remote_job_origin
        return run.tags.get(self._tag) == self._name and origin is not None and origin.location_name == self._location


def _location(state: InstigatorState) -> str:
    return state.origin.repository_origin.code_location_origin.location_name
