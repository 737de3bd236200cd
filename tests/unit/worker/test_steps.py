"""What the event log tells of steps, and what may be started: on Dagster's own in-memory storage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, job
from dagster._core.execution.plan.objects import ErrorSource, StepFailureData, StepSuccessData
from dagster._core.execution.plan.outputs import StepOutputHandle
from sqlalchemy.exc import OperationalError

from dagster_taskiq import _retry
from dagster_taskiq._lane import Lane
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.dagster_compat.execution import KnownExecutionState, describe_state, needs_history, rebuild_state
from dagster_taskiq.messages import StepMessage, step_task_id
from dagster_taskiq.process.supervise import ChildEnd
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.storage import step_claims
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import EngineEvent, Stage, picked_up, released, tree_gone
from dagster_taskiq.storage.event_log import RunLog, StepRef, append_event, read_engine_events
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.running_steps import RunningSteps
from dagster_taskiq.storage.step_claims import StepClaim, StepClaims, StepState, forget_old_step_claims
from dagster_taskiq.storage.step_events import step_interrupted, step_lost
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.worker import step_task
from dagster_taskiq.worker.admission import Action, Candidate, Decision, admit_step, admit_step_again
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.event_writer import EventWriter
from dagster_taskiq.worker.step_task import StepWork

ME, OTHER = "me-1", "other-1"
STEP = "load"


@job
def nothing() -> None: ...


@dataclass
class World:
    instance: DagsterInstance
    claims: StepClaims
    run: DagsterRun
    heartbeats: Heartbeats
    now: float = 1000.0

    def task(self, attempt: int = 1) -> str:
        return step_task_id(self.run.run_id, STEP, attempt)

    def note(self, note: EngineEvent) -> None:
        append_event(self.instance, self.run, note, STEP)

    def report(self, kind: DagsterEventType, data: Any = None, step_key: str | None = None) -> None:
        event = DagsterEvent(kind.value, "nothing", step_key=step_key, event_specific_data=data, message="")
        self.instance.report_dagster_event(event, self.run.run_id)

    def ended(self, kind: DagsterEventType, source: ErrorSource | None = None) -> None:
        data: Any = None
        if kind is DagsterEventType.STEP_SUCCESS:
            data = StepSuccessData(0.0)  # type: ignore[no-untyped-call]
        elif kind is DagsterEventType.STEP_FAILURE:
            data = StepFailureData(error=None, user_failure_data=None, error_source=source)  # type: ignore[no-untyped-call]
        self.report(kind, data, STEP)

    def by_the_log(self) -> RunningSteps:
        steps = RunningSteps()
        for entry in self.instance.all_logs(self.run.run_id):
            if entry.dagster_event is not None:
                steps.handle_event(entry.dagster_event)
        return steps

    def at_work(self) -> dict[str, str]:
        return self.by_the_log().workers

    def claimed(self) -> dict[str, str]:
        return {claim.task_id: claim.worker_id for claim in self.claims.running(self.run.run_id).values()}

    def step(self, attempt: int = 1) -> StepRef:
        return StepRef(STEP, self.task(attempt))

    def decide(self, attempt: int = 1, *, received_before: bool = False) -> Decision:
        candidate = Candidate("execute_step", self.run.run_id, self.task(attempt), ME, "here")
        step = StepRef(STEP, candidate.task_id)
        again = (
            admit_step_again(self.instance, self.claims, self.heartbeats, step, candidate) if received_before else None
        )
        return again or admit_step(self.instance, self.claims, step, candidate)

    def stages(self) -> list[Stage]:
        step = StepRef(STEP, self.task())
        return [stage for stage, _ in read_engine_events(self.instance, self.run.run_id, step)]


def of(worker_id: str, task_id: str, note: EngineEvent) -> EngineEvent:
    """As the worker says it of that attempt."""
    return replace(note, facts={**note.facts, **picked_up(worker_id, task_id, "").facts})


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(nothing)
        heartbeats = Heartbeats(instance, 10, 4, clock=lambda: made.now, monotonic=lambda: made.now)
        made: World = World(instance, StepClaims(instance), run, heartbeats)
        made.heartbeats.beat(OTHER)
        made.report(DagsterEventType.RUN_START)
        yield made


def test_a_step_is_at_work_from_its_claim(world: World) -> None:
    assert world.at_work() == {}
    world.note(picked_up(OTHER, world.task(), "there"))
    assert world.at_work() == {world.task(): OTHER}


def test_the_first_claim_counts_until_it_is_released(world: World) -> None:
    world.note(picked_up(OTHER, world.task(), "there"))
    world.note(picked_up(ME, world.task(), "here"))
    world.note(released(ME, world.task(), "too late"))
    assert world.at_work() == {world.task(): OTHER}
    world.note(released(OTHER, world.task(), "handed back"))
    assert world.at_work() == {}


@pytest.mark.parametrize("kind", ["STEP_SUCCESS", "STEP_FAILURE", "STEP_UP_FOR_RETRY"])
def test_a_step_that_says_how_it_ended_is_over_when_its_tree_is_gone(world: World, kind: str) -> None:
    world.note(picked_up(OTHER, world.task(), "there"))
    world.ended(DagsterEventType[kind])
    assert world.at_work() == {world.task(): OTHER}
    world.note(of(ME, world.task(), tree_gone(None, (), 0.0, ended=True)))
    assert world.at_work() == {world.task(): OTHER}, "another worker's word"
    world.note(of(OTHER, world.task(), tree_gone(None, (), 0.0, ended=True)))
    assert world.at_work() == {}


def test_a_step_whose_tree_is_gone_without_a_word_is_over_when_it_is_called_lost(world: World) -> None:
    """Its worker may die before it has done so; then the run would never hear how the step ended."""
    world.note(picked_up(OTHER, world.task(), "there"))
    world.note(of(OTHER, world.task(), tree_gone(1.0, (), 0.0, ended=False)))
    assert world.at_work() == {world.task(): OTHER}
    world.note(step_lost(OTHER, world.task(), "killed", retry=True))
    assert world.at_work() == {}


@pytest.mark.anyio
@pytest.mark.parametrize("step", [True, False])
async def test_what_is_told_of_the_end_survives_an_outage(
    world: World, step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's run waits for it."""
    monkeypatch.setattr(_retry, "_FIRST_PAUSE_S", 0.001)
    report, outages = world.instance.report_dagster_event, iter([True, True])

    def unsteady(*args: Any, **kwargs: Any) -> Any:
        if next(outages, False):
            raise OperationalError("insert", {}, ConnectionResetError())
        return report(*args, **kwargs)

    monkeypatch.setattr(world.instance, "report_dagster_event", unsteady)
    about = StepRef(STEP, world.task()) if step else None
    writer = EventWriter(world.instance, world.run, ME, CancelSignal(), about, lane=Lane("the database"))
    writer.record_end(ChildEnd(4711, 0, (), interrupted_at=1.0, kill_at=None, killed=(), gone_at=2.0), reported=True)
    await writer.written()
    events = [entry.dagster_event for entry in world.instance.all_logs(world.run.run_id) if entry.dagster_event]
    assert events[-1].message == "process tree gone after 1.0 s"
    assert events[-1].step_key == (STEP if step else None)


def test_a_new_attempt_is_at_work_whatever_is_still_said_of_the_old_one(world: World) -> None:
    world.note(picked_up(OTHER, world.task(1), "there"))
    world.ended(DagsterEventType.STEP_UP_FOR_RETRY)
    world.note(picked_up(ME, world.task(2), "here"))
    assert world.at_work() == {world.task(1): OTHER, world.task(2): ME}, "the old one's process still exits"
    world.note(step_lost(OTHER, world.task(1), "killed", retry=True))
    steps = world.by_the_log()
    assert (steps.workers, steps.step_keys) == ({world.task(2): ME}, {world.task(2): STEP})


def test_the_order_in_which_the_log_is_read_does_not_matter(world: World) -> None:
    """PostgreSQL may show an event after a later one."""
    world.note(picked_up(OTHER, world.task(), "there"))
    world.note(picked_up(ME, world.task(), "here"))
    world.note(released(ME, world.task(), "too late"))
    world.note(of(OTHER, world.task(), tree_gone(None, (), 0.0, ended=True)))
    log = [event for entry in world.instance.all_logs(world.run.run_id) if (event := entry.dagster_event)]
    for late in range(len(log)):
        steps = RunningSteps()
        for event in [*log[:late], *log[late + 1 :], log[late]]:
            steps.handle_event(event)
        assert steps.workers == {}, f"event {late} came late: {steps.workers}"


def test_a_step_whose_worker_is_dead_stays_closed(world: World) -> None:
    world.note(picked_up(OTHER, world.task(), "there"))
    steps = world.by_the_log()
    steps.close(world.task())
    steps.close("unknown")
    assert steps.workers == {}
    for entry in world.instance.all_logs(world.run.run_id):
        if entry.dagster_event is not None:
            steps.handle_event(entry.dagster_event)
    assert steps.workers == {}


def test_the_notes_of_the_run_itself_say_nothing_of_steps(world: World) -> None:
    append_event(world.instance, world.run, picked_up(OTHER, "task", "there"))
    assert world.at_work() == {}
    assert RunningSteps().workers == {}


def test_a_step_of_a_run_that_goes_on_is_started(world: World) -> None:
    assert world.decide().action is Action.START
    assert world.stages() == [Stage.PICKED_UP]


@pytest.mark.parametrize("end", ["RUN_SUCCESS", "RUN_FAILURE", "RUN_CANCELED", "RUN_CANCELING"])
def test_a_step_of_a_run_that_is_over_or_being_stopped_is_dropped_without_a_trace(world: World, end: str) -> None:
    world.report(DagsterEventType[end])
    assert world.decide().action is Action.DROP
    assert world.stages() == []


def test_a_step_of_no_run_is_dropped(world: World) -> None:
    world.instance.delete_run(world.run.run_id)
    decision = world.decide()
    assert (decision.action, decision.why) == (Action.DROP, "the run does not exist (deleted?)")


def test_a_cancel_between_the_claim_and_the_second_look_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = world.claims.claim

    def claim_and_be_overtaken(*args: Any) -> StepClaim:
        owner = claim(*args)
        world.report(DagsterEventType.RUN_CANCELING)
        return owner

    monkeypatch.setattr(world.claims, "claim", claim_and_be_overtaken)
    assert world.decide().action is Action.DROP
    assert world.stages() == [Stage.PICKED_UP, Stage.RELEASED]
    assert world.claimed() == {}


def test_a_claim_that_failed_half_way_is_gone_on_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database fails after the claim was written: who then dropped the step would leave it to nobody."""
    looks = iter([world.run, None])

    def look(_: object) -> DagsterRun:
        run = next(looks)
        if run is None:
            raise OSError("the database is away")
        return world.instance.get_runs()[0]

    with monkeypatch.context() as away:
        away.setattr(world.instance, "get_run_by_id", look)
        with pytest.raises(OSError, match="away"):
            world.decide()
    assert world.claimed() == {world.task(): ME}
    assert world.decide().action is Action.START
    assert world.decide(received_before=True).action is Action.DROP, "another delivery"


@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("received_before", [True, False])
def test_an_attempt_that_another_worker_claimed_is_never_started_again(
    world: World, over: bool, received_before: bool
) -> None:
    assert world.claims.claim(world.run, world.step(), OTHER, "there").worker_id == OTHER
    if over:
        world.claims.end(world.run.run_id, world.step(), OTHER)
    decision = world.decide(received_before=received_before)
    assert decision.action is (Action.HAND_BACK if received_before and not over else Action.DROP)
    assert OTHER in decision.why
    found = world.claims.find(world.run.run_id, world.step())
    assert found is not None
    assert found.worker_id == OTHER
    assert world.claimed() == ({} if over else {world.task(): OTHER})
    assert world.at_work() == {world.task(): OTHER}


@pytest.mark.parametrize("going_on", [True, False])
def test_a_step_whose_message_comes_again_and_whose_worker_is_silent_is_reported_lost(
    world: World, going_on: bool
) -> None:
    """Once, and only when both signs are there: its run waits for the step."""
    world.claims.claim(world.run, world.step(), OTHER, "there")
    if not going_on:
        world.report(DagsterEventType.RUN_CANCELING)
    world.now += 9
    assert world.decide(received_before=True).action is Action.HAND_BACK, "the message came first, and is still needed"
    world.now += 10
    assert world.decide(received_before=True).action is Action.LOOK_AGAIN
    world.now += 4
    for _ in range(2):
        decision = world.decide(received_before=True)
        assert (decision.action, decision.why) == (Action.DROP, f"worker {OTHER} had it before")
    assert world.stages() == [Stage.PICKED_UP, Stage.STEP_LOST]
    assert world.claimed() == world.at_work() == {}
    step = StepRef(STEP, world.task())
    *_, (_, facts) = read_engine_events(world.instance, world.run.run_id, step)
    assert f"worker {OTHER}" in facts["why"]
    assert bool(facts["may be tried again"]) is going_on


def test_a_second_message_of_an_attempt_that_has_ended_here_is_dropped(world: World) -> None:
    """SQS delivers a message twice now and then, and a run that is resumed sends it again: each for the first time."""
    assert world.decide().action is Action.START
    world.claims.end(world.run.run_id, world.step(), ME)
    assert world.decide().action is Action.DROP


@contextmanager
def events_are_refused(world: World) -> Iterator[None]:
    """The database fails between the row and the event."""

    def refuse(*_: object, **__: object) -> None:
        raise OperationalError("insert", None, OSError("away"))

    with pytest.MonkeyPatch.context() as away:
        away.setattr(world.instance, "handle_new_event", refuse)
        yield


def test_what_the_executor_waits_for_is_written_at_the_next_try(world: World) -> None:
    with events_are_refused(world), pytest.raises(OperationalError):
        world.decide()
    assert world.decide().action is Action.START
    assert world.at_work() == world.claimed() == {world.task(): ME}
    with events_are_refused(world), pytest.raises(OperationalError):
        world.claims.release(world.run, world.step(), ME, "no child could be started")
    world.claims.release(world.run, world.step(), ME, "no child could be started")
    assert world.at_work() == world.claimed() == {}


def context_of(world: World) -> Any:
    return WorkerContext(
        instance=world.instance,
        settings=Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1"),
        claims=Claims(world.instance, world.heartbeats),
        step_claims=world.claims,
        heartbeats_of_steps=world.heartbeats,
        processes=cast("Any", None),
        worker_id=ME,
        where="here",
        cancel_tasks=cast("Any", None),
    )


@pytest.mark.anyio
async def test_a_try_that_the_run_has_not_asked_for_is_dropped(world: World) -> None:
    """Whoever writes to the queue could have a step work twice at the same time."""
    message = StepMessage(world.run.run_id, STEP, 1, "deferred", reexecution=False, state="", interruption=1)
    task = RunningTask(message.task_id, settle=cast("Any", None), awaits_signal=True)
    work = StepWork(context_of(world), None)
    with task.entered():
        assert await work.carry_out(message.to_kwargs()) == Settled(Settlement.DELETE)
        assert world.stages() == []
        other = step_interrupted(STEP, f"{world.task()}.1", "it stops", attempt=1, number=2, most=9)
        append_event(world.instance, world.run, other, STEP)
        assert (await work._admit(message, task)).action is Action.DROP
        asked = step_interrupted(STEP, world.task(), "it stops", attempt=1, number=1, most=9)
        append_event(world.instance, world.run, asked, STEP)
        assert (await work._admit(message, task)).action is Action.START


@pytest.mark.anyio
async def test_a_step_that_could_not_be_looked_up_is_not_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claim was written; the worker, which lives on, would keep everybody from ever beginning it."""
    answers = iter([world.run])  # the first look; then the database is away until the worker has given up
    get_run = world.instance.get_run_by_id

    def look(run_id: str) -> DagsterRun | None:
        if world.stages() != [Stage.PICKED_UP]:
            return get_run(run_id)
        if next(answers, None) is None:
            return get_run(run_id)
        raise OSError("the database is away")

    monkeypatch.setattr(world.instance, "get_run_by_id", look)
    monkeypatch.setattr(step_task, "DATABASE_RETRY_S", 0.0)
    message = StepMessage(world.run.run_id, STEP, 1, "deferred", reexecution=False, state="")
    context = context_of(world)

    task = RunningTask(message.task_id, settle=cast("Any", None), awaits_signal=True)
    with task.entered():
        await StepWork(context, None).carry_out(message.to_kwargs())
    assert world.stages() == [Stage.PICKED_UP, Stage.RELEASED]
    assert world.decide(received_before=True).action is Action.START


def test_claims_on_steps_that_nobody_came_to_delete_are_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that another launcher has ended, no worker deletes them; however many go on."""
    monkeypatch.setattr(step_claims, "_LOOKED_AT_ONCE", 2)
    monkeypatch.setattr(step_claims, "_BATCH", 1)
    finished, deleted, at_work = (world.instance.create_run_for_job(nothing) for _ in range(3))
    for run in (world.run, finished, deleted, at_work):
        world.claims.claim(run, world.step(), OTHER, "there")
        if run is not at_work:
            world.claims.end(run.run_id, world.step(), OTHER)
    for run in (finished, at_work):
        world.instance.report_run_canceled(run)
    world.instance.delete_run(deleted.run_id)
    world.heartbeats.beat(OTHER)
    left: set[str] = set()
    for _ in range(200):  # each time a part, from another place on
        forget_old_step_claims(world.instance, world.heartbeats)
        runs = (world.run, finished, deleted, at_work)
        left = {run.run_id for run in runs if world.claims.read(run.run_id, [world.task()])}
        if len(left) == 2:
            break
    assert left == {world.run.run_id, at_work.run_id}


def test_that_a_step_is_lost_is_said_at_the_next_try(world: World) -> None:
    """The database fails between the row and the event: then the run would learn of it only minutes later."""
    world.claims.claim(world.run, world.step(), OTHER, "there")
    world.now += 10
    assert world.decide(received_before=True).action is Action.LOOK_AGAIN
    world.now += 4
    with events_are_refused(world), pytest.raises(OperationalError):
        world.decide(received_before=True)
    assert world.decide(received_before=True).action is Action.DROP
    assert world.stages() == [Stage.PICKED_UP, Stage.STEP_LOST]
    assert world.claimed() == world.at_work() == {}


def test_an_attempt_that_was_given_back_is_started(world: World) -> None:
    world.claims.claim(world.run, world.step(), OTHER, "there")
    world.claims.release(world.run, world.step(), OTHER, "no child could be started")
    assert world.claimed() == {}
    assert world.decide(received_before=True).action is Action.START


def test_what_another_worker_has_can_neither_be_released_nor_ended(world: World) -> None:
    world.claims.claim(world.run, world.step(), OTHER, "there")
    world.claims.release(world.run, world.step(), ME, "not mine")
    world.claims.end(world.run.run_id, world.step(), ME)
    assert world.claims.read(world.run.run_id, [world.task()])[world.task()].state is StepState.HELD


def test_a_later_attempt_is_work_of_its_own(world: World) -> None:
    world.claims.claim(world.run, world.step(1), OTHER, "there")
    assert world.decide(attempt=2).action is Action.START
    assert world.claimed() == {world.task(1): OTHER, world.task(2): ME}


def test_the_claims_of_a_run_are_deleted_together_and_no_others(world: World) -> None:
    another = world.instance.create_run_for_job(nothing)
    for run in (world.run, another):
        for attempt in (1, 2):
            world.claims.claim(run, world.step(attempt), OTHER, "there")
    world.claims.forget(world.run.run_id)
    assert world.claimed() == {}
    assert len(world.claims.running(another.run_id)) == 2


class Storage:
    """Gives ids as PostgreSQL does: in the order of the inserts, while commits may come in another."""

    def __init__(self) -> None:
        self.committed: set[int] = set()

    def get_records_for_run(self, run_id: str, cursor: str | None, *, of_type: object, limit: int) -> SimpleNamespace:
        after = int(cursor or 0)
        ids = sorted(number for number in self.committed if number > after)[:limit]
        records = [
            SimpleNamespace(
                storage_id=number,
                event_log_entry=SimpleNamespace(
                    dagster_event=DagsterEvent("STEP_START", "nothing", step_key=str(number), message="")
                ),
            )
            for number in ids
        ]
        more = any(number > (ids[-1] if ids else after) for number in self.committed)
        return SimpleNamespace(records=records, cursor=str(ids[-1] if ids else after), has_more=more)


def test_an_event_that_was_committed_late_is_found_and_none_is_given_twice() -> None:
    storage = Storage()
    log = RunLog(storage, "run")  # type: ignore[arg-type]

    def read() -> list[str | None]:
        return [event.step_key for event in log.new_events()]

    log.look_again()
    storage.committed |= {1, 2, 4}
    assert read() == ["1", "2", "4"]
    storage.committed |= {3, 5}
    assert read() == ["5"], "what makes looking again necessary"
    log.look_again()
    assert read() == ["3"]
    storage.committed |= {6, 7}
    assert read() == ["6", "7"]
    log.look_again()
    assert read() == []
    log.look_again()
    storage.committed |= set(range(8, 2500))
    assert read() == [str(number) for number in range(8, 2500)]
    log.look_again()
    assert read() == []


def test_a_state_is_described_and_rebuilt(world: World) -> None:
    state = KnownExecutionState(
        previous_retry_attempts={"load": 2},
        dynamic_mappings={"fan": {"out": ["a", "b"]}, "none": {"out": None}},
        ready_outputs={StepOutputHandle("fan", "out", "a"), StepOutputHandle("load", "result", None)},
    )
    described = describe_state(state)
    rebuilt = rebuild_state(described, world.run, world.instance, history=False)
    assert rebuilt == state
    assert not needs_history(state)
    assert describe_state(rebuilt) == described


@pytest.mark.parametrize(
    "described",
    [{}, {"attempts": {"a": "b"}, "mappings": {}, "outputs": []}, {"attempts": {}, "mappings": {}, "outputs": [[1]]}],
    ids=str,
)
def test_what_describes_no_state_is_refused(world: World, described: dict[str, Any]) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever Dagster's checks raise
        rebuild_state(described, world.run, world.instance, history=False)
