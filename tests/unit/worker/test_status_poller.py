"""Which runs are to be stopped, by their status in Dagster's database."""

from collections.abc import Iterator

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, RUN_ID_TAG, TIMED_OUT_TAG
from dagster_taskiq.worker.status_poller import StatusPoller

pytestmark = pytest.mark.anyio
EVENTS = DagsterEventType


class World:
    def __init__(self, instance: DagsterInstance) -> None:
        self.instance = instance
        self.run_id: str = create_run_for_test(instance, job_name="a_job", status=DagsterRunStatus.STARTED).run_id
        self.stopped: list[str | None] = []
        self.reasons: list[str | None] = []
        self.authors: list[str | None] = []
        self.kinds: list[CancelKind] = []
        self.poller = StatusPoller(instance, lambda: {"task": self.run_id}, self.cancel, 5)

    def cancel(self, task_id: str, cancellation: Cancellation) -> bool:
        assert task_id == "task"
        self.stopped.append(cancellation.cause)
        self.reasons.append(cancellation.reason)
        self.authors.append(cancellation.requested_by)
        self.kinds.append(cancellation.kind)
        return True

    def report(self, kind: DagsterEventType) -> None:
        self.instance.report_dagster_event(DagsterEvent(kind.value, "a_job"), self.run_id)


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


@pytest.mark.parametrize("kind", [EVENTS.RUN_CANCELING, EVENTS.RUN_CANCELED])
async def test_a_cancelled_run_is_stopped_at_the_first_look(world: World, kind: DagsterEventType) -> None:
    await world.poller.look()
    assert world.stopped == []
    world.report(kind)
    await world.poller.look()
    assert len(world.stopped) == 1
    assert world.authors == [UNKNOWN_AUTHOR], "who marks a run in Dagster leaves no name, and whoever else does has one"


async def test_a_run_that_fails_by_itself_has_a_moment_to_end(world: World) -> None:
    world.report(EVENTS.RUN_FAILURE)
    await world.poller.look()
    assert world.stopped == []
    await world.poller.look()
    assert (world.stopped, world.reasons) == (["the run was marked FAILURE"], [None])


async def test_a_run_that_took_too_long_is_told_so(world: World) -> None:
    """As its worker has marked it, unless somebody has marked it CANCELED since."""
    world.instance.add_run_tags(world.run_id, {TIMED_OUT_TAG: "run timed out: why", RUN_ID_TAG: world.run_id})
    for kind in (EVENTS.RUN_CANCELING, EVENTS.RUN_CANCELED):
        world.report(kind)
        await world.poller.look()
    assert world.kinds == [CancelKind.DEADLINE, CancelKind.REQUESTED]
    assert world.reasons == ["run timed out: why", None]


@pytest.mark.parametrize("by", [None, "ada"])
async def test_so_is_one_that_dagsters_run_monitoring_has_marked_for_that(
    world: World, monkeypatch: pytest.MonkeyPatch, by: str | None
) -> None:
    """Before our launcher has said why: without an author, and by the text of its event."""
    monkeypatch.setattr(type(world.instance), "run_monitoring_enabled", True)
    tags = {"dagster/max_runtime": "0.001"} | ({CANCELLED_BY_TAG: by, RUN_ID_TAG: world.run_id} if by else {})
    world.instance.add_run_tags(world.run_id, tags)
    world.report(EVENTS.RUN_START)
    (run,) = world.instance.get_runs()
    world.instance.report_run_canceling(run, "Canceling due to exceeding maximum runtime of 0 seconds.")
    await world.poller.look()
    assert world.kinds == [CancelKind.REQUESTED if by else CancelKind.DEADLINE]


async def test_a_run_that_was_deleted_is_stopped(world: World) -> None:
    world.instance.delete_run(world.run_id)
    await world.poller.look()
    assert (world.stopped, world.reasons) == (["the run was deleted"], [None])


async def test_the_reason_is_what_a_person_gave_for_this_very_run(world: World) -> None:
    """Else there is none, however the run's status was seen; a copy of another run's tag does not count."""
    world.report(EVENTS.RUN_CANCELING)
    await world.poller.look()
    world.instance.add_run_tags(world.run_id, {CANCEL_REASON_TAG: "of the first run", RUN_ID_TAG: "the first run"})
    await world.poller.look()
    world.instance.add_run_tags(world.run_id, {CANCEL_REASON_TAG: "wrong input", RUN_ID_TAG: world.run_id})
    await world.poller.look()
    assert world.reasons == [None, None, "wrong input"]


async def test_a_run_of_which_nothing_can_be_read_keeps_no_other_one_from_being_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at once more, and then stopped, too."""
    bad, good = (create_run_for_test(world.instance, status=DagsterRunStatus.CANCELING) for _ in range(2))
    stopped: list[tuple[str, CancelKind]] = []

    def cancel(task_id: str, cancellation: Cancellation) -> bool:
        stopped.append((task_id, cancellation.kind))
        return True

    def limit_of_monitoring(_: DagsterInstance, run: DagsterRun) -> None:
        if run.run_id == bad.run_id:
            raise ValueError("a tag that nobody can read")

    monkeypatch.setattr("dagster_taskiq.storage.stops.limit_of_monitoring", limit_of_monitoring)
    poller = StatusPoller(world.instance, lambda: {"bad": bad.run_id, "good": good.run_id}, cancel, 5)
    await poller.look()
    assert stopped == [("good", CancelKind.REQUESTED)]
    await poller.look()
    assert stopped[1:] == [("bad", CancelKind.REQUESTED), ("good", CancelKind.REQUESTED)]
