"""Several receivers of one message: exactly one of them starts it, whatever the interleaving of their statements."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, job
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_taskiq.storage import claims as run_claims
from dagster_taskiq.storage import step_claims
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
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


def contest(
    monkeypatch: pytest.MonkeyPatch,
    instance: DagsterInstance,
    order: list[int],
    decide: Callable[[str], Decision],
) -> list[Action]:
    """What each worker decides, when the statements of their claims take turns in that order."""
    turns = Turns(WORKERS, order)
    me = threading.local()

    def in_turn(call: Callable[..., Any]) -> Callable[..., Any]:
        def wait_and_call(*args: Any) -> Any:
            turns.step(me.name)
            return call(*args)

        return wait_and_call

    for module in (run_claims, step_claims):
        for name in ("insert_value", "replace_value", "read_values"):
            monkeypatch.setattr(module, name, in_turn(getattr(module, name)))
        monkeypatch.setattr(module, "append_event", lambda *_: None)  # decides nothing, and each log is a file
    decisions: dict[str, Action] = {}

    def receive(name: str) -> None:
        me.name = name
        try:
            decisions[name] = decide(name).action
        finally:
            turns.end(name)

    threads = [threading.Thread(target=receive, args=(name,), daemon=True) for name in WORKERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(decisions) == len(WORKERS), decisions
    return [decisions[name] for name in WORKERS]


def admit(instance: DagsterInstance, run: DagsterRun, name: str) -> Decision:
    claims = Claims(instance, Heartbeats(instance, 10, 4))
    claims.heartbeats.beat(name)
    return admit_run(instance, claims, Candidate("execute_run", run.run_id, TASK, name, "somewhere"))


def admit_to_step(instance: DagsterInstance, run: DagsterRun, name: str) -> Decision:
    candidate = Candidate("execute_step", run.run_id, TASK, name, "somewhere")
    return admit_step(instance, StepClaims(instance), STEP, candidate)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    # Files: the threads would lock each other out of a database in memory.
    with DagsterInstance.local_temp(str(tmp_path_factory.mktemp("home"))) as made:
        yield made


def make_run(instance: DagsterInstance, status: DagsterRunStatus) -> DagsterRun:
    return instance.create_run_for_job(nothing, tags={TASK_ID_TAG: TASK}, status=status)


orders = st.lists(st.integers(0, 5), max_size=30)


@settings(max_examples=40)
@given(order=orders)
def test_never_do_two_start_the_same_run(instance: DagsterInstance, order: list[int]) -> None:
    run = make_run(instance, DagsterRunStatus.STARTING)
    with pytest.MonkeyPatch.context() as monkeypatch:
        actions = contest(monkeypatch, instance, order, lambda name: admit(instance, run, name))
    assert sorted(action.name for action in actions) == ["HAND_BACK", "HAND_BACK", "START"], actions


@settings(max_examples=40)
@given(order=orders)
def test_never_do_two_resume_the_run_of_a_dead_worker(instance: DagsterInstance, order: list[int]) -> None:
    run = make_run(instance, DagsterRunStatus.STARTED)
    dead = Claims(instance, Heartbeats(instance, 10, 4))
    first = dead.take(run, "dead", TASK, "somewhere", None)
    assert first is not None
    dead.heartbeats.gone("dead")
    with pytest.MonkeyPatch.context() as monkeypatch:
        actions = contest(monkeypatch, instance, order, lambda name: admit(instance, run, name))
    assert sorted(action.name for action in actions) == ["FAIL", "HAND_BACK", "HAND_BACK"], actions
    assert not dead.holds(run.run_id)
    assert dead.read([run.run_id])[run.run_id].epoch == first.epoch + 1


@settings(max_examples=40)
@given(order=orders)
def test_never_do_two_start_the_same_step(instance: DagsterInstance, order: list[int]) -> None:
    run = make_run(instance, DagsterRunStatus.STARTED)
    with pytest.MonkeyPatch.context() as monkeypatch:
        actions = contest(monkeypatch, instance, order, lambda name: admit_to_step(instance, run, name))
    assert sorted(action.name for action in actions) == ["DROP", "DROP", "START"], actions
