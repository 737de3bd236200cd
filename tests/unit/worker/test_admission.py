"""May this message be started? Row by row, on Dagster's own in-memory storage."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, job
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.storage.tags import BACKFILL_ID_TAG

from dagster_taskiq._time_limit import time_limit
from dagster_taskiq.storage.claims import Claim, Claims, ClaimState, forget_old_claims
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import read_engine_events
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.worker.admission import Action, Candidate, admit_run
from dagster_taskiq.worker.finalization import fail

ME, OTHER, TASK = "me-1", "other-1", "task-1"
START, CANCELING = DagsterEventType.RUN_START, DagsterEventType.RUN_CANCELING


@job
def nothing() -> None: ...


@dataclass
class World:
    instance: DagsterInstance
    claims: Claims
    now: float = 1000.0

    def run(self, *events: DagsterEventType, task_id: str | None = TASK, **tags: str) -> DagsterRun:
        tags |= {TASK_ID_TAG: task_id} if task_id else {}
        run = self.instance.create_run_for_job(nothing, tags=tags)
        self.report(run, DagsterEventType.RUN_STARTING, *events)
        return run

    def report(self, run: DagsterRun, *events: DagsterEventType) -> None:
        for event in events:
            self.instance.report_dagster_event(DagsterEvent(event.value, "nothing", message=""), run.run_id)

    def claimed_by(self, run: DagsterRun, worker_id: str, *, alive: bool) -> Claims:
        theirs = Claims(self.instance, self.claims.heartbeats)
        assert theirs.take(run, worker_id, TASK, "somewhere", None)
        self.claims.heartbeats.beat(worker_id) if alive else self.claims.heartbeats.gone(worker_id)
        return theirs

    def row(self, run: DagsterRun) -> Claim:
        return self.claims.read([run.run_id])[run.run_id]

    def decide(self, run_id: str, kind: str = "execute_run", held: str | None = None) -> Action:
        candidate = Candidate(kind, run_id, TASK, ME, "here")  # type: ignore[arg-type]
        return admit_run(self.instance, self.claims, candidate, held).action


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        made: World = World(
            instance, Claims(instance, Heartbeats(instance, 10, 4, clock=lambda: made.now, monotonic=lambda: made.now))
        )
        yield made


def test_who_takes_over_from_a_dead_worker_raises_the_epoch_and_says_so_in_its_name(world: World) -> None:
    """It may only have hung: when it comes to, its claim is gone."""
    run = world.run(DagsterEventType.RUN_START)
    theirs = world.claimed_by(run, OTHER, alive=False)
    before = world.row(run)
    assert theirs.holds(run.run_id)
    assert not theirs.lost()
    assert world.decide(run.run_id, "resume_run") is Action.RESUME
    world.claims.heartbeats.beat(OTHER)
    assert (world.row(run).worker_id, world.row(run).epoch) == (ME, before.epoch + 1)
    assert not theirs.holds(run.run_id)
    assert theirs.lost() == {run.run_id: before}
    assert not theirs.release(run, "too late"), "what is not its own any more"
    assert world.claims.holds(run.run_id)
    assert [stage for stage, _ in read_engine_events(world.instance, run.run_id)] == [
        Stage.PICKED_UP,
        Stage.RELEASED,
        Stage.PICKED_UP,
    ]


def test_unknown(world: World) -> None:
    assert world.decide("no-such-run") is Action.DROP


@pytest.mark.parametrize("end", ["RUN_SUCCESS", "RUN_FAILURE", "RUN_CANCELED"])
def test_finished(world: World, end: str) -> None:
    run = world.run(START, DagsterEventType[end])
    assert world.decide(run.run_id) is Action.DROP
    assert not list(read_engine_events(world.instance, run.run_id)), "no trace in the log of a run that is over"


def test_starting(world: World) -> None:
    run = world.run()
    assert world.decide(run.run_id) is Action.START
    assert (world.row(run).worker_id, world.row(run).state) == (ME, ClaimState.HELD)


def test_while_the_fleet_is_held_nothing_begins_and_nothing_is_claimed(world: World) -> None:
    """A run that goes on elsewhere, or that a dead worker has left, would begin a process, too."""
    fresh, resumed, left = world.run(), world.run(START), world.run(START)
    world.claimed_by(left, OTHER, alive=False)
    before = world.row(left)
    for run, kind in ((fresh, "execute_run"), (resumed, "resume_run"), (left, "execute_run")):
        assert world.decide(run.run_id, kind, held="by ada") is Action.HAND_BACK, kind
    assert world.claims.read([fresh.run_id, resumed.run_id]) == {}
    assert world.row(left) == before
    assert world.decide(fresh.run_id) is Action.START


def test_while_the_fleet_is_held_cancellations_are_finished_and_what_is_over_is_dropped(world: World) -> None:
    assert world.decide(world.run(START, CANCELING).run_id, held="by ada") is Action.FINISH_CANCELLATION
    over = world.run(START, DagsterEventType.RUN_SUCCESS)
    assert world.decide(over.run_id, held="by ada") is Action.DROP


@pytest.mark.parametrize(
    ("status", "action"),
    [
        ("REQUESTED", Action.START),
        ("COMPLETED_SUCCESS", Action.START),
        ("CANCELING", Action.FINISH_CANCELLATION),
        ("CANCELED", Action.FINISH_CANCELLATION),
        ("FAILING", Action.FINISH_CANCELLATION),
    ],
)
def test_starting_and_its_backfill_is(world: World, status: str, action: Action) -> None:
    backfill = PartitionBackfill("one", BulkActionStatus[status], False, {}, backfill_timestamp=time.time())
    world.instance.add_backfill(backfill)
    assert world.decide(world.run(**{BACKFILL_ID_TAG: "one"}).run_id) is action
    assert world.decide(world.run(**{BACKFILL_ID_TAG: "unknown"}).run_id) is Action.START
    started = world.run(START, **{BACKFILL_ID_TAG: "one"})
    assert world.decide(started.run_id, "resume_run") is Action.RESUME, "what has begun is terminated, not dropped"


def test_starting_but_claimed_first_by_a_live_worker(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=True)
    assert world.decide(run.run_id) is Action.HAND_BACK
    owner = world.claims.owner(run.run_id)
    assert owner is not None
    assert (owner.worker_id, owner.alive) == (OTHER, True)


def test_starting_and_claimed_by_a_worker_that_died(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=False)
    assert world.decide(run.run_id) is Action.START


def test_started_by_a_live_worker(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=True)
    world.report(run, START)
    before = list(read_engine_events(world.instance, run.run_id))
    assert world.decide(run.run_id) is Action.HAND_BACK
    assert list(read_engine_events(world.instance, run.run_id)) == before, "no trace in the log of a run that goes on"


def test_a_heartbeat_that_is_too_old_is_a_dead_workers(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=True)
    world.report(run, START)
    world.now += 10
    assert world.decide(run.run_id) is Action.LOOK_AGAIN, "a database that was away leaves nothing but old ones"
    world.now += 4
    assert world.decide(run.run_id) is Action.FAIL


def test_a_worker_that_was_only_late_keeps_its_run(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=True)
    world.report(run, START)
    world.now += 10
    assert world.decide(run.run_id) is Action.LOOK_AGAIN
    world.claims.heartbeats.beat(OTHER)
    world.now += 4
    assert world.decide(run.run_id) is Action.HAND_BACK


def test_starting_and_claimed_by_a_worker_whose_heartbeat_is_old(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=True)
    world.now += 10
    assert world.decide(run.run_id) is Action.LOOK_AGAIN
    owner = world.claims.owner(run.run_id)
    assert owner is not None
    assert (owner.worker_id, owner.alive, owner.in_doubt) == (OTHER, True, True)
    world.now += 4
    assert world.decide(run.run_id) is Action.START


def test_started_by_a_dead_worker(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=False)
    world.report(run, START)
    assert world.decide(run.run_id) is Action.FAIL


def test_started_by_a_dead_worker_and_resume_asked_for(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=False)
    world.report(run, START)
    assert world.decide(run.run_id, "resume_run") is Action.RESUME


def test_canceling_without_an_owner(world: World) -> None:
    run = world.run(START, CANCELING)
    assert world.decide(run.run_id) is Action.FINISH_CANCELLATION


def test_canceling_with_a_dead_owner(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=False)
    world.report(run, START, CANCELING)
    assert world.decide(run.run_id) is Action.FINISH_CANCELLATION


def test_canceling_with_a_live_owner(world: World) -> None:
    run = world.run()
    world.claimed_by(run, OTHER, alive=True)
    world.report(run, START, CANCELING)
    assert world.decide(run.run_id) is Action.HAND_BACK


def test_superseded_by_another_task(world: World) -> None:
    run = world.run(task_id="a-later-one")
    assert world.decide(run.run_id) is Action.DROP


def test_a_run_without_a_task_id_is_adopted(world: World) -> None:
    run = world.run(task_id=None)
    assert world.decide(run.run_id) is Action.START
    after = world.instance.get_run_by_id(run.run_id)
    assert after is not None
    assert after.tags[TASK_ID_TAG] == TASK


def test_a_cancel_between_the_claim_and_the_second_look_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher writes the status, then reads the claims; the worker claims, then reads the status."""
    run = world.run()
    take = world.claims.take

    def take_and_be_overtaken(*args: Any) -> Claim | None:
        claim = take(*args)
        world.report(run, CANCELING)
        return claim

    monkeypatch.setattr(world.claims, "take", take_and_be_overtaken)
    assert world.decide(run.run_id) is Action.FINISH_CANCELLATION


def test_a_claim_that_was_released_does_not_count(world: World) -> None:
    run = world.run()
    theirs = world.claimed_by(run, OTHER, alive=True)
    assert theirs.release(run, "handed back")
    assert world.claims.owner(run.run_id) is None
    assert world.decide(run.run_id) is Action.START
    assert world.row(run).epoch == 2, "an epoch never comes twice"
    assert [stage for stage, _ in read_engine_events(world.instance, run.run_id)] == [
        Stage.PICKED_UP,
        Stage.RELEASED,
        Stage.PICKED_UP,
    ]


def test_the_claim_of_a_run_that_is_final_is_deleted(world: World) -> None:
    run = world.run()
    assert world.decide(run.run_id) is Action.START
    world.claims.forget(run.run_id)
    assert world.claims.read([run.run_id]) == {}
    assert not world.claims.holds(run.run_id)


def test_a_claim_that_could_not_be_deleted_is_deleted_at_the_next_try(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.run()
    assert world.decide(run.run_id) is Action.START

    def refuse() -> None:
        raise OSError("the database is away")

    with monkeypatch.context() as away:
        away.setattr(world.instance.run_storage, "connect", refuse)
        with pytest.raises(OSError, match="away"):
            world.claims.forget(run.run_id)
    world.claims.forget(run.run_id)
    assert world.claims.read([run.run_id]) == {}


def test_a_claim_that_comes_too_late_is_not_made(world: World) -> None:
    """Who asked for it has given up, and has released what it found; a claim now would be nobody's."""
    run = world.run()
    theirs = world.claimed_by(run, OTHER, alive=False)
    seen = world.row(run)
    for claimed in (None, seen):
        with time_limit(0), pytest.raises(TimeoutError):
            world.claims.take(run, ME, TASK, "here", claimed)
    assert world.row(run) == seen
    theirs.forget(run.run_id)
    with time_limit(0), pytest.raises(TimeoutError):
        world.claims.take(run, ME, TASK, "here", None)
    assert world.claims.read([run.run_id]) == {}


def test_a_run_that_was_taken_over_is_not_failed_by_who_had_it_before(world: World) -> None:
    """Its steps had their time to stop, or the database was away for long."""
    run = world.run(START)
    world.claimed_by(run, OTHER, alive=False)
    assert world.decide(run.run_id) is Action.FAIL
    third = Claims(world.instance, world.claims.heartbeats)
    assert third.take(run, "third", "task-2", "there", world.row(run))
    assert not fail(world.instance, world.claims, run.run_id, "worker other-1, which had it, is gone")
    assert world.instance.get_runs()[0].status is DagsterRunStatus.STARTED
    assert fail(world.instance, third, run.run_id, "worker me-1, which had it, is gone")


def test_claims_that_nobody_came_to_delete_are_forgotten(world: World) -> None:
    going_on, finished, deleted, being_written, canceled = runs = [world.run(START) for _ in range(5)]
    for run in runs:
        world.claimed_by(run, OTHER + run.run_id, alive=run is being_written)
    world.report(finished, DagsterEventType.RUN_SUCCESS)
    world.report(being_written, DagsterEventType.RUN_SUCCESS)
    world.instance.delete_run(deleted.run_id)
    world.report(canceled, DagsterEventType.RUN_CANCELED)
    forget_old_claims(world.instance, world.claims.heartbeats)
    left = world.claims.read([run.run_id for run in runs])
    assert set(left) == {going_on.run_id, being_written.run_id, canceled.run_id}, "its cleanup may be outstanding"
    tomorrow = time.time() + 2 * 86_400
    forget_old_claims(world.instance, world.claims.heartbeats, now=lambda: tomorrow)
    assert canceled.run_id not in world.claims.read([canceled.run_id])


def test_a_run_of_which_monitoring_was_told_is_left_to_it_for_a_while(world: World) -> None:
    """It resumes the run, under another task id, or fails it; what has its own message must not come between."""
    run = world.run()
    world.claimed_by(run, OTHER, alive=False)
    world.report(run, START)
    seen = world.row(run)
    assert world.claims.give_up(run.run_id, seen)
    assert not world.claims.give_up(run.run_id, seen), "it was changed"
    assert world.decide(run.run_id) is Action.HAND_BACK
    world.instance.add_run_tags(run.run_id, {TASK_ID_TAG: "task-2"})
    candidate = Candidate("resume_run", run.run_id, "task-2", ME, "here")
    assert admit_run(world.instance, world.claims, candidate).action is Action.RESUME


def test_a_worker_that_was_given_up_does_not_count_again_when_it_beats_again(world: World) -> None:
    run = world.run()
    theirs = world.claimed_by(run, OTHER, alive=False)
    world.report(run, START)
    assert world.claims.give_up(run.run_id, world.row(run))
    world.claims.heartbeats.beat(OTHER)
    owner = world.claims.owner(run.run_id)
    assert owner is not None
    assert not owner.alive
    assert theirs.lost()
