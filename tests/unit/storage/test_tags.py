"""Which tags of ours a run has, and which of them people see."""

from collections.abc import Callable

from dagster import DagsterInstance, job
from dagster._core.storage.tags import TagType, get_tag_type

from dagster_taskiq.storage.tags import (
    CANCEL_REASON_TAG,
    CANCELLED_BY_TAG,
    GRACE_SECONDS_TAG,
    RUN_ID_TAG,
    TASK_ID_TAG,
    drop_copied_tags,
    own_tags,
    tag_launched_run,
)

COPIES = {TASK_ID_TAG: "of another", CANCEL_REASON_TAG: "wrong file", CANCELLED_BY_TAG: "ada"}


@job
def nothing() -> None: ...


def test_dagster_s_ui_shows_what_is_for_people_and_for_their_programs() -> None:
    type_of: Callable[[str], TagType] = get_tag_type
    assert type_of(RUN_ID_TAG) is TagType.HIDDEN
    shown = [tag for tag in (*COPIES, RUN_ID_TAG) if type_of(tag) is not TagType.HIDDEN]
    assert sorted(shown) == [CANCEL_REASON_TAG, CANCELLED_BY_TAG, TASK_ID_TAG], "as it lists them"


def test_a_new_run_has_none_of_what_the_launchpad_has_copied() -> None:
    """That copies what it shows: all but the tag that says whose they are."""
    with DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(nothing, tags={**COPIES, GRACE_SECONDS_TAG: "5", "team": "a"})
        drop_copied_tags(instance, run)
        after = instance.get_run_by_id(run.run_id)
        assert after is not None
        assert COPIES.keys() & after.tags.keys() == set()
        assert {GRACE_SECONDS_TAG, "team"} <= after.tags.keys()
        tag_launched_run(instance, after, "its own")
        launched = instance.get_run_by_id(run.run_id)
        assert launched is not None
        assert own_tags(launched)[TASK_ID_TAG] == "its own"
        drop_copied_tags(instance, launched)
        assert TASK_ID_TAG in own_tags(launched)
