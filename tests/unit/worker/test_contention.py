"""Two receivers of one message: exactly one of them starts it, whatever the interleaving, and however late a database
shows what was written to it."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, job
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq import _retry
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import STAGE_KEY, TASK_ID_KEY, WORKER_KEY, EngineEvent, Stage
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.worker.admission import Action, Candidate, Decision, admit_run, admit_step

TASK, STEP = "task", StepRef("step", "task")
WORKERS = ("a", "b", "c")


@job
def nothing() -> None: ...


class Turns:
    """A deterministic scheduler: of several threads one runs at a time, and `order` says which is next at each step."""

    def __init__(self, names: tuple[str, ...], order: list[int]) -> None:
        self._waiting = dict.fromkeys(names, False)
        self._order = iter(order)
        self._changed = threading.Condition()
        self._running: str | None = None
        self._ended: set[str] = set()

    def step(self, name: str) -> None:
        """Called by a thread before each step of its own; returns when it is its turn."""
        with self._changed:
            self._waiting[name] = True
            self._running = None if self._running == name else self._running
            self._pick()
            assert self._changed.wait_for(lambda: self._running == name, 30), f"{name} never got its turn"
            self._waiting[name] = False

    def end(self, name: str) -> None:
        with self._changed:
            self._ended.add(name)
            self._running = None
            self._pick()

    def _pick(self) -> None:
        living = [name for name in self._waiting if name not in self._ended]
        if self._running is None and living and all(self._waiting[name] for name in living):
            self._running = living[next(self._order, 0) % len(living)]
            self._changed.notify_all()


@dataclass
class SlowLog:
    """A log that gives places at once and shows entries later, as PostgreSQL does with ids and commits.

    An entry shows when its writer is told to commit: `write` is two steps, and others may have their turn in between.
    """

    turns: Turns
    entries: list[tuple[Stage, str]] = field(default_factory=list)
    shown: set[int] = field(default_factory=set)
    statements: int = 0

    def write(self, me: str, note: EngineEvent) -> None:
        self.turns.step(me)
        place = len(self.entries)
        self.entries.append((note.stage, str(note.facts[WORKER_KEY])))
        self.turns.step(me)
        self.shown.add(place)

    def read(self, me: str) -> Iterator[tuple[Stage, dict[str, Any]]]:
        self.turns.step(me)
        seen = [entry for place, entry in enumerate(self.entries) if place in self.shown]
        for stage, worker_id in seen:
            yield stage, {STAGE_KEY: stage.value, WORKER_KEY: worker_id, TASK_ID_KEY: TASK}


class Clock:
    """Passes with every look, so that a wait ends."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def contest(
    monkeypatch: pytest.MonkeyPatch,
    instance: DagsterInstance,
    run: DagsterRun,
    order: list[int],
    decide: Callable[[Claims, Candidate], Decision],
) -> list[Action]:
    """What each worker decides, when they take turns in that order."""
    turns = Turns(WORKERS, order)
    log = SlowLog(turns)
    me = threading.local()
    monkeypatch.setattr(
        "dagster_taskiq.storage.claims.append_event", lambda _, __, note, *___: log.write(me.name, note)
    )
    monkeypatch.setattr("dagster_taskiq.storage.claims.read_engine_events", lambda *_: log.read(me.name))
    decisions: dict[str, Action] = {}
    heartbeats = Heartbeats(instance, 10, 4)
    for name in WORKERS:
        heartbeats.beat(name)

    def receive(name: str) -> None:
        me.name = name
        me.clock = Clock()
        try:
            decision = decide(
                Claims(instance, heartbeats), Candidate("execute_run", run.run_id, TASK, name, "somewhere")
            )
            decisions[name] = decision.action
        finally:
            turns.end(name)

    class Time:
        """The clock of whoever asks."""

        @staticmethod
        def monotonic() -> float:
            return float(me.clock.monotonic())

        @staticmethod
        def sleep(seconds: float) -> None:
            me.clock.sleep(seconds)

    monkeypatch.setattr(_retry, "time", Time)
    threads = [threading.Thread(target=receive, args=(name,), daemon=True) for name in WORKERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(decisions) == len(WORKERS), (decisions, log.entries)
    return [decisions[name] for name in WORKERS]


@pytest.fixture(scope="module")
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as made:
        yield made


def make_run(instance: DagsterInstance, *events: DagsterEventType) -> DagsterRun:
    run = instance.create_run_for_job(nothing, tags={TASK_ID_TAG: TASK})
    for event in events:
        instance.report_dagster_event(DagsterEvent(event.value, "nothing", message=""), run.run_id)
    return run


orders = st.lists(st.integers(0, 5), max_size=60)


@given(order=orders)
def test_never_do_two_start_the_same_run(instance: DagsterInstance, order: list[int]) -> None:
    run = make_run(instance, DagsterEventType.RUN_STARTING)
    with pytest.MonkeyPatch.context() as monkeypatch:
        actions = contest(monkeypatch, instance, run, order, lambda claims, who: admit_run(instance, claims, who))
    assert actions.count(Action.START) <= 1, actions
    assert set(actions) <= {Action.START, Action.HAND_BACK}, actions


@given(order=orders)
def test_never_do_two_start_the_same_step(instance: DagsterInstance, order: list[int]) -> None:
    run = make_run(instance, DagsterEventType.RUN_STARTING, DagsterEventType.RUN_START)
    with pytest.MonkeyPatch.context() as monkeypatch:
        actions = contest(
            monkeypatch, instance, run, order, lambda claims, who: admit_step(instance, claims, STEP, who)
        )
    assert actions.count(Action.START) <= 1, actions
    assert set(actions) <= {Action.START, Action.DROP, Action.HAND_BACK}, actions


def test_one_after_the_other_the_first_one_starts_it(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(instance, DagsterEventType.RUN_STARTING)
    actions = contest(monkeypatch, instance, run, [0] * 60, lambda claims, who: admit_run(instance, claims, who))
    assert actions == [Action.START, Action.HAND_BACK, Action.HAND_BACK]
