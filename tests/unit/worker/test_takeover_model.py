"""Every order of claims, releases, deaths, health checks and rounds of run monitoring, by a model: one run, one worker.

The storage, the claims, the admission and the launcher's health check are the real ones; SQS and monitoring are played,
and time passes when the model says so.
"""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import permutations

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, job
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from dagster_taskiq.dagster_compat.api import WorkerStatus
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.storage import claims as claims_module
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.worker import admission
from dagster_taskiq.worker.admission import Action, Candidate, admit_run

DEAD, CONFIRM, GIVEN_UP = 10.0, 4.0, 100.0
NOT_FOUND = WorkerStatus.NOT_FOUND
BEGINS = {Action.START, Action.RESUME}


@job
def nothing() -> None: ...


class World:
    """What the rules share: one run, its messages, its workers, and the time."""

    def __init__(self, stack: ExitStack) -> None:
        self.now = 1_000.0
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for module in (claims_module, admission):
            patch.setattr(module, "time", self)
        patch.setattr(admission, "run_will_resume", lambda *_: True)
        self.instance = stack.enter_context(DagsterInstance.ephemeral())
        self.launcher = TaskiqRunLauncher("http://127.0.0.1/1/q", "us-east-1")
        self.launcher.register_instance(self.instance)
        self.launcher._known_claims = self.claims()
        self.run_id = self.instance.create_run_for_job(
            nothing, tags={TASK_ID_TAG: "task-0"}, status=DagsterRunStatus.STARTING
        ).run_id

    def time(self) -> float:
        """As `time.time`."""
        return self.now

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now

    def claims(self) -> Claims:
        clocks = {"clock": self.time, "monotonic": self.time}
        return Claims(
            self.instance,
            Heartbeats(self.instance, DEAD, CONFIRM, **clocks),
            Heartbeats(self.instance, GIVEN_UP, CONFIRM, **clocks),
        )

    def run(self) -> DagsterRun:
        run = self.instance.get_run_by_id(self.run_id)
        assert run is not None
        return run


class OneRun(RuleBasedStateMachine):
    """`children`: the workers whose child runs. `leased_by`: who renews the lease of the run's message."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.world = World(self.stack)
        self.claims: dict[str, Claims] = {}
        self.beating: set[str] = set()
        self.children: set[str] = set()
        self.leased_by: str | None = None
        self.message = "task-0"
        self.tasks = 0
        self.failed_under: set[str] = set()
        self.asked_about = self.run()
        self.told = WorkerStatus.RUNNING

    def teardown(self) -> None:
        self.stack.close()

    def run(self) -> DagsterRun:
        return self.world.run()

    @rule(seconds=st.sampled_from([1.0, CONFIRM, DEAD, GIVEN_UP]))
    def time_passes(self, seconds: float) -> None:
        """Those that can beat do, and look at their claims."""
        self.world.now += seconds
        for name in self.beating:
            self.claims[name].heartbeats.beat(name)
        for name in sorted(self.beating & self.children):
            if not self.claims[name].holds(self.world.run_id) or self.run().is_finished:
                self.children.discard(name)

    @precondition(lambda self: self.leased_by is not None)
    @rule(how=st.sampled_from(["says so", "is silent", "is silent for long"]))
    def its_worker_dies(self, how: str) -> None:
        """Its child goes with it, and its lease runs out."""
        name, self.leased_by = str(self.leased_by), None
        self.beating.discard(name)
        self.children.discard(name)
        if how == "says so":
            self.claims[name].heartbeats.gone(name)
        elif how == "is silent for long":
            self.time_passes(GIVEN_UP)
            self.world.launcher.check_run_worker_health(self.run())
            self.time_passes(CONFIRM)

    @precondition(lambda self: self.leased_by is not None)
    @rule()
    def its_worker_loses_the_database(self) -> None:
        """And nothing else: its child goes on, and so does its lease."""
        self.beating.discard(str(self.leased_by))

    @rule()
    def who_lost_the_database_has_it_back(self) -> None:
        """The first thing that they do is to look at their claims."""
        self.beating |= self.children
        self.time_passes(0.0)

    @precondition(lambda self: self.leased_by is None)
    @rule()
    def receives_the_message(self) -> None:
        """A worker that was not there before: an old one would have stopped its own child first."""
        name = f"w{len(self.claims)}"
        claims = self.claims[name] = self.world.claims()
        claims.heartbeats.beat(name)
        self.beating.add(name)
        kind: admission.WorkKind = "execute_run" if self.message == "task-0" else "resume_run"
        action = admit_run(
            self.world.instance, claims, Candidate(kind, self.world.run_id, self.message, name, "here")
        ).action
        if action in BEGINS:
            self.children.add(name)
            self.leased_by = name
        if action is Action.START:
            started = DagsterEvent(DagsterEventType.RUN_START.value, "nothing", message="")
            self.world.instance.report_dagster_event(started, self.world.run_id)

    @precondition(lambda self: self.leased_by in self.beating & self.children)
    @rule()
    def its_worker_gives_it_back(self) -> None:
        name, self.leased_by = str(self.leased_by), None
        self.children.discard(name)
        self.claims[name].release(self.run(), "interrupted; the run will be resumed")

    @precondition(lambda self: self.run().status is DagsterRunStatus.STARTED)
    @rule()
    def monitoring_asks(self) -> None:
        """One round at a time; what it is told is what it acts upon."""
        self.asked_about = self.run()
        self.told = self.world.launcher.check_run_worker_health(self.asked_about).status

    @precondition(lambda self: self.told is NOT_FOUND)
    @rule(resumes=st.booleans())
    def monitoring_acts(self, resumes: bool) -> None:
        """As `monitor_started_run`, which looks at the status once more."""
        self.told = WorkerStatus.RUNNING
        if self.run().status is not self.asked_about.status:
            return
        if resumes:
            self.tasks += 1
            self.message, self.leased_by = f"task-{self.tasks}", None
            self.world.instance.add_run_tags(self.world.run_id, {TASK_ID_TAG: self.message})
        else:
            self.failed_under |= self.at_work()
            self.world.instance.report_run_failed(self.run())

    @precondition(lambda self: self.run().status is DagsterRunStatus.STARTED and self.leased_by is None)
    @rule()
    def monitoring_works_from_an_old_list(self) -> None:
        """It read the run before it was resumed; what it was told then, it is not told again."""
        before = self.run()
        if self.world.launcher.check_run_worker_health(before).status is WorkerStatus.RUNNING:
            return
        self.tasks += 1
        self.message = f"task-{self.tasks}"
        self.world.instance.add_run_tags(self.world.run_id, {TASK_ID_TAG: self.message})
        assert self.world.launcher.check_run_worker_health(before).status is WorkerStatus.RUNNING

    def at_work(self) -> set[str]:
        """Those whose child runs and that have not been given up, whether or not they can know it."""
        return {name for name in self.children if self.claims[name].holds(self.world.run_id)}

    @invariant()
    def at_most_one_has_it(self) -> None:
        assert len(self.at_work()) <= 1, self.children

    @invariant()
    def whoever_can_know_that_it_has_lost_it_has_stopped(self) -> None:
        self.time_passes(0.0)
        assert len(self.beating & self.children) <= 1, self.children

    @invariant()
    def no_run_fails_under_a_worker_that_has_it(self) -> None:
        assert not self.failed_under


STEPS: dict[str, Callable[[OneRun], None]] = {
    "a worker claims": lambda one: one.receives_the_message() if one.leased_by is None else None,
    "it gives back": lambda one: one.its_worker_gives_it_back() if one.leased_by in one.beating else None,
    "monitoring asks": OneRun.monitoring_asks,
    "monitoring resumes": lambda one: one.monitoring_acts(resumes=True) if one.told is NOT_FOUND else None,
    "monitoring fails it": lambda one: one.monitoring_acts(resumes=False) if one.told is NOT_FOUND else None,
}
ORDERS = [
    order
    for acts in ("monitoring resumes", "monitoring fails it")
    for order in permutations(("a worker claims", "it gives back", "monitoring asks", acts))
    if order.index("monitoring asks") < order.index(acts)
]


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
@pytest.mark.parametrize("how", ["says so", "is silent for long"])
def test_after_the_death_of_a_worker_in_the_order(how: str, order: tuple[str, ...]) -> None:
    one = OneRun()
    try:
        one.receives_the_message()
        one.its_worker_dies(how)
        for step in order:
            STEPS[step](one)
            one.at_most_one_has_it()
            one.whoever_can_know_that_it_has_lost_it_has_stopped()
            one.no_run_fails_under_a_worker_that_has_it()
    finally:
        one.teardown()


@pytest.mark.timeout(600)  # it computes for a quarter of a minute, on a machine that may do ten other things
def test_in_any_order() -> None:
    run_state_machine_as_test(OneRun, settings=settings(max_examples=30, stateful_step_count=20, deadline=None))
