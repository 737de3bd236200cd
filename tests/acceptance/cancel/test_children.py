"""A run that is terminated takes the runs with it that its op has launched, if it is told to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support.platform import CLEANUP_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq import cancel_run
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import CANCEL_CHILDREN_TAG, CANCEL_REASON_TAG, CANCELLED_BY_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(240)]

STATUS = DagsterRunStatus


@pytest.fixture(scope="module")
def two_slots(endpoint: str) -> Iterator[Platform]:
    """One worker with two slots: for a parent, and for one of the runs that it launches."""
    source = {**UNHURRIED, "max_concurrent_runs": 2}
    with open_platform(endpoint, source=source) as platform, platform.worker("-n", "w"):
        platform.jobs = CLEANUP_JOBS
        yield platform


def launch_with_two(platform: Platform, **tags: str) -> tuple[str, str, str]:
    """The ids of a run whose op has launched two others: of those, one is at work and one waits."""
    children = [platform.create("uploads_job").run_id for _ in range(2)]
    parent = platform.launch("launches_job", tags=tags, runs=children)
    platform.marked(parent, "started")
    at_work = wait_until(
        lambda: [child for child in children if platform.marks(child)], "one child is at work", within=90
    )
    (waiting,) = set(children) - set(at_work)
    assert platform.status(waiting) is STATUS.STARTING
    return parent, at_work[0], waiting


def ended_at(platform: Platform, run_id: str) -> float:
    (event,) = platform.instance.all_logs(run_id, of_type=DagsterEventType.RUN_CANCELED)
    return event.timestamp


def test_pending_ones_are_never_started_and_running_ones_clean_up_before_the_parent_is_final(
    two_slots: Platform,
) -> None:
    parent, running, waiting = launch_with_two(two_slots, **{CANCEL_CHILDREN_TAG: "true"})
    assert cancel_run(parent, reason="wrong file", requested_by="ada", instance=two_slots.instance)
    for run_id in (parent, running, waiting):
        assert two_slots.finished(run_id, within=90) is STATUS.CANCELED
    assert two_slots.marks(waiting) == []
    assert "'upload_id':'u-1'" in two_slots.marked(running, "undo")
    assert two_slots.marked(running, "told").startswith("reason=parent_run_")
    assert two_slots.run(running).tags[CANCEL_REASON_TAG] == f"parent run {parent} was terminated: wrong file"
    assert max(ended_at(two_slots, child) for child in (running, waiting)) < ended_at(two_slots, parent)
    story = "\n".join(two_slots.story(parent))
    assert "cancelling 2 runs that this run launched: " in story
    assert "all of them final after " in story
    two_slots.marked(parent, "undo")


def test_without_being_told_they_go_on(two_slots: Platform) -> None:
    parent, running, waiting = launch_with_two(two_slots)
    assert two_slots.launcher.terminate(parent)
    assert two_slots.finished(parent, within=90) is STATUS.CANCELED
    two_slots.marked(waiting, "started", within=90)
    assert {two_slots.status(child) for child in (running, waiting)} == {STATUS.STARTED}
    assert Stage.CHILDREN not in two_slots.stages(parent)
    for child in (running, waiting):
        assert two_slots.launcher.terminate(child)
        assert two_slots.finished(child, within=90) is STATUS.CANCELED


def child_of(platform: Platform, parent: str, job: str, tags: dict[str, str] | None = None) -> str:
    """As an op of the parent launches it: Dagster's tag is all that tells."""
    return platform.launch(job, tags={"dagster/parent_run_id": parent, **(tags or {})}, grace=100)


def test_children_and_theirs_end_before_those_that_launched_them(endpoint: str) -> None:
    with open_platform(endpoint, source={**UNHURRIED, "cancel_children": True}) as platform, platform.worker("-n", "w"):
        parent = platform.launch("sleepy_job")
        child, other = child_of(platform, parent, "sleepy_job"), child_of(platform, parent, "sleepy_job")
        grandchild = child_of(platform, child, "sleepy_job")
        unrelated = platform.launch("sleepy_job")
        tree = (parent, child, other, grandchild)
        for run_id in (*tree, unrelated):
            platform.marked(run_id, "started")
        assert cancel_run(parent, reason="wrong input", requested_by="ada", instance=platform.instance)
        for run_id in tree:
            assert platform.finished(run_id) is STATUS.CANCELED, platform.story(run_id)
            assert platform.mark_counts(run_id)["cleanup-end"] == 1
            platform.assert_nothing_left(run_id)
        ended = {run_id: ended_at(platform, run_id) for run_id in tree}
        assert ended[grandchild] <= ended[child] <= ended[parent] >= ended[other]
        tags = platform.run(grandchild).tags
        assert tags[CANCELLED_BY_TAG] == "ada"
        assert tags[CANCEL_REASON_TAG].endswith(f"parent run {parent} was terminated: wrong input")
        assert platform.status(unrelated) is STATUS.STARTED
        assert platform.launcher.terminate(unrelated)
        assert platform.finished(unrelated) is STATUS.CANCELED


def test_the_worker_that_waits_for_them_is_killed(endpoint: str) -> None:
    """Another one goes on with the parent's end, and waits for them as well."""
    with open_platform(endpoint) as platform, platform.worker("-n", "first", "--max-runs", "1") as first:
        parent = platform.launch("sleepy_job", tags={CANCEL_CHILDREN_TAG: "true"})
        platform.marked(parent, "started")
        with platform.worker("-n", "second"):
            child = child_of(platform, parent, "closes_when_told_job")
            platform.marked(child, "started")
            hold = Path(f"{platform.run(child).tags['marks']}.hold")
            hold.touch()
            assert platform.launcher.terminate(parent)
            platform.wait_for_stage(parent, Stage.CHILDREN)
            first.process.kill()
            wait_until(
                lambda: platform.stages(parent).count(Stage.CHILDREN) == 2,
                "the second worker waits for the child",
                within=90,
                seen=lambda: platform.story(parent),
            )
            assert platform.status(parent) is STATUS.CANCELING, "its child cleans up"
            hold.unlink()
            for run_id in (child, parent):
                assert platform.finished(run_id) is STATUS.CANCELED, platform.story(run_id)
                assert platform.mark_counts(run_id)["cleanup-end"] == 1
            assert ended_at(platform, child) <= ended_at(platform, parent)
