"""Cancel many runs: what waits first, so that nothing starts in a slot that becomes free, then what is at work.

Knows Dagster's runs and the launcher; not SQS, not processes. Which runs are meant is `run_selection`'s to say.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, Lock
from typing import Final

from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq._text import clean_text
from dagster_taskiq._time_limit import CALL_S
from dagster_taskiq.cancellation.model import CancelOutcome
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.connections import bounded_calls
from dagster_taskiq.dagster_compat.many_runs import can_move_runs, statuses_of
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.run_selection import RunSelection, WhichRuns, groups_of, is_query, select_runs
from dagster_taskiq.runs import launcher_of, request_cancel, this_user
from dagster_taskiq.storage.unstarted import Unstarted, end_queued

logger = logging.getLogger(__name__)

_TOGETHER: Final = 100
"""Waiting runs that are ended in one transaction."""
_MESSAGES: Final = 10
"""Runs whose messages go in one request: as many as SQS takes."""
_AT_ONCE: Final = 4
"""Such requests, with the writing into the database that belongs to them."""
_A_MOMENT_S: Final = 60.0
"""From Dagster's event that a run is starting until its launcher has given it a task id: milliseconds, most times."""
_PASSES: Final = 5
"""So often it looks again for what matches only now, or was started while it was being ended."""


@dataclass(frozen=True, slots=True)
class CancelReport:
    """What became of many runs, by their ids. Each run is in one of these, and in `marked` besides."""

    cancelled: tuple[str, ...]
    """Ended, or being stopped: as where `cancel_run` returns True."""
    already_finished: tuple[str, ...]
    not_found: tuple[str, ...]
    failed: Mapping[str, str]
    """Those that go on, or may go on elsewhere, and why."""
    left: tuple[str, ...] = ()
    """Not reached, because it was stopped before."""
    marked: tuple[str, ...] = ()
    """Of the cancelled: the cancel message could not be sent, so a worker sees the status within its polling time."""
    withdrawn: tuple[str, ...] = ()
    """Of the cancelled: ended while they waited, before a worker had them."""

    @property
    def run_ids(self) -> frozenset[str]:
        """All of them."""
        return frozenset((*self.cancelled, *self.already_finished, *self.not_found, *self.failed, *self.left))

    @property
    def told(self) -> tuple[str, ...]:
        """Of the cancelled: those that a worker may have, and stops."""
        withdrawn = frozenset(self.withdrawn)
        return tuple(run_id for run_id in self.cancelled if run_id not in withdrawn)

    def __add__(self, later: "CancelReport") -> "CancelReport":
        """Both, of different runs."""
        return CancelReport(
            self.cancelled + later.cancelled,
            self.already_finished + later.already_finished,
            self.not_found + later.not_found,
            {**self.failed, **later.failed},
            self.left + later.left,
            self.marked + later.marked,
            self.withdrawn + later.withdrawn,
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """How many there are of each kind, without the kinds of which there is none."""
        kinds = {
            "cancelled": self.cancelled,
            "already finished": self.already_finished,
            "not found": self.not_found,
            "failed": self.failed,
            "not reached": self.left,
        }
        return {kind: len(runs) for kind, runs in kinds.items() if runs}

    def __str__(self) -> str:
        said = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "no runs"
        return said + (f"; no cancel message for {len(self.marked)} of them" if self.marked else "")


@dataclass(frozen=True, slots=True)
class CancelProgress:
    """How far it is: runs that have been seen to, and all that have been found so far."""

    done: int
    of: int


def cancel_runs(
    instance: DagsterInstance,
    which: WhichRuns | RunSelection,
    *,
    reason: str | None = None,
    requested_by: str | None = None,
    tell: Callable[[CancelProgress], None] = lambda _: None,
    stop: Event | None = None,
    per_second: float | None = None,
) -> CancelReport:
    """Stop many runs, each as `cancel_run` does it, and tell what became of them. Returns when all have been asked to.

    `which`: a `RunsFilter`, a `RunQuery`, whole ids, a function that is asked about every run that is not finished, or
    what `select_runs` has found. First all runs that wait in Dagster's queue are ended, in the order in which it would
    start them, then those that no worker has picked up; only then those at work are told, with one request for ten
    messages.
    With a filter, a query or a function, runs that come to match meanwhile are among them.

    `per_second`: so many runs that are at work, at most, are told to stop in one second, because of what their ends do
    to other systems. What waits has no such end, and is ended as quickly as it can be.

    `tell` is called after every group of runs. When `stop` is set, it returns soon, and says which runs are left.
    `requested_by`: default `this_user()`. Raises `DagsterTaskiqError` when the instance has another run launcher;
    what goes wrong with one run is in the report, and does not concern the others.
    """
    by = clean_text(requested_by or this_user())
    pace = _Pace(per_second, stop := stop or Event())
    many = _Many(instance, launcher_of(instance), reason, by, tell, stop, pace)
    many.cancel(which if isinstance(which, RunSelection) else select_runs(instance, which))
    for _ in range(_PASSES):
        again = many.started_meanwhile()
        if not isinstance(which, RunSelection) and is_query(which):
            again = many.new_in(select_runs(instance, which), again)
        if many.is_stopped or not again:
            break
        many.cancel(again)
    return many.report()


class _Pace:
    """So many in a second, whoever asks. Knows no runs."""

    def __init__(self, per_second: float | None, stop: Event) -> None:
        self._per_second = per_second
        self._stop = stop
        self._lock = Lock()
        self._next_at = time.monotonic()

    def wait(self, count: int) -> None:
        """Return when so many may be told, or when it is to stop."""
        if self._per_second is None:
            return
        with self._lock:
            at = max(self._next_at, time.monotonic())
            self._next_at = at + count / self._per_second
        self._stop.wait(max(0.0, at - time.monotonic()))

    def group(self, most: int) -> int:
        """How many are to be told together."""
        return most if self._per_second is None else max(1, min(most, int(self._per_second)))


class _Many:
    def __init__(
        self,
        instance: DagsterInstance,
        launcher: TaskiqRunLauncher,
        reason: str | None,
        by: str,
        tell: Callable[[CancelProgress], None],
        stop: Event,
        pace: _Pace,
    ) -> None:
        self._instance = instance
        self._launcher = launcher
        self._reason = clean_text(reason) if reason else None
        self._by = by
        self._tell = tell
        self._stop = stop
        self._pace = pace
        self._lock = Lock()
        self._outcomes: dict[str, CancelOutcome | str | None] = {}
        """By run; a text says why it has failed, and None that it was not reached."""
        self._finished: dict[str, None] = {}
        self._not_found: dict[str, None] = {}
        self._done = 0

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def cancel(self, selection: RunSelection) -> None:
        self._finished.update(dict.fromkeys(selection.already_finished))
        self._not_found.update(dict.fromkeys(selection.not_found))
        for run_id in (*selection.waiting, *selection.handed_over, *selection.at_work):
            self._outcomes.setdefault(run_id, None)
        handed_over = list(selection.handed_over)
        for some in groups_of(_TOGETHER, selection.waiting):
            if self.is_stopped:
                return
            handed_over += self._safely(self._withdraw, some) or ()
            self._told(len(some))
        self._each_ten(handed_over)
        self._each_ten(selection.at_work, self._pace)

    def _each_ten(self, run_ids: Sequence[str], pace: _Pace | None = None) -> None:
        def one_after_the_other() -> None:
            while not self.is_stopped:
                with self._lock:
                    some = next(groups, None)
                if pace is not None and some is not None:
                    pace.wait(len(some))
                if some is None or self.is_stopped:
                    return
                self._safely(self._ask, some)
                self._told(len(some))

        groups = iter(groups_of(_MESSAGES if pace is None else pace.group(_MESSAGES), run_ids))
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cancel runs") as pool:
            for working in [pool.submit(one_after_the_other) for _ in range(_AT_ONCE)]:
                working.result()

    def _told(self, done: int) -> None:
        with self._lock:
            self._done = min(self._done + done, len(self._outcomes))
            self._tell(CancelProgress(self._done, len(self._outcomes)))

    def _safely(self, call: "Callable[[Sequence[str]], list[str] | None]", run_ids: Sequence[str]) -> list[str] | None:
        try:
            return call(run_ids)
        except Exception as error:
            logger.exception("runs could not be cancelled")
            self._outcomes.update(dict.fromkeys(run_ids, f"{type(error).__name__}: {error}"))
            return None

    def _withdraw(self, run_ids: Sequence[str]) -> list[str]:
        """End runs that wait in Dagster's queue. Returns those that were started meanwhile."""
        with bounded_calls(self._instance, CALL_S * len(run_ids)):
            if can_move_runs(self._instance):
                moved = end_queued(self._instance, run_ids, Unstarted(self._reason, self._by))
            else:
                moved = {run_id for run_id in run_ids if self._end_by_coordinator(run_id)}
            statuses = statuses_of(self._instance, run_ids)
        for run_id in run_ids:
            if run_id in moved and statuses.get(run_id) is DagsterRunStatus.CANCELED:
                self._outcomes[run_id] = CancelOutcome.WITHDRAWN
            elif run_id not in statuses:
                self._not_found[run_id] = self._outcomes.pop(run_id)  # type: ignore[assignment]
            elif statuses[run_id] in FINISHED_STATUSES:
                self._outcomes[run_id] = CancelOutcome.NOTHING
        return [run_id for run_id in run_ids if self._outcomes.get(run_id, True) is None]

    def _end_by_coordinator(self, run_id: str) -> bool:
        return request_cancel(run_id, reason=self._reason, requested_by=self._by, instance=self._instance).stops

    def _ask(self, run_ids: Sequence[str]) -> None:
        """Stop runs that have left Dagster's queue."""
        with bounded_calls(self._instance, CALL_S):
            runs = {run.run_id: run for run in self._instance.get_runs(RunsFilter(run_ids=list(run_ids)))}
        back = [run_id for run_id, run in runs.items() if run.status is DagsterRunStatus.QUEUED]
        if back and (started := self._withdraw(back)):
            logger.warning("%d runs left the queue at this moment; looking at them again", len(started))
        others = [run for run in runs.values() if run.status is not DagsterRunStatus.QUEUED]
        outcomes = self._launcher.request_cancels(others, reason=self._reason, requested_by=self._by)
        for run in others:
            outcome = outcomes[run.run_id]
            if isinstance(outcome, Exception):
                self._outcomes[run.run_id] = f"{type(outcome).__name__}: {outcome}"
            elif outcome is CancelOutcome.NOT_OURS and self._was_never_launched(run):
                self._outcomes[run.run_id] = CancelOutcome.WITHDRAWN
            else:
                self._outcomes[run.run_id] = outcome
        for run_id in set(run_ids) - runs.keys():
            self._outcomes.pop(run_id, None)
            self._not_found[run_id] = None

    def _was_never_launched(self, run: DagsterRun) -> bool:
        """That nothing was launched of a run without a task id; one without may also be another launcher's.

        One that is CANCELING was left so by who took it from Dagster's queue and died. One that is STARTING since a
        moment is about to be launched by ours: the worker that receives it drops it.
        """
        if run.status is DagsterRunStatus.NOT_STARTED:
            return True
        starting = self._instance.all_logs(run.run_id, of_type=DagsterEventType.RUN_STARTING)
        if run.status is DagsterRunStatus.CANCELING:
            return not starting
        is_new = bool(starting) and time.time() - starting[-1].timestamp < _A_MOMENT_S
        return run.status is DagsterRunStatus.STARTING and is_new

    def started_meanwhile(self) -> RunSelection:
        """Those that were ended while they waited, and that Dagster's daemon started at the same moment."""
        ended = [run_id for run_id, outcome in self._outcomes.items() if outcome is CancelOutcome.WITHDRAWN]
        goes_on: list[str] = []
        for some in groups_of(_TOGETHER, ended):
            statuses = statuses_of(self._instance, some)
            goes_on += [run_id for run_id, status in statuses.items() if status not in FINISHED_STATUSES]
        not_reached = [run_id for run_id, outcome in self._outcomes.items() if outcome is None]
        return RunSelection(handed_over=(*goes_on, *not_reached))

    def new_in(self, now: RunSelection, again: RunSelection) -> RunSelection:
        """Of what matches now, what has not been seen to; and what is to be seen to again."""

        def new(run_ids: Iterable[str]) -> tuple[str, ...]:
            return tuple(run_id for run_id in run_ids if run_id not in self._outcomes)

        return RunSelection(new(now.waiting), (*new(now.handed_over), *again.handed_over), new(now.at_work))

    def report(self) -> CancelReport:
        of: dict[CancelOutcome | None, list[str]] = {}
        failed: dict[str, str] = {}
        for run_id, outcome in self._outcomes.items():
            if isinstance(outcome, str):
                failed[run_id] = outcome
            elif outcome in {CancelOutcome.NOT_OURS, CancelOutcome.SWITCHED_OFF}:
                failed[run_id] = outcome.value
            else:
                of.setdefault(outcome, []).append(run_id)
        stopped = (CancelOutcome.WITHDRAWN, CancelOutcome.ASKED, CancelOutcome.MARKED)
        return CancelReport(
            cancelled=tuple(run_id for outcome in stopped for run_id in of.get(outcome, ())),
            already_finished=(*self._finished, *of.get(CancelOutcome.NOTHING, ())),
            not_found=tuple(self._not_found),
            failed=failed,
            left=tuple(of.get(None, ())),
            marked=tuple(of.get(CancelOutcome.MARKED, ())),
            withdrawn=tuple(of.get(CancelOutcome.WITHDRAWN, ())),
        )
