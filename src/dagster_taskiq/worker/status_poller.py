"""The second channel: the status of every run that this worker works on, in one query, every few seconds.

No luxury beside the cancel queue: for a run that is still STARTING, and on a second click, Dagster's UI never calls
the launcher, it only marks the run. Knows Dagster's run status and one callable; not queues, not processes.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, NoReturn

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq._lane import Lane
from dagster_taskiq._retry import retry_async
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.storage.stops import stored_stop

logger = logging.getLogger(__name__)

_SHORTEST_BOUND_S: Final = 2.0
_WHY: Final[Mapping[DagsterRunStatus, str]] = {
    DagsterRunStatus.CANCELING: "the run is CANCELING",
    DagsterRunStatus.CANCELED: "the run was marked CANCELED",
    DagsterRunStatus.FAILURE: "the run was marked FAILURE",
}


class StatusPoller:
    """`watched` maps task ids to the runs that they work on; `cancel` is called for those to be stopped."""

    def __init__(
        self,
        instance: DagsterInstance,
        watched: Callable[[], Mapping[str, str]],
        cancel: Callable[[str, Cancellation], bool],
        every_s: float,
    ) -> None:
        self._instance = instance
        self._watched = watched
        self._cancel = cancel
        self._every_s = every_s
        self._failed: set[str] = set()
        """Runs that were FAILURE at the last look."""
        self._unread: set[str] = set()
        """Runs of which it could not be read who or what stops them."""
        self._lane = Lane("the database, for the status of runs", max(every_s, _SHORTEST_BOUND_S))

    async def run(self) -> NoReturn:
        """Watch until cancelled. A database that does not answer is survived; nothing is stopped because of it."""
        while True:
            await asyncio.sleep(self._every_s)
            await retry_async(self.look, doing="read the status of runs", longest_pause_s=self._every_s)

    async def look(self) -> None:
        """Look once."""
        watched = dict(self._watched())
        if not watched:
            return
        filters = RunsFilter(run_ids=sorted(set(watched.values())))
        runs = await self._lane.call(self._instance.get_runs, filters)
        found = {run.run_id: run for run in runs}
        # A run's own process writes FAILURE and is gone a moment later. Only one that is still there has to be stopped.
        failed = {run.run_id for run in runs if run.status is DagsterRunStatus.FAILURE}
        just_failed, self._failed = failed - self._failed, failed
        self._unread &= found.keys()
        for task_id, run_id in watched.items():
            if run_id in just_failed:
                continue
            run = found.get(run_id)
            why = _WHY.get(run.status) if run is not None else "the run was deleted"
            if why is not None:
                stop = await self._stop_of(run)
                if stop is not None:
                    self._cancel(task_id, replace(stop, cause=why))

    async def _stop_of(self, run: DagsterRun | None) -> Cancellation | None:
        """Who or what stops the run. When that cannot be read: None, and at the next look, nobody who is known.

        So one such run keeps no other one from being stopped, and is stopped itself.
        """
        stop = None
        if run is not None:
            try:
                stop = await self._lane.call(stored_stop, self._instance, run)
            except Exception:
                if run.run_id not in self._unread:
                    self._unread.add(run.run_id)
                    logger.warning("cannot read who stops run %s, looking once more", run.run_id, exc_info=True)
                    return None
        return stop or Cancellation(CancelKind.REQUESTED, channel=CancelChannel.STATUS_WATCH)
