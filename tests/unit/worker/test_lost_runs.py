"""Which runs are lost, and since when: row by row, on Dagster's own in-memory storage."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, job

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.cleanup_events import cleanup_handlers
from dagster_taskiq.storage.engine_events import Stage, submitted
from dagster_taskiq.storage.event_log import append_event, read_engine_events
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.leadership import Leadership
from dagster_taskiq.storage.tags import ROUTE_TAG, TASK_ID_TAG
from dagster_taskiq.worker import reconciler
from dagster_taskiq.worker.code_check import CodeMissing
from dagster_taskiq.worker.reconciler import LostRuns, Reconciler, leaders_task

ME, OTHER, TASK = "me-1", "other-1", "task-1"
LED = ("default",)
PATIENCE_S, DEAD_AFTER_S, CONFIRM_S, GIVEN_UP_AFTER_S = 40.0, 15.0, 10.0, 300.0
START, CANCELING, CANCELED = (
    DagsterEventType.RUN_START,
    DagsterEventType.RUN_CANCELING,
    DagsterEventType.RUN_CANCELED,
)


@job
def nothing() -> None: ...


@dataclass
class World:
    instance: DagsterInstance
    now: float = 1000.0
    led: Sequence[str] = LED

    def __post_init__(self) -> None:
        clock: Any = lambda: self.now  # noqa: E731
        heartbeats = Heartbeats(self.instance, DEAD_AFTER_S, CONFIRM_S, clock=clock, monotonic=clock)
        lasting = Heartbeats(self.instance, GIVEN_UP_AFTER_S, CONFIRM_S, clock=clock, monotonic=clock)
        self.claims = Claims(self.instance, heartbeats, lasting)
        settings = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")
        context: Any = SimpleNamespace(instance=self.instance, settings=settings, claims=self.claims, worker_id=ME)
        self.lost = LostRuns(context, patience_s=PATIENCE_S, monotonic=clock)

    def run(
        self, *events: DagsterEventType, ours: bool = True, queue: str | None = None, route: str | None = None
    ) -> DagsterRun:
        run = self.instance.create_run_for_job(nothing, tags={TASK_ID_TAG: TASK} if ours else {})
        if route is not None:
            self.instance.add_run_tags(run.run_id, {ROUTE_TAG: route})
        for event in (DagsterEventType.RUN_STARTING, *events):
            self.instance.report_dagster_event(DagsterEvent(event.value, "nothing", message=""), run.run_id)
        if queue is not None:
            append_event(self.instance, run, submitted(TASK, queue))
        return run

    def claimed(self, run: DagsterRun, *, alive: bool, worker_id: str = OTHER) -> None:
        seen = self.claims.read([run.run_id]).get(run.run_id)
        assert self.claims.take(run, worker_id, TASK, "there", seen)
        self.claims.heartbeats.beat(worker_id) if alive else self.claims.heartbeats.gone(worker_id)

    def due(self, *, after_s: float = 0.0) -> list[tuple[str, str]]:
        """Run ids and kinds; the clock is put on first."""
        self.now += after_s
        return sorted((lost.run.run_id, lost.kind) for lost in self.lost.look(self.led))


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


@pytest.mark.parametrize("events", [(), (START,), (START, CANCELING), (START, CANCELING, CANCELED)], ids=len)
def test_a_run_whose_worker_is_dead_is_due_when_its_message_would_have_come(
    world: World, events: tuple[DagsterEventType, ...]
) -> None:
    run = world.run(*events)
    world.claimed(run, alive=False)
    assert world.due() == []
    assert world.due(after_s=PATIENCE_S - 1) == []
    assert world.due(after_s=1) == [(run.run_id, "execute_run")]


def test_a_run_that_is_to_be_stopped_and_that_nobody_has_claimed(world: World) -> None:
    """Dagster's UI marks a run that is still STARTING, and calls nobody."""
    run = world.run(CANCELING)
    assert world.due() == []
    assert world.due(after_s=PATIENCE_S) == [(run.run_id, "execute_run")]


@pytest.mark.parametrize("launched", [False, True])
def test_one_that_was_withdrawn_by_somebody_who_died_over_it_was_never_launched(world: World, launched: bool) -> None:
    run = world.instance.create_run_for_job(nothing)
    for event in (DagsterEventType.RUN_STARTING, CANCELING) if launched else (CANCELING,):
        world.instance.report_dagster_event(DagsterEvent(event.value, "nothing", message=""), run.run_id)
    world.due()
    assert world.due(after_s=PATIENCE_S) == ([] if launched else [(run.run_id, "execute_run")]), "another launcher's"


def test_what_somebody_has_is_not_lost(world: World) -> None:
    world.claimed(world.run(START, CANCELING), alive=True)
    world.claimed(world.run(START), alive=True)
    world.claimed(world.run(START, CANCELING), alive=False, worker_id=ME)
    assert world.due() == []
    world.claims.heartbeats.beat(OTHER)
    world.now += PATIENCE_S
    world.claims.heartbeats.beat(OTHER)
    assert world.due() == [], "this worker itself does not look whether it is alive"


@pytest.mark.parametrize("events", [(START,), (START, CANCELING)], ids=["goes on", "is to be stopped"])
def test_a_run_that_goes_on_is_left_to_a_worker_that_may_only_lack_the_database(
    world: World, events: tuple[DagsterEventType, ...]
) -> None:
    """Its message does not come again, because that worker renews the lease over SQS."""
    run = world.run(*events)
    world.claimed(run, alive=True)
    due_at_once = [(run.run_id, "execute_run")] if CANCELING in events else []
    for after_s in (DEAD_AFTER_S, CONFIRM_S):
        assert world.due(after_s=after_s) == []
    assert world.due(after_s=PATIENCE_S) == due_at_once
    assert world.due(after_s=GIVEN_UP_AFTER_S) == due_at_once
    assert world.due(after_s=CONFIRM_S) == [(run.run_id, "execute_run")]


def test_what_waits_for_its_first_worker_is_not_lost(world: World) -> None:
    """Dagster's run monitoring has a limit for that; only it knows how long a run may wait."""
    world.run()
    world.due()
    assert world.due(after_s=10 * PATIENCE_S) == []


def test_a_worker_that_is_late_is_not_dead_before_that_is_confirmed(world: World) -> None:
    run = world.run(START, CANCELING)
    world.claimed(run, alive=True)
    assert world.due(after_s=DEAD_AFTER_S) == []
    assert world.lost.next_look_in(60) == CONFIRM_S
    assert world.due(after_s=CONFIRM_S) == [], "now it is known, and from now on the message may come"
    assert world.due(after_s=PATIENCE_S - 1) == []
    assert world.due(after_s=1) == [(run.run_id, "execute_run")]


def test_who_takes_it_over_meanwhile_has_it(world: World) -> None:
    run = world.run(START)
    world.claimed(run, alive=False)
    world.due()
    world.claimed(run, alive=True, worker_id="heir-1")
    assert world.due(after_s=PATIENCE_S) == []
    world.claims.heartbeats.gone("heir-1")
    assert world.due() == [], "it is another death, of which the message may come"
    assert world.due(after_s=PATIENCE_S) == [(run.run_id, "execute_run")]


def test_one_that_was_resumed_and_whose_message_is_gone_is_resumed(world: World) -> None:
    """With Dagster's run monitoring: it has counted that attempt already."""
    run = world.run(START)
    world.claimed(run, alive=False)
    world.instance.add_run_tags(run.run_id, {TASK_ID_TAG: "task-2"})
    world.due()
    assert world.due(after_s=PATIENCE_S) == [(run.run_id, "resume_run")]


def test_dagsters_monitoring_comes_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(world.instance), "run_monitoring_enabled", property(lambda _: True))
    run, stopped = world.run(START), world.run(START, CANCELING)
    for one in (run, stopped):
        world.claimed(one, alive=False)
    world.due()
    assert world.due(after_s=PATIENCE_S) == [(stopped.run_id, "execute_run")]
    polls_s = 2.0 * world.instance.run_monitoring_poll_interval_seconds
    assert run.run_id in dict(world.due(after_s=polls_s))


def test_what_is_not_ours_is_left_alone(world: World) -> None:
    ours = world.run(CANCELING, queue="q")
    world.run(CANCELING, ours=False)
    world.run(CANCELING, queue="another-fleets-queue")
    world.claimed(world.run(START, DagsterEventType.RUN_SUCCESS), alive=False)
    world.due()
    assert world.due(after_s=PATIENCE_S) == [(ours.run_id, "execute_run")]


def test_what_was_tried_and_is_still_lost_is_due_again_after_the_same_time(world: World) -> None:
    run, cleaned = world.run(START, CANCELING), world.run(START, CANCELING, CANCELED)
    for one in (run, cleaned):
        world.claimed(one, alive=False)
    world.due()
    world.now += PATIENCE_S
    for lost in world.lost.look(LED):
        world.lost.was_tried(lost)
    assert world.due(after_s=PATIENCE_S - 1) == []
    assert world.due(after_s=1) == [(run.run_id, "execute_run")], "what was canceled was looked at once"


def test_while_something_is_lost_it_looks_more_often(world: World) -> None:
    world.due()
    assert world.lost.next_look_in(60) == 60
    world.claimed(world.run(START, CANCELING), alive=False)
    world.due()
    assert world.lost.next_look_in(60) == PATIENCE_S
    world.due(after_s=PATIENCE_S - 1)
    assert world.lost.next_look_in(60) == PATIENCE_S / 4


def test_of_very_many_it_gives_some_and_first_those_that_are_to_be_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a query, and a look has seconds: it must not fail because a whole region has died."""
    monkeypatch.setattr(reconciler, "_BATCH", 2)
    monkeypatch.setattr(reconciler, "_ENOUGH", 2)
    for _ in range(6):
        world.claimed(world.run(START), alive=False)
    stopped = world.run(START, CANCELING)
    world.claimed(stopped, alive=False)
    assert world.due() == []
    found = world.due(after_s=PATIENCE_S)
    assert len(found) == 2
    assert (stopped.run_id, "execute_run") in found


def serves(world: World, worker_id: str, *routes: str, **facts: Any) -> None:
    world.claims.heartbeats.beat(worker_id, {"routes": [*routes], "queue": "q", "slots": [4, 4], **facts})


def lost_of_gpu(world: World, *events: DagsterEventType) -> DagsterRun:
    run = world.run(*events, route="gpu", queue="q-gpu")
    world.claimed(run, alive=False)
    world.due()
    return run


@pytest.mark.parametrize("events", [(), (START,), (START, CANCELING), (START, CANCELING, CANCELED)], ids=len)
def test_who_leads_a_route_finds_its_runs_and_nobody_else_does_as_long_as_it_has_a_worker(
    world: World, events: tuple[DagsterEventType, ...]
) -> None:
    run = lost_of_gpu(world, *events)
    world.now += PATIENCE_S
    serves(world, "gpu-1", "gpu")
    serves(world, ME, "default")
    assert world.due() == []
    world.led = ("gpu",)
    assert world.due(after_s=PATIENCE_S) == [(run.run_id, "execute_run")]


@pytest.mark.parametrize(
    ("events", "is_due"), [((), False), ((START,), True), ((START, CANCELING), True)], ids=["starting", "begun", "stop"]
)
def test_of_a_route_without_a_worker_only_what_ends_without_code_is_due(
    world: World, events: tuple[DagsterEventType, ...], is_due: bool
) -> None:
    run = lost_of_gpu(world, *events)
    world.now += PATIENCE_S
    serves(world, ME, "default")
    serves(world, "steps-1", "gpu", slots=[0, 4])
    serves(world, "ends-1", "gpu", stopping={"at": 1.0, "by": "ada"})
    serves(world, "foreign-1", "gpu", queue="another-fleets-queue")
    assert world.due() == ([(run.run_id, "execute_run")] if is_due else [])


def test_of_several_leaders_one_ends_the_runs_of_routes_without_a_worker(world: World) -> None:
    run = lost_of_gpu(world, START, CANCELING)
    world.now += PATIENCE_S
    for worker_id, route in ((ME, "big"), ("default-1", "default")):
        serves(world, worker_id, route)
    world.led = ("big",)
    assert world.due() == [], "that of the unnamed route does it"
    world.claims.heartbeats.gone("default-1")
    assert world.due(after_s=PATIENCE_S) == [(run.run_id, "execute_run")]


def test_a_run_that_has_to_be_cleaned_up_waits_for_its_route_and_says_so_once(world: World) -> None:
    run = lost_of_gpu(world, START, CANCELING)
    append_event(world.instance, run, cleanup_handlers(["undo"]))
    for _ in range(3):
        world.now += PATIENCE_S
        serves(world, ME, "default")
        assert world.due() == []
    told = [facts for stage, facts in read_engine_events(world.instance, run.run_id) if stage is Stage.WAITING]
    assert [facts["why"] for facts in told] == [
        "no worker that takes runs of route 'gpu' is alive, to run its cleanup handlers"
    ]
    serves(world, "gpu-1", "gpu")
    world.led = ("gpu",)
    assert world.due(after_s=PATIENCE_S) == [(run.run_id, "execute_run")]


@pytest.mark.parametrize("others", [True, False])
def test_who_does_not_have_the_code_of_a_lost_run_lets_another_worker_look_for_it(
    world: World, *, others: bool
) -> None:
    """There is no message that could be handed on."""
    run = world.run(START)
    world.claimed(run, alive=False)
    world.due()
    world.now += 10 * PATIENCE_S
    (lost,) = world.lost.look(LED)
    settings = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")
    context: Any = SimpleNamespace(
        instance=world.instance,
        settings=settings,
        claims=world.claims,
        worker_id=ME,
        find_code=lambda *_: CodeMissing("no module named 'ml'", others=others),
    )
    nobody: Any = None
    mine = Reconciler(context, nobody, nobody)
    assert mine._lead() == ["default"]
    asyncio.run(mine._let_another_look(lost))
    assert mine._lead() == ([] if others else ["default"])
    theirs = Leadership(world.instance, leaders_task(settings, "default"), OTHER, 1_000)
    assert theirs.take() is others
