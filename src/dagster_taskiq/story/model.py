"""What is told of a run. Plain values: no Dagster, no database. Times are in seconds since the epoch."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.story.text import duration

FORMAT_VERSION: Final = 1
"""Of `as_json`; raised when a field gets another meaning, or goes."""


class Outcome(enum.StrEnum):
    """How a bar ended, or that it goes on."""

    GOING_ON = "going on"
    DONE = "done"
    """A phase that is over."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIED = "tried again"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """Nobody has cancelled it: its worker stopped, or died."""
    KILLED = "killed"
    LOST = "lost"
    SKIPPED = "skipped"


class BarKind(enum.StrEnum):
    """What a bar is about."""

    WAIT = "wait"
    """The run waits: in Dagster's queue, or for a worker."""
    WORK = "work"
    """One worker has the run."""
    STEP = "step"
    STOP = "stop"
    """From the request to the end of the last process."""
    CLEANUP = "cleanup"


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that took time: a phase of the run, an attempt of a step, an attempt of a cleanup handler."""

    kind: BarKind
    label: str
    began: float
    ended: float | None = None
    """None: it goes on."""
    outcome: Outcome = Outcome.GOING_ON
    waited_since: float | None = None
    """Of a step: when it was sent, or its process was asked for. It began later."""
    worker: str | None = None
    attempt: int = 1
    note: str = ""
    route: str | None = None
    """Of a step of `taskiq_executor`: where it was sent. None: not known."""

    @property
    def first(self) -> float:
        """When its wait began, or itself."""
        return self.began if self.waited_since is None else min(self.began, self.waited_since)

    def seconds(self, now: float) -> float:
        """How long it took, without its wait; if it goes on, how long already."""
        return max(0.0, (now if self.ended is None else self.ended) - self.began)


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened. `what`: the stage of an engine event, the status of the run, or "step"."""

    at: float
    what: str
    text: str
    step_key: str | None = None
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment that is drawn through all bars."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Wait:
    """What a run waits for, until when (None: nobody knows), and what a person can do."""

    what: str
    since: float | None = None
    until: float | None = None
    advice: tuple[str, ...] = ()
    cause: str = field(default="", kw_only=True)
    """The same as `what` in a few words, for lists."""


@dataclass(frozen=True, slots=True)
class Story:
    """The life of one run."""

    run_id: str
    job: str
    status: str
    now: float
    """When it was told."""
    created: float
    started: float | None = None
    ended: float | None = None
    task_id: str | None = None
    route: str = DEFAULT_ROUTE
    worker: str | None = None
    """The last one that has, or had, the run."""
    summary: tuple[str, ...] = ()
    """What happened, a sentence each."""
    waits: tuple[Wait, ...] = ()
    """Empty: it is over, or it works."""
    advice: tuple[str, ...] = ()
    """What a person can do about how it ended."""
    bars: tuple[Bar, ...] = ()
    hidden_steps: Mapping[str, int] = field(default_factory=dict)
    """Attempts of steps that have no bar, by outcome."""
    marks: tuple[Mark, ...] = ()
    moments: tuple[Moment, ...] = ()
    hidden_moments: int = 0
    events: int = 0
    """In its log."""

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last moment that is drawn."""
        first = min([self.created, *(bar.first for bar in self.bars)])
        last = max([self.ended or self.now, *(bar.ended or self.now for bar in self.bars)])
        return first, max(last, first + 0.001)


def with_most_steps(story: Story, most: int) -> Story:
    """The same with at most so many bars of steps: those that are open or went wrong first, then the longest."""
    steps = [bar for bar in story.bars if bar.kind is BarKind.STEP]
    if len(steps) <= most:
        return story
    kept = set(map(id, sorted(steps, key=lambda bar: importance(bar, story.now))[:most]))
    hidden = dict(story.hidden_steps)
    for bar in steps:
        if id(bar) not in kept:
            hidden[bar.outcome.value] = hidden.get(bar.outcome.value, 0) + 1
    bars = tuple(bar for bar in story.bars if bar.kind is not BarKind.STEP or id(bar) in kept)
    return replace(story, bars=bars, hidden_steps=hidden)


_RANK: Final = {
    Outcome.GOING_ON: 0,
    Outcome.FAILED: 1,
    Outcome.KILLED: 1,
    Outcome.LOST: 1,
    Outcome.CANCELLED: 2,
    Outcome.INTERRUPTED: 2,
    Outcome.RETRIED: 3,
}


def importance(bar: Bar, now: float) -> tuple[int, float]:
    """Sorts what must be seen to the front."""
    return _RANK.get(bar.outcome, 4), -bar.seconds(now)


def described_hidden(hidden: Mapping[str, int]) -> str:
    """`… and 980 more steps: 950 succeeded, 30 cancelled`; empty when there are none."""
    if not hidden:
        return ""
    many = sum(hidden.values())
    parts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(hidden.items(), key=lambda item: -item[1]))
    return f"… and {many} more {'step' if many == 1 else 'steps'}: {parts}"


def bar_label(bar: Bar) -> str:
    """The name of a row."""
    label = bar.label if bar.attempt == 1 else f"{bar.label} ({bar.attempt})"
    if bar.kind is BarKind.WAIT:
        return f"waits {label}"
    return f"cleanup {label}" if bar.kind is BarKind.CLEANUP else label


def said_of(bar: Bar, now: float) -> str:
    """How long it took, and how it ended."""
    if bar.note and bar.ended is not None and bar.ended <= bar.began and bar.kind is BarKind.STEP:
        return bar.note
    if bar.outcome is Outcome.GOING_ON and bar.note:
        return f"{duration(now - bar.first)} {bar.note}"
    outcome = f" {bar.outcome.value}" if bar.outcome is not Outcome.DONE else ""
    return f"{duration(bar.seconds(now))}{outcome}"


def fewer_moments(moments: Sequence[Moment], most: int) -> tuple[Sequence[Moment], int, Sequence[Moment]]:
    """The first ones, how many are left out, the last ones."""
    if len(moments) <= most:
        return moments, 0, ()
    head = most // 2
    tail = most - head
    return moments[:head], len(moments) - most, moments[-tail:]


def as_json(story: Story) -> dict[str, Any]:
    """For programs; documented in docs/run-explain.md."""
    return {"version": FORMAT_VERSION, **asdict(story)}
