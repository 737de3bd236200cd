"""A newer run with the same key ends the older ones. Knows runs and claims; how one at work is stopped is given to it.

Write first, look afterwards: a run is QUEUED, or STARTING, before it looks for others. So of two that come at the same
moment at least one sees the other, and whoever looks ends the older one: itself, if that is it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord, RunsFilter

from dagster_taskiq.cancellation.words import OURSELVES
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.many_runs import can_move_runs
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.tags import SUPERSEDE_TAG
from dagster_taskiq.storage.unstarted import Unstarted, end_handed_over, end_queued

logger = logging.getLogger(__name__)

_WAITING: Final = (DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING)
_AT_WORK: Final = (DagsterRunStatus.STARTED,)
_NEWER: Final = (*_WAITING, *_AT_WORK, DagsterRunStatus.SUCCESS)
"""One that is CANCELED or has failed, or was only created, is no reason to end an older one."""
_AT_ONCE: Final = 100
_LONGEST_KEY: Final = 100

Cancel = Callable[[str, str, str], object]
"""Stop a run that may be at work: its id, the reason, the author."""


@dataclass(frozen=True, slots=True)
class Superseding:
    """For one launcher. `cancel`: of its own. All calls block on the database."""

    instance: DagsterInstance
    settings: Settings
    claims: Claims
    cancel: Cancel

    def look(self, run: DagsterRun) -> bool:
        """After a run was put into Dagster's queue, or before it is sent: end the older ones, or it, by its tag.

        True: the run itself was ended. Never raises: a rule that cannot be followed keeps nothing from running. Does
        nothing for a run without the tag.
        """
        if not run.tags.get(SUPERSEDE_TAG):
            return False
        try:
            return self._look(run)
        except Exception:
            logger.exception("cannot look for runs with the same key", extra={"run_id": run.run_id})
            return False

    def _look(self, run: DagsterRun) -> bool:
        key, mine = run.tags[SUPERSEDE_TAG], self.instance.get_run_record_by_id(run.run_id)
        if mine is None:
            return False
        newest = self._newest(key)
        if newest is not None and newest.storage_id > mine.storage_id:
            end = _end(newest.dagster_run.run_id, key)
            return self._end(mine.dagster_run, end)
        statuses = _WAITING if self.settings.superseded_runs == "waiting" else (*_WAITING, *_AT_WORK)
        end = _end(run.run_id, key)
        for older in self._runs(key, statuses):
            if older.storage_id < mine.storage_id:
                self._end_safely(older.dagster_run, end)
        return False

    def _newest(self, key: str) -> RunRecord | None:
        records = self.instance.get_run_records(RunsFilter(tags={SUPERSEDE_TAG: key}, statuses=list(_NEWER)), limit=1)
        return records[0] if records else None

    def _runs(self, key: str, statuses: tuple[DagsterRunStatus, ...]) -> list[RunRecord]:
        filters = RunsFilter(tags={SUPERSEDE_TAG: key}, statuses=list(statuses))
        return [*self.instance.get_run_records(filters, limit=_AT_ONCE)]

    def _end_safely(self, run: DagsterRun, end: Unstarted) -> None:
        """What goes wrong with one of them does not concern the others."""
        try:
            self._end(run, end)
        except Exception:
            logger.exception("a run could not be superseded", extra={"run_id": run.run_id})

    def _end(self, run: DagsterRun, end: Unstarted) -> bool:
        """End a run that waits, or if it is meant as well, one at work. Whether it was ended, or told to end."""
        if run.status is DagsterRunStatus.QUEUED and can_move_runs(self.instance):
            end_queued(self.instance, [run.run_id], end)
            now = self.instance.get_run_by_id(run.run_id)  # Dagster's daemon may have taken it at this moment
            if now is None or now.status in FINISHED_STATUSES:
                return now is not None
            run = now
        if self.settings.superseded_runs == "waiting" or run.status not in _AT_WORK:
            if end_handed_over(self.claims, run.run_id, end):
                return True
            if self.settings.superseded_runs == "waiting":
                return False
        self.cancel(run.run_id, end.reason or "", end.by)
        return True


def _end(by_run: str, key: str) -> Unstarted:
    return Unstarted(f"superseded by run {by_run} ({SUPERSEDE_TAG} = {key[:_LONGEST_KEY]})", OURSELVES)
