"""The phases of a run as bars, and its cancellation, from the events that are about the run itself. Pure."""

from dataclasses import dataclass, field, replace
from typing import Any, Final

from dagster import DagsterEventType as Kind

from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.storage.engine_events import (
    ATTEMPT_KEY,
    ATTEMPTS_KEY,
    BY_KEY,
    FAILED_KEY,
    GRACE_KEY,
    HANDLER_KEY,
    NEXT_KEY,
    OF_KEY,
    PATIENCE_KEY,
    PROCESSES_KEY,
    REASON_KEY,
    TOOK_KEY,
    WORKER_KEY,
    Stage,
)
from dagster_taskiq.storage.time_limits import TIMED_OUT
from dagster_taskiq.story.log import Logged
from dagster_taskiq.story.model import Bar, BarKind, Mark, Outcome

_WITHOUT_REASON: Final = "This run has been marked as failed from outside"  # what Dagster writes of a failed launch
IN_QUEUE: Final = "in Dagster's queue"
FOR_WORKER: Final = "for a worker"
FINAL: Final = {
    Kind.RUN_SUCCESS.value: Outcome.SUCCEEDED,
    Kind.RUN_FAILURE.value: Outcome.FAILED,
    Kind.RUN_CANCELED.value: Outcome.CANCELLED,
}


@dataclass(slots=True)
class Cancel:
    """What is known of a cancellation, or of another interrupt. None, and empty: it has not happened."""

    asked_at: float | None = None
    by: str | None = None
    reason: str | None = None
    reached_at: float | None = None
    reached: str = ""
    kind: str = CancelKind.REQUESTED.name
    interrupted_at: float | None = None
    pid: int | None = None
    grace_s: float | None = None
    killed_at: float | None = None
    killed: str = ""
    killed_processes: str = ""
    gone_at: float | None = None
    patience_until: float | None = None

    @property
    def timed_out(self) -> bool:
        """Whether it was the time limit of the run, and no person who is stronger."""
        return self.kind == CancelKind.DEADLINE.name


@dataclass(slots=True)
class Phases:
    """Takes in events in the order of the log."""

    bars: list[Bar] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    cancel: Cancel = field(default_factory=Cancel)
    queued_at: float | None = None
    starting_at: float | None = None
    submitted_at: float | None = None
    worker: str | None = None
    where: str = ""
    process_pid: int | None = None
    cleaning: tuple[str, float] | None = None
    """The handlers that are being run, in words, and since when."""
    cleanup_failures: tuple[str, ...] = ()
    next_attempts: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    """Of handlers that have failed: the number of the next attempt, how many there are, and when it begins."""
    final_at: float | None = None
    final: Outcome | None = None
    final_text: str = ""
    last_error: str = ""  # of an event that is not the end: why the run was not launched
    not_requested: str = ""
    lingers: tuple[str, float] | None = None
    """What a run waits for whose work is over, in words, and since when."""

    def take(self, event: Logged) -> None:
        """Of the run, or of a cleanup handler of one of its steps."""
        if event.stage is Stage.CLEANUP:
            self._handler(event)
        if event.step_key is not None:
            return
        if event.stage is not None:
            handle = getattr(self, f"_{event.stage.value}", None)
            if handle is not None:
                handle(event)
        elif event.kind in FINAL:
            self._end(event)
        elif event.kind == Kind.RUN_ENQUEUED.value:
            self.queued_at = event.at
            self._open(Bar(BarKind.WAIT, IN_QUEUE, event.at))
        elif event.kind == Kind.RUN_STARTING.value:
            self.starting_at = event.at
            self._close(event.at, Outcome.DONE, BarKind.WAIT)
        elif event.kind == Kind.RUN_CANCELING.value:
            self._canceling(event)
        elif event.kind == Kind.ENGINE_EVENT.value:
            self._engine_event(event)

    def _engine_event(self, event: Logged) -> None:
        """One of Dagster's own."""
        self.last_error = event.error or self.last_error
        if str(event.facts.get("pid", "")).isdigit():
            self.process_pid = int(str(event.facts["pid"]))

    # Phases

    def _submitted(self, event: Logged) -> None:
        self.submitted_at = event.at
        self._close(event.at, Outcome.DONE, BarKind.WAIT)
        if self._is_open(BarKind.WORK):  # it is quicker than the event of who sent it
            return
        self._open(Bar(BarKind.WAIT, FOR_WORKER, event.at))

    def _picked_up(self, event: Logged) -> None:
        self._close(event.at, Outcome.DONE, BarKind.WAIT)
        self._close(event.at, Outcome.LOST, BarKind.WORK)
        self.worker = str(event.facts.get(WORKER_KEY))
        self.where = event.text.partition("(")[2].rstrip(")")
        self._open(Bar(BarKind.WORK, f"on {self.worker}", event.at, worker=self.worker))

    def _released(self, event: Logged) -> None:
        dead = "it is dead" in event.text
        self._close(event.at, Outcome.LOST if dead else Outcome.DONE, BarKind.WORK, event.text.partition(": ")[2])
        self._close(event.at, Outcome.DONE, BarKind.STOP)
        self._open(Bar(BarKind.WAIT, FOR_WORKER, event.at))

    # Its cancellation

    def _asked(self, at: float) -> None:
        if self.cancel.asked_at is None or at < self.cancel.asked_at:
            self.cancel.asked_at = at
        self._stopping(at)

    def _canceling(self, event: Logged) -> None:
        if event.text.startswith(TIMED_OUT):
            self.cancel.kind = CancelKind.DEADLINE.name
        self._asked(event.at)

    def _requested(self, event: Logged) -> None:
        by_limit = str(event.facts.get(REASON_KEY, "")).lower().startswith(TIMED_OUT.lower())
        self.cancel.kind = (CancelKind.DEADLINE if by_limit else CancelKind.REQUESTED).name
        self.cancel.by = event.facts.get(BY_KEY) or self.cancel.by
        self.cancel.reason = event.facts.get(REASON_KEY) or self.cancel.reason
        self._asked(event.at)

    def _not_requested(self, event: Logged) -> None:
        self.not_requested = event.text

    def _reached(self, event: Logged) -> None:
        self.cancel.kind = str(event.facts.get("kind", "REQUESTED"))
        self.cancel.by = event.facts.get(BY_KEY) or self.cancel.by
        self.cancel.reason = event.facts.get(REASON_KEY) or self.cancel.reason
        self.cancel.reached_at, self.cancel.reached = event.at, event.text
        if self.cancel.kind == "REQUESTED" and self.cancel.asked_at is None:
            self.cancel.asked_at = event.at
        self._stopping(event.at)

    def _interrupting(self, event: Logged) -> None:
        self.cancel.interrupted_at, self.cancel.pid = event.at, event.facts.get("pid")
        self.cancel.grace_s = event.facts.get(GRACE_KEY)
        self.marks.append(Mark(event.at, "SIGTERM"))
        self._stopping(event.at)

    def _waiting_for_threads(self, event: Logged) -> None:
        self.lingers = event.text, event.at

    def _waiting_for_steps(self, event: Logged) -> None:
        self.lingers = event.text, event.at

    def _killed(self, event: Logged) -> None:
        self.cancel.killed_at, self.cancel.killed = event.at, event.text
        self.marks.append(Mark(event.at, "SIGKILL"))

    def _tree_gone(self, event: Logged) -> None:
        self.cancel.gone_at = event.at
        self.cancel.killed_processes = str(event.facts.get(PROCESSES_KEY, ""))
        self._close(event.at, Outcome.KILLED if self.cancel.killed_at else Outcome.DONE, BarKind.STOP)

    def _forwarding(self, event: Logged) -> None:
        self.cancel.patience_until = event.at + float(event.facts.get(PATIENCE_KEY, 0))

    def _stopping(self, at: float) -> None:
        if not self._is_open(BarKind.STOP) and self.cancel.gone_at is None and self.final is None:
            self._open(Bar(BarKind.STOP, "stopping", at))

    # Its cleanup

    def _cleanup_began(self, event: Logged) -> None:
        self.cleaning = event.text.partition(": ")[2], event.at
        self.cleanup_failures = ()

    def _handler(self, event: Logged) -> None:
        facts: Any = event.facts
        failed = FAILED_KEY in facts
        of = f" of {facts[OF_KEY]}" if facts.get(OF_KEY) else ""
        label = f"{facts.get(HANDLER_KEY, 'handler')}{of}"
        outcome = Outcome.FAILED if failed else Outcome.SUCCEEDED
        seconds = float(facts.get(TOOK_KEY, 0))
        note = str(facts.get(FAILED_KEY, ""))
        attempt = int(facts.get(ATTEMPT_KEY, 1))
        self.bars.append(Bar(BarKind.CLEANUP, label, event.at - seconds, event.at, outcome, attempt=attempt, note=note))
        if NEXT_KEY in facts:
            most = int(facts.get(ATTEMPTS_KEY, attempt + 1))
            self.next_attempts[label] = (attempt + 1, most, event.at + float(facts[NEXT_KEY]))
        else:
            self.next_attempts.pop(label, None)
        if self.cleaning is not None:
            self.cleaning = self.cleaning[0], event.at

    def _cleanup_ended(self, event: Logged) -> None:
        self.cleaning = None
        self.cleanup_failures = tuple(str(event.facts[FAILED_KEY]).splitlines()) if FAILED_KEY in event.facts else ()

    # Its end

    def _end(self, event: Logged) -> None:
        self.final, self.final_at = FINAL[event.kind], event.at
        without_reason = event.text.startswith(_WITHOUT_REASON)
        self.final_text = event.error or (self.last_error if without_reason else "") or event.text
        self.cleaning = None
        self._close(event.at, Outcome.DONE, BarKind.WAIT)
        self._close(event.at, Outcome.KILLED if self.cancel.killed_at else Outcome.DONE, BarKind.STOP)
        self._close(event.at, self.final, BarKind.WORK)

    def finished_bars(self, now: float) -> list[Bar]:
        """Without those that took no time; and the cleanup that is going on."""
        bars = [bar for bar in self.bars if bar.kind is BarKind.CLEANUP or bar.seconds(now) > 0.001]
        if self.cleaning is not None:
            bars.append(Bar(BarKind.CLEANUP, self.cleaning[0] or "cleanup", self.cleaning[1]))
        return bars

    def all_marks(self) -> list[Mark]:
        """In order; the request is one of them."""
        name = "timeout" if self.cancel.timed_out else "cancel"
        asked = [Mark(self.cancel.asked_at, name)] if self.cancel.asked_at is not None else []
        return sorted(asked + self.marks, key=lambda mark: mark.at)

    def _is_open(self, kind: BarKind) -> bool:
        return any(bar.kind is kind and bar.ended is None for bar in self.bars)

    def _open(self, bar: Bar) -> None:
        self.bars.append(bar)

    def _close(self, at: float, outcome: Outcome, kind: BarKind, note: str = "") -> None:
        self.bars = [
            replace(bar, ended=max(at, bar.began), outcome=outcome, note=note or bar.note)
            if bar.kind is kind and bar.ended is None
            else bar
            for bar in self.bars
        ]
