"""Runs that a run has launched are cancelled with it: theirs, too, and whatever becomes of a worker meanwhile."""

from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq import cancel_run
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import CANCEL_CHILDREN_TAG, CANCEL_REASON_TAG, CANCELLED_BY_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(240)]

STATUS = DagsterRunStatus
WITH_CHILDREN = {CANCEL_CHILDREN_TAG: "true"}


def child_of(platform: Platform, parent: str, job: str, tags: dict[str, str] | None = None) -> str:
    """As an op of the parent launches it: Dagster's tag is all that tells."""
    return platform.launch(job, tags={"dagster/parent_run_id": parent, **(tags or {})}, grace=100)


def canceled_at(platform: Platform, run_id: str) -> float:
    (entry,) = platform.instance.all_logs(run_id, of_type=DagsterEventType.RUN_CANCELED)
    return entry.timestamp


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
        ended = {run_id: canceled_at(platform, run_id) for run_id in tree}
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
        parent = platform.launch("sleepy_job", tags=WITH_CHILDREN)
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
            assert canceled_at(platform, child) <= canceled_at(platform, parent)
