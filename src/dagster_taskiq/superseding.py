"""A newer run with the same key ends the older ones. Knows runs and claims; how one at work is stopped is given to it.

Write first, look afterwards: a run is QUEUED, or STARTING, before it looks for others. So of two that come at the same
moment at least one sees the other, and whoever looks ends the older one: itself, if that is it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    RunRecord,
    RunsFilter,
)

from dagster_taskiq.cancellation.words import OURSELVES, asked
from dagster_taskiq.dagster_compat.api import AUTO_RETRY_RUN_ID_TAG, FINISHED_STATUSES, RETRY_NUMBER_TAG
from dagster_taskiq.dagster_compat.many_runs import can_move_runs, move_runs, store_events
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import TERMINATING
from dagster_taskiq.storage.tags import SUPERSEDE_TAG, add_own_tags
from dagster_taskiq.storage.unstarted import Unstarted, end_handed_over, end_queued

logger = logging.getLogger(__name__)

_WAITING: Final = (DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING)
_AT_WORK: Final = (DagsterRunStatus.STARTED,)
_NEWER: Final = (*_WAITING, *_AT_WORK, DagsterRunStatus.SUCCESS)
"""One that is CANCELED or has failed, or was only created, is no reason to end an older one."""
_AT_ONCE: Final = 100
_FEW: Final = 10
"""The newest run of a key is the one that looks, as a rule."""
_LONGEST_KEY: Final = 100
_ENDED_WITHIN_S: Final = 2.0
_LOOK_EVERY_S: Final = 0.05

Cancel = Callable[[DagsterRun, str, str], object]
"""Stop a run that may be at work, as it was read: the run, the reason, the author."""
_Rank = tuple[int, int]


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
        rank = self._rank(mine)
        newer = self._newer(key, rank)
        if newer is not None:
            return self._end_itself(mine.dagster_run, _end(newer.dagster_run.run_id, key))
        statuses = _WAITING if self.settings.superseded_runs == "waiting" else (*_WAITING, *_AT_WORK)
        older = [one.dagster_run for one in self._records(key, statuses, _AT_ONCE) if self._rank(one) < rank]
        self._end_all(older, _end(run.run_id, key))
        return False

    def _rank(self, record: RunRecord) -> _Rank:
        """Higher is newer. An automatic retry has the place of the run that it goes on from, and so on to the first."""
        first = record
        while (retried := self._retried(first.dagster_run)) is not None and retried.storage_id < first.storage_id:
            first = retried
        return first.storage_id, record.storage_id

    def _retried(self, run: DagsterRun) -> RunRecord | None:
        """Which run Dagster's daemon tries again with this one; None: with this one none.

        It gives the retry a number before it exists, and the failed run the id of its retry before that is submitted. A
        number alone may be a copy, in a run that a person wants now.
        """
        if RETRY_NUMBER_TAG not in run.tags or run.parent_run_id is None:
            return None
        parent = self.instance.get_run_record_by_id(run.parent_run_id)
        is_named = parent is not None and parent.dagster_run.tags.get(AUTO_RETRY_RUN_ID_TAG) == run.run_id
        return parent if is_named else None

    def _newer(self, key: str, rank: _Rank) -> RunRecord | None:
        for record in self._records(key, _NEWER, _FEW):
            if record.storage_id <= rank[0]:
                return None  # nor is any of those that follow
            if self._rank(record) > rank:
                return record
        return None

    def _records(self, key: str, statuses: Sequence[DagsterRunStatus], at_once: int) -> Iterator[RunRecord]:
        """The last one that was created first."""
        filters, cursor = RunsFilter(tags={SUPERSEDE_TAG: key}, statuses=list(statuses)), None
        while True:
            records = self.instance.get_run_records(filters, limit=at_once, cursor=cursor)
            yield from records
            if len(records) < at_once:
                return
            cursor = records[-1].dagster_run.run_id

    def _end_itself(self, run: DagsterRun, end: Unstarted) -> bool:
        """Whether it was ended, here or by a newer one that looks at the same moment."""
        if run.status is DagsterRunStatus.QUEUED:
            return bool(self._withdraw([run], end))
        if end_handed_over(self.claims, run.run_id, end):
            return True
        until = time.monotonic() + _ENDED_WITHIN_S
        while (is_left := self.claims.is_withheld(run.run_id)) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
        now = self.instance.get_run_by_id(run.run_id)
        return not is_left and now is not None and now.status in FINISHED_STATUSES

    def _end_all(self, runs: Sequence[DagsterRun], end: Unstarted) -> None:
        """What goes wrong with one of them does not concern the others."""
        queued = [run for run in runs if run.status is DagsterRunStatus.QUEUED]
        others = [run for run in runs if run.status is not DagsterRunStatus.QUEUED]
        for start in range(0, len(queued), _AT_ONCE):
            some = queued[start : start + _AT_ONCE]
            try:
                ended = self._withdraw(some, end)
                # Dagster's daemon may have taken some of them at this moment.
                left = [run.run_id for run in some if run.run_id not in ended]
                others += self.instance.get_runs(RunsFilter(run_ids=left)) if left else ()
            except Exception:
                logger.exception("waiting runs could not be superseded")
        for run in others:
            try:
                self._end_begun(run, end)
            except Exception:
                logger.exception("a run could not be superseded", extra={"run_id": run.run_id})

    def _withdraw(self, runs: Sequence[DagsterRun], end: Unstarted) -> set[str]:
        run_ids = [run.run_id for run in runs]
        return end_queued(self.instance, run_ids, end) if can_move_runs(self.instance) else set()

    def _end_begun(self, run: DagsterRun, end: Unstarted) -> None:
        """End a run that has left the queue, or, where those are meant as well, one at work."""
        if run.status is DagsterRunStatus.STARTING and end_handed_over(self.claims, run.run_id, end):
            return
        if self.settings.superseded_runs == "waiting" or self.claims.is_withheld(run.run_id):
            return
        now: DagsterRun | None = run
        while now is not None and now.status in (DagsterRunStatus.STARTING, DagsterRunStatus.STARTED):
            if self._is_first_to_stop(now, end):
                self.cancel(self.instance.get_run_by_id(run.run_id) or now, end.reason or "", end.by)
                return
            now = self.instance.get_run_by_id(run.run_id)

    def _is_first_to_stop(self, run: DagsterRun, end: Unstarted) -> bool:
        """Of all that look at this moment the one that writes the status asks its worker. The others read CANCELING."""
        if not self.settings.enable_cancellation:
            return True
        add_own_tags(self.instance, run, end.tags)  # before the status: who reads that reads them with it
        if not move_runs(self.instance, [run], run.status, DagsterRunStatus.CANCELING):
            return False
        # Before its worker is told: after the end of the run it would have to be repaired.
        said = asked(TERMINATING, end.by, end.reason)
        event = DagsterEvent(DagsterEventType.RUN_CANCELING.value, run.job_name, message=said)
        store_events(self.instance, {run.run_id: [event]})
        return True


def _end(by_run: str, key: str) -> Unstarted:
    return Unstarted(f"superseded by run {by_run} ({SUPERSEDE_TAG} = {key[:_LONGEST_KEY]})", OURSELVES)
