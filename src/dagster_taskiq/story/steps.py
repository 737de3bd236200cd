"""The attempts of steps as bars, from the events of steps. Pure."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dagster import DagsterEventType as Kind

from dagster_taskiq.storage.engine_events import INTERRUPTED_KEY, ROUTE_KEY, WHY_KEY, WORKER_KEY, Stage
from dagster_taskiq.story.log import Logged
from dagster_taskiq.story.model import Bar, BarKind, Outcome, importance

_BEGINS: Final = {Kind.STEP_START.value, Kind.STEP_RESTARTED.value}
_ENDS: Final = {
    Kind.STEP_SUCCESS.value: Outcome.SUCCEEDED,
    Kind.STEP_FAILURE.value: Outcome.FAILED,
    Kind.STEP_SKIPPED.value: Outcome.SKIPPED,
    Kind.STEP_UP_FOR_RETRY.value: Outcome.RETRIED,
}
NEVER_STARTED: Final = "never started"
WAITS: Final = "waits to be started"


@dataclass(slots=True)
class _Attempt:
    step_key: str
    number: int
    sent_at: float | None = None
    began: float | None = None
    ended: float | None = None
    outcome: Outcome = Outcome.GOING_ON
    worker: str | None = None
    route: str | None = None
    killed: bool = False
    timed_out: bool = False
    lost: bool = False
    """Its worker has said that it is; what its run makes of it follows."""
    note: str = ""


class StepBars:
    """Takes in events in the order of the log."""

    def __init__(self) -> None:
        self._attempts: dict[str, list[_Attempt]] = {}
        self._asked = False

    def take(self, event: Logged) -> None:
        """Of a step, or that the run is being cancelled: what fails then was interrupted, unless it is known."""
        reached = event.stage is Stage.REACHED and event.facts.get("kind") == "REQUESTED"
        if event.kind == Kind.RUN_CANCELING.value or event.stage is Stage.REQUESTED or reached:
            self._asked = True
        if event.step_key is None:
            return
        if event.stage is not None:
            self._take_stage(event, event.step_key)
        elif event.kind == Kind.STEP_WORKER_STARTING.value:
            attempt = self._open(event.step_key, new=lambda last: last.ended is not None)
            attempt.sent_at = attempt.sent_at or event.at
            attempt.route = str(event.facts[ROUTE_KEY]) if ROUTE_KEY in event.facts else None
        elif event.kind in _BEGINS:
            attempt = self._open(event.step_key, new=lambda last: last.began is not None)
            attempt.began = event.at
        elif event.kind in _ENDS:
            attempt = self._open(event.step_key, new=lambda last: last.ended is not None and not last.lost)
            if attempt.lost:
                self._end_lost(attempt, event)
            else:
                self._end(attempt, event)

    def _take_stage(self, event: Logged, step_key: str) -> None:
        if step_key not in self._attempts:
            return  # a cleanup handler of a step that has not begun in this log, or a graph's
        attempt = self._attempts[step_key][-1]
        if event.stage is Stage.PICKED_UP:
            attempt.worker = str(event.facts.get(WORKER_KEY))
        elif event.stage is Stage.KILLED:
            attempt.killed = True
            attempt.outcome = Outcome.KILLED if attempt.ended is not None else attempt.outcome
        elif event.stage is Stage.TIMED_OUT:
            attempt.note, attempt.timed_out = str(event.facts.get(WHY_KEY, "")), True
        elif event.stage is Stage.STEP_LOST:
            attempt.note = str(event.facts.get(WHY_KEY, ""))
            if attempt.ended is None:
                otherwise = Outcome.INTERRUPTED if event.facts.get(INTERRUPTED_KEY) else Outcome.LOST
                attempt.ended, attempt.outcome = event.at, Outcome.KILLED if attempt.killed else otherwise
                attempt.lost = True
        elif event.stage is Stage.STEP_INTERRUPTED:
            attempt.note, attempt.outcome = str(event.facts.get(WHY_KEY, "")), Outcome.INTERRUPTED
            attempt.ended = attempt.ended or event.at

    def _open(self, step_key: str, new: Callable[[_Attempt], bool]) -> _Attempt:
        attempts = self._attempts.setdefault(step_key, [])
        is_new = not attempts or new(attempts[-1])
        if is_new:
            if attempts and attempts[-1].ended is None:  # its process is gone: a run that was resumed begins anew
                attempts[-1].outcome, attempts[-1].ended = Outcome.LOST, attempts[-1].began
            attempts.append(_Attempt(step_key, len(attempts) + 1))
        return attempts[-1]

    def _end(self, attempt: _Attempt, event: Logged) -> None:
        attempt.began = event.at if attempt.began is None else attempt.began
        attempt.ended, attempt.outcome = event.at, _ENDS[event.kind]
        if attempt.outcome is Outcome.FAILED:
            interrupted = self._asked if event.interrupted is None else event.interrupted
            if attempt.killed:
                attempt.outcome = Outcome.KILLED
            elif interrupted and self._asked:
                attempt.outcome = Outcome.CANCELLED
            elif interrupted and not attempt.timed_out:
                attempt.outcome = Outcome.INTERRUPTED
        if event.error and attempt.outcome in (Outcome.FAILED, Outcome.RETRIED):
            attempt.note = event.error

    @staticmethod
    def _end_lost(attempt: _Attempt, event: Logged) -> None:
        """What its run says of it, once: that it has failed because of that, or is tried again."""
        attempt.lost = False
        attempt.note = event.error or attempt.note
        if _ENDS[event.kind] is Outcome.RETRIED:
            attempt.outcome = Outcome.RETRIED

    def bars(self, now: float, over_at: float | None, how: Outcome) -> list[Bar]:
        """One for each attempt. `over_at`: the end of the run, if it has ended; `how` what was open then ended."""
        if over_at is not None:
            for attempt in (attempts[-1] for attempts in self._attempts.values()):
                if attempt.outcome is Outcome.RETRIED:  # it was to be, and never was
                    attempt.outcome = Outcome.CANCELLED if self._asked else Outcome.FAILED
        found = [self._bar(attempt, now, over_at, how) for attempts in self._attempts.values() for attempt in attempts]
        return sorted(found, key=lambda bar: bar.first)

    @staticmethod
    def _bar(attempt: _Attempt, now: float, over_at: float | None, how: Outcome) -> Bar:
        bar = Bar(
            BarKind.STEP,
            attempt.step_key,
            began=now if attempt.began is None else attempt.began,
            ended=attempt.ended,
            outcome=attempt.outcome,
            waited_since=attempt.sent_at,
            worker=attempt.worker,
            route=attempt.route,
            attempt=attempt.number,
            note=attempt.note,
        )
        if attempt.ended is None and over_at is not None:
            if attempt.began is None:
                return replace(bar, began=over_at, ended=over_at, outcome=Outcome.SKIPPED, note=NEVER_STARTED)
            return replace(bar, ended=over_at, outcome=Outcome.KILLED if attempt.killed else how)
        return replace(bar, note=WAITS) if attempt.began is None else bar


def most_important(events: Sequence[Logged], most: int) -> Collection[str]:
    """The keys of the steps that are to be read in full: those that are open or went wrong first, then the longest."""
    steps = StepBars()
    for event in events:
        steps.take(event)
    now = max((event.at for event in events), default=0.0)
    ranked = sorted(steps.bars(now, None, Outcome.LOST), key=lambda bar: importance(bar, now))
    return list(dict.fromkeys(bar.label for bar in ranked))[:most]
