"""Cleanup handlers: after the work has stopped, before the run is final, whatever became of op, process and worker."""

import getpass
import os
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.platform import CLEANUP_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

CANCELED, FAILURE, SUCCESS = DagsterRunStatus.CANCELED, DagsterRunStatus.FAILURE, DagsterRunStatus.SUCCESS


@pytest.fixture
def cleaning(working: Platform) -> Platform:
    return replace(working, jobs=CLEANUP_JOBS)


def terminated(
    platform: Platform, job: str, *, expected: DagsterRunStatus = CANCELED, started: int = 1, **launch: object
) -> str:
    """Launch, wait until it is at work, terminate, wait for its end; nothing of it is left."""
    run_id = platform.launch(job, **launch)  # type: ignore[arg-type]
    platform.wait_started(run_id, started)
    assert platform.launcher.terminate(run_id)
    assert platform.finished(run_id, within=90) is expected, "\n".join(
        [*platform.story(run_id), *platform.marks(run_id)]
    )
    platform.assert_nothing_left(run_id)
    return run_id


def end_of(platform: Platform, run_id: str) -> str:
    event = platform.instance.all_logs(run_id)[-1].dagster_event
    assert event is not None
    return f"{event.event_type_value}: {event.message}"


def kept_states(platform: Platform) -> dict[str, str]:
    from dagster_taskiq.dagster_compat.storage import values_under

    return values_under(platform.instance, "dagster-taskiq/state/")


@pytest.mark.parametrize("job", ["uploads_job", "uploads_outer_job"])
def test_of_an_op_that_was_interrupted(cleaning: Platform, job: str) -> None:
    run_id = terminated(cleaning, job, seconds=60)
    marks = cleaning.marks(run_id)
    names = [mark.split()[0] for mark in marks]
    assert names == ["started", "interrupted", "undo", "told", "config"], marks
    assert "upload_id" in marks[2], marks
    assert marks[1] == "interrupted True REQUESTED None ui"
    assert marks[3] == "told reason=None by=Dagster_UI_or_API"
    assert marks[4] == "config 60.0"
    story = cleaning.story(run_id)
    told_in_order = (
        "cleanup handlers, should the run be cancelled: undo of uploads",
        "interrupting pid",
        "process tree gone",
        "cleaning up on worker w-",
        'cleanup "undo" succeeded (attempt 1',
        "cleanup finished",
        "PIPELINE_CANCELED",
    )
    places = [next((place for place, line in enumerate(story) if text in line), -1) for text in told_in_order]
    assert places == sorted(places), story
    assert -1 not in places, story
    logged = [entry for entry in cleaning.instance.all_logs(run_id) if entry.user_message == "undone by the handler"]
    assert [entry.step_key for entry in logged] == [job.removesuffix("_job")]
    assert not [key for key in kept_states(cleaning) if run_id in key]


def test_the_handler_runs_in_another_process_after_the_work_has_stopped(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "uploads_job")
    started, undone = cleaning.marked(run_id, "started"), cleaning.marked(run_id, "undo").split()[0]
    assert started != undone


def test_of_an_op_that_had_to_be_killed(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "ignores_everything_job", grace=1)
    assert "'upload_id':'u-3'" in cleaning.marked(run_id, "undo")
    assert Stage.KILLED in cleaning.stages(run_id)


def test_a_shield_that_is_never_left_is_named(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "never_leaves_its_shield_job", grace=1)
    assert "'upload_id':'u-5'" in cleaning.marked(run_id, "undo")
    assert any("(inside the shield 'commit of the ledger'): SIGKILL" in line for line in cleaning.story(run_id)), (
        cleaning.story(run_id)
    )


def test_several_handlers_have_their_own_attempts_and_the_policy_of_the_op(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "many_handlers_job")
    counts = cleaning.mark_counts(run_id)
    assert (counts["tried"], counts["undo"], counts["undo-async"]) == (3, 1, 1), cleaning.marks(run_id)
    story = "\n".join(cleaning.story(run_id))
    told = r'cleanup "fails_twice" failed \(attempt 1, \d+ m?s; the next one in 100 ms\): RuntimeError: not yet'
    assert re.search(told, story), story
    assert 'cleanup "fails_twice" succeeded (attempt 3' in story


def test_exhausted_handlers_make_it_a_failure_with_all_reasons(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "cannot_be_cleaned_up_job", expected=FAILURE)
    counts = cleaning.mark_counts(run_id)
    assert (counts["tried"], counts["always-fails"], counts["undo"]) == (2, 1, 1), cleaning.marks(run_id)
    last = end_of(cleaning, run_id)
    assert last.startswith("PIPELINE_FAILURE: cleanup failed: "), last
    assert "always_fails of cannot_be_cleaned_up: ValueError: never in my life" in last
    assert "fails_until_mended of cannot_be_cleaned_up: RuntimeError: the bucket is not mended" in last
    assert "undo" not in last


def test_one_of_two_handlers_of_the_same_name_fails(cleaning: Platform) -> None:
    """That of the graph; the one of its job succeeds, and hides nothing."""
    run_id = terminated(cleaning, "same_names_job", expected=FAILURE)
    assert sorted(mark for mark in cleaning.marks(run_id) if "tidied" in mark) == ["tidied False", "tidied True"]
    story = "\n".join(cleaning.story(run_id))
    assert 'cleanup "tidy" failed (attempt 1' in story
    assert 'cleanup "tidy-2" succeeded (attempt 1' in story
    assert end_of(cleaning, run_id) == "PIPELINE_FAILURE: cleanup failed: tidy: RuntimeError: on purpose"


def will_be_retried(platform: Platform, run_id: str) -> str:
    """What Dagster has decided; it writes that a moment after the failure."""

    def tags() -> Mapping[str, str]:
        return platform.run(run_id).tags

    return str(wait_until(lambda: tags().get("dagster/will_retry"), "Dagster has decided", seen=tags))


def test_what_was_cancelled_is_not_tried_again_when_its_cleanup_fails(endpoint: str) -> None:
    retries = {"run_retries": {"enabled": True, "max_retries": 2}}
    with open_platform(endpoint, extra=retries) as platform, platform.worker("-n", "w"):
        platform.jobs = CLEANUP_JOBS
        run_id = terminated(platform, "can_be_mended_job", expected=FAILURE)
        assert will_be_retried(platform, run_id) == "false"
        # As it is with a run that fails by itself:
        failing = platform.launch("fails_by_itself_job")
        assert platform.finished(failing) is FAILURE
        assert will_be_retried(platform, failing) == "true"


def test_one_that_hangs_is_stopped_even_in_c(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "handlers_hang_job", expected=FAILURE)
    counts = cleaning.mark_counts(run_id)
    assert (counts["sleeps"], counts["stuck"], counts["undo"]) == (1, 2, 1), cleaning.marks(run_id)
    last = end_of(cleaning, run_id)
    assert "sleeps_too_long of handlers_hang: TimeoutError: it took longer than its timeout of 0.5 s" in last
    assert "it did not react to its timeout of 0.5 s, and its process was ended" in last


def test_it_asks_for_resources(cleaning: Platform, tmp_path: object) -> None:
    place = f"{tmp_path}/store"
    run_id = terminated(
        cleaning, "with_resources_job", resources={"resources": {"store": {"config": {"place": place}}}}
    )
    assert Path(place).read_text() == "deleted the blob\n", cleaning.story(run_id)


def test_what_has_finished_is_not_undone_and_the_job_has_a_handler_too(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "whole_job")
    counts = cleaning.mark_counts(run_id)
    assert (counts["undo"], counts["job-undone"]) == (1, 1), cleaning.marks(run_id)
    assert cleaning.marked(run_id, "undo").split()[1] == "then_waits"
    assert cleaning.marked(run_id, "job-undone").startswith(
        "None finishes:{'upload_id':'done'},then_waits:{'upload_id'"
    )


def test_of_a_graph_inside_a_job(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "with_a_graph_job")
    assert cleaning.mark_counts(run_id)["undo"] == 1
    told = cleaning.marked(run_id, "job-undone")
    assert told.startswith("inner inner.finishes:{'upload_id':'done'},inner.then_waits:"), told


@pytest.mark.parametrize("asset", ["an_asset", "two_assets", "of_a_graph"])
def test_of_assets(cleaning: Platform, asset: str) -> None:
    from dagster import AssetKey

    keys = {"two_assets": ["left", "right"]}.get(asset, [asset])
    run_id = terminated(cleaning, "assets_job", assets=[AssetKey(key) for key in keys])
    told = cleaning.marked(run_id, "job-undone" if asset == "of_a_graph" else "undo")
    assert asset in told, told
    of_job = [mark for mark in cleaning.marks(run_id) if mark.startswith("job-undone None")]
    assert len(of_job) == 1, cleaning.marks(run_id)


def test_of_an_attempt_that_was_to_be_made_again(cleaning: Platform) -> None:
    run_id = cleaning.launch("waits_for_its_retry_job")
    wait_until(lambda: DagsterEventType.STEP_UP_FOR_RETRY in cleaning.events(run_id), "the retry is due")
    assert cleaning.launcher.terminate(run_id)
    assert cleaning.finished(run_id) is CANCELED
    assert "ofattempt1" in cleaning.marked(run_id, "undo")
    assert cleaning.mark_counts(run_id)["started"] == 1


def test_nothing_of_it_when_nobody_cancels(cleaning: Platform) -> None:
    run_id = cleaning.launch("uploads_job", seconds=0)
    assert cleaning.finished(run_id) is SUCCESS
    assert cleaning.mark_counts(run_id)["undo"] == 0
    assert not {Stage.CLEANUP_BEGAN, Stage.CLEANUP} & set(cleaning.stages(run_id))
    # Forgotten once the success is on record, not before: were that write to fail, the state would be needed.
    wait_until(lambda: not [key for key in kept_states(cleaning) if run_id in key], "its state is forgotten")


@pytest.mark.parametrize("job", ["processes_job", "steps_job"])
def test_of_steps_in_processes_and_on_workers_of_their_own(cleaning: Platform, job: str) -> None:
    run_id = terminated(cleaning, job, started=3 if job == "steps_job" else 2)
    counts = cleaning.mark_counts(run_id)
    assert (counts["undo"], counts["job-undone"]) == (3 if job == "steps_job" else 2, 1), "\n".join(
        [*cleaning.story(run_id), *cleaning.marks(run_id)]
    )
    assert "uploads:{'upload_id':'u-1'}" in cleaning.marked(run_id, "job-undone")
    assert cleaning.marked(run_id, "looked") == "None True True"
    interrupted = cleaning.marked(run_id, "interrupted")
    assert interrupted == "True REQUESTED None ui", interrupted
    assert not [key for key in kept_states(cleaning) if run_id in key]


def test_of_a_step_that_had_to_be_killed(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "ignoring_steps_job", grace=1)
    assert "'upload_id':'u-3'" in cleaning.marked(run_id, "undo")


def test_of_a_run_that_was_marked_by_force(cleaning: Platform) -> None:
    run_id = cleaning.launch("uploads_job")
    cleaning.marked(run_id, "started")
    cleaning.instance.report_run_canceled(cleaning.run(run_id), "marked by force")
    wait_until(
        lambda: Stage.CLEANUP_ENDED in cleaning.stages(run_id), "it is cleaned up", seen=lambda: cleaning.story(run_id)
    )
    assert "u-1" in cleaning.marked(run_id, "undo")
    assert cleaning.status(run_id) is CANCELED


@pytest.mark.parametrize("forced", [False, True], ids=["terminated", "forced"])
def test_by_another_worker_when_the_first_was_killed(endpoint: str, forced: bool) -> None:
    with open_platform(endpoint) as platform:
        platform.jobs = CLEANUP_JOBS
        with platform.worker("-n", "dies") as dies:
            run_id = platform.launch("uploads_job")
            platform.marked(run_id, "started")
            os.kill(dies.pid, signal.SIGKILL)
            dies.process.wait(10)
        if forced:
            platform.instance.report_run_canceled(platform.run(run_id), "marked by force")
        else:
            assert platform.launcher.terminate(run_id)
        with platform.worker("-n", "heir"):
            assert platform.finished(run_id, within=90) is CANCELED, platform.story(run_id)
            wait_until(
                lambda: Stage.CLEANUP_ENDED in platform.stages(run_id),
                "cleaned up",
                within=90,
                seen=lambda: platform.story(run_id),
            )
        assert "'upload_id':'u-1'" in platform.marked(run_id, "undo")
        assert platform.mark_counts(run_id)["undo"] == 1
        assert any("cleaning up on worker heir-" in line for line in platform.story(run_id))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_worker_ends_in_the_middle_of_a_cleanup(endpoint: str, how: signal.Signals) -> None:
    with open_platform(endpoint, source={"drain_seconds": 0}) as platform:
        platform.jobs = CLEANUP_JOBS
        with platform.worker("-n", "dies") as dies:
            run_id = platform.launch("slow_to_clean_job", tags={"slow": "6"})
            platform.marked(run_id, "started")
            assert platform.launcher.terminate(run_id)
            platform.marked(run_id, "slow-begin")
            dies.stop(how)
        assert platform.status(run_id) is DagsterRunStatus.CANCELING
        with platform.worker("-n", "heir"):
            assert platform.finished(run_id, within=90) is CANCELED, platform.story(run_id)
        counts = platform.mark_counts(run_id)
        assert (counts["slow-begin"], counts["slow-end"]) == (2, 1), platform.marks(run_id)
        assert any('cleanup "slow" succeeded (attempt 1' in line for line in platform.story(run_id))


def test_it_is_made_up_for_by_hand(cleaning: Platform) -> None:
    run_id = terminated(cleaning, "can_be_mended_job", expected=FAILURE)
    again = cleaning.command("run", "cleanup", run_id)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == (
        "Error: cleanup failed: fails_until_mended of can_be_mended: RuntimeError: the bucket is not mended"
    )
    assert cleaning.status(run_id) is FAILURE
    Path(f"{cleaning.run(run_id).tags['marks']}-mended").touch()
    mended = cleaning.command("run", "cleanup", run_id)
    assert mended.returncode == 0, mended
    assert "fails_until_mended of can_be_mended, attempt 1, 30 s at most" in mended.stdout
    assert mended.stdout.splitlines()[-1] == f"{run_id}: cleaned up"
    assert cleaning.status(run_id) is CANCELED
    assert cleaning.mark_counts(run_id)["tried"] == 3
    once_more = cleaning.command("run", "cleanup", run_id)
    assert once_more.stdout == f"{run_id}: nothing to clean up\n", once_more
    assert cleaning.mark_counts(run_id)["tried"] == 3


def test_a_run_is_cancelled_from_the_command_line(cleaning: Platform) -> None:
    run_id = cleaning.launch("uploads_job")
    cleaning.wait_started(run_id, 1)
    refused = cleaning.command("run", "cleanup", run_id)
    assert refused.returncode == 1
    assert f"run {run_id} is STARTED, and worker w-" in refused.stderr
    asked = cleaning.command("run", "cancel", run_id, "--reason", "wrong file")
    assert asked.returncode == 0, asked
    assert asked.stdout.startswith(f"{run_id}: asked to stop, it is CANCEL")
    assert cleaning.finished(run_id) is CANCELED
    user = f"{getpass.getuser()}@{socket.gethostname()}"
    assert cleaning.marked(run_id, "told") == f"reason=wrong_file by={user}"
    late = cleaning.command("run", "cancel", run_id)
    assert (late.returncode, late.stdout) == (1, f"{run_id}: nothing to stop, it is CANCELED\n")
    unknown = cleaning.command("run", "cancel", "no-such-run")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("no-such-run: there is no run no-such-run in this Dagster instance;"), unknown
