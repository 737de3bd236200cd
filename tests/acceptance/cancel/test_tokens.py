"""`cancellation_token()` in ops, where a cancellation can really happen: what it tells, holds off and sets going."""

import os
import signal
from dataclasses import replace

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from tests.acceptance.cleanup.test_handlers import terminated
from tests.acceptance.conftest import open_platform
from tests.support.moto import sqs_client
from tests.support.platform import CLEANUP_JOBS, FOREIGN_JOBS, STATE_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq import cancel_run
from dagster_taskiq.queue_names import cancel_queue_url
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

CANCELED = DagsterRunStatus.CANCELED


@pytest.fixture
def tokens(working: Platform) -> Platform:
    return replace(working, jobs=CLEANUP_JOBS)


def cancelled(platform: Platform, job: str) -> str:
    run_id = platform.launch(job)
    platform.wait_started(run_id, {"processes_job": 2, "steps_job": 3, "in_forked_processes_job": 2}.get(job, 1))
    assert cancel_run(run_id, reason="wrong input", requested_by="ada", instance=platform.instance)
    assert platform.finished(run_id) is CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    return run_id


def test_a_coroutine_gets_a_cancelled_error_and_may_await_in_its_cleanup(tokens: Platform) -> None:
    run_id = terminated(tokens, "a_coroutine_job")
    names = [mark.split()[0] for mark in tokens.marks(run_id)]
    assert names[:5] == ["started", "CancelledError", "awaited-in-cleanup", "finally", "undo"], tokens.marks(run_id)
    assert tokens.marked(run_id, "CancelledError") == "True"
    failures = [
        entry.dagster_event for entry in tokens.instance.all_logs(run_id, of_type=DagsterEventType.STEP_FAILURE)
    ]
    assert [str(event.step_failure_data.error_source) for event in failures if event] == ["ErrorSource.INTERRUPT"]


def test_a_coroutine_in_a_process_of_dagsters_own_does_too(tokens: Platform) -> None:
    run_id = terminated(tokens, "coroutine_processes_job")
    assert tokens.mark_counts(run_id)["CancelledError"] == 1, tokens.marks(run_id)
    assert tokens.mark_counts(run_id)["undo"] == 1


def test_a_thread_sees_it(tokens: Platform) -> None:
    run_id = cancelled(tokens, "looks_at_its_token_job")
    assert tokens.marked(run_id, "looked") == "wrong input True True"


def test_a_callback_frees_what_is_blocked(tokens: Platform) -> None:
    run_id = cancelled(tokens, "is_called_back_job")
    marks = [mark.partition(" ")[0] for mark in tokens.marks(run_id)]
    assert marks == ["started", "called-back", "opened"], tokens.marks(run_id)
    assert tokens.marked(run_id, "called-back") == "False"
    assert Stage.KILLED not in tokens.stages(run_id)


def test_an_interrupt_waits_outside_of_a_shield(tokens: Platform) -> None:
    run_id = cancelled(tokens, "safe_point_job")
    assert [mark.split()[0] for mark in tokens.marks(run_id)] == ["started", "completed", "OpCancelled"]
    assert tokens.marked(run_id, "OpCancelled") == "wrong input"


OF_FIRST = {"hooked", "own", "own-again", "saved", "threaded", "threaded-meanwhile"}
OF_SECOND = {"loaded", "threaded-too"}
OF_BOTH = {"given-back", "made"}


@pytest.mark.parametrize(
    ("job", "of_first", "of_second"),
    [
        ("in_one_process_job", OF_FIRST | {"late-by-its-own-token"}, OF_SECOND),
        ("in_processes_job", OF_FIRST | OF_BOTH, OF_SECOND | OF_BOTH),
        ("in_forked_processes_job", OF_FIRST | OF_BOTH, OF_SECOND | OF_BOTH),
        ("on_workers_job", {"nothing"}, OF_SECOND | OF_BOTH),  # the state of a step that has succeeded is deleted
    ],
)
def test_a_state_is_kept_for_the_step_that_is_at_work_or_refused(
    working: Platform, job: str, of_first: set[str], of_second: set[str]
) -> None:
    """By threads that ask first, resources, hooks and I/O managers."""
    platform = replace(working, jobs=STATE_JOBS)
    run_id = cancelled(platform, job)
    kept = {
        step: set(platform.marked(run_id, f"state-of-{step}").split()[0].split(",")) for step in ("first", "second")
    }
    assert kept == {"first": of_first, "second": of_second}, platform.marks(run_id)
    interrupted = [mark for mark in platform.marks(run_id) if mark.startswith("interrupted")]
    told = {" ".join(mark.split()[1:3]) for mark in interrupted}
    assert (told, len(interrupted)) == ({"REQUESTED ada"}, 2 if job == "in_forked_processes_job" else 1)
    if job == "in_one_process_job":
        for name in ("made", "given-back", "late"):
            refusal = platform.marked(run_id, name)
            assert refusal.startswith("refused: "), platform.marks(run_id)
            assert "call cancellation_token() in the op, and pass the token on" in refusal


def test_a_shield_holds_also_where_a_thread_was_the_first_to_ask(working: Platform) -> None:
    """In a process of Dagster's own, which joins when it is first asked; only its main thread can catch signals."""
    platform = replace(working, jobs=FOREIGN_JOBS)
    run_id = platform.launch("asks_first_in_a_thread_job", grace=40)
    platform.marked(run_id, "started")
    assert cancel_run(run_id, instance=platform.instance)
    assert platform.finished(run_id) is CANCELED, platform.story(run_id)
    assert platform.mark_counts(run_id)["whole"] == 1, platform.marks(run_id)


def test_it_raises(tokens: Platform) -> None:
    run_id = cancelled(tokens, "raises_if_cancelled_job")
    assert tokens.marked(run_id, "OpCancelled") == "wrong input"
    failures = [
        entry.dagster_event for entry in tokens.instance.all_logs(run_id, of_type=DagsterEventType.STEP_FAILURE)
    ]
    assert "OpCancelled" in str(failures[0])


@pytest.mark.parametrize("job", ["uploads_job", "processes_job", "steps_job"])
def test_reason_and_author_from_end_to_end(tokens: Platform, job: str) -> None:
    run_id = cancelled(tokens, job)
    assert tokens.marked(run_id, "interrupted") == "True REQUESTED wrong input ada"
    assert tokens.marked(run_id, "told") == "reason=wrong_input by=ada"
    assert tokens.run(run_id).tags[CANCEL_REASON_TAG] == "wrong input"
    for stage in (Stage.REQUESTED, Stage.REACHED):
        facts = tokens.wait_for_stage(run_id, stage)
        assert "wrong input" in facts, facts
        assert "ada" in facts, facts
    for text in ("Requested Taskiq task cancellation. By ada: wrong input", "canceled. By ada: wrong input"):
        assert any(text in line for line in tokens.story(run_id)), tokens.story(run_id)
    told = tokens.failure(run_id, "uploads")
    assert told.startswith("stopped: run terminated by ada: wrong input\n"), told
    assert "in work\n    time.sleep(config.seconds)" in told, told


def test_the_reason_of_a_mere_message(tokens: Platform) -> None:
    run_id = tokens.launch("uploads_job")
    tokens.wait_started(run_id, 1)
    body = f'{{"task_id": "{tokens.task_id(run_id)}", "reason": "by hand", "requested_by": "bob"}}'
    sqs_client(tokens.endpoint_url).send_message(QueueUrl=cancel_queue_url(tokens.queue_url), MessageBody=body)
    assert tokens.finished(run_id) is CANCELED
    assert tokens.run(run_id).tags[CANCEL_REASON_TAG] == "by hand"
    assert tokens.marked(run_id, "told") == "reason=by_hand by=bob"


def test_the_reason_when_the_message_is_lost(endpoint: str) -> None:
    from tests.support.proxy import sqs_proxy

    with sqs_proxy(endpoint) as proxy, open_platform(proxy.url) as platform, platform.worker("-n", "w"):
        platform.jobs = CLEANUP_JOBS
        proxy.fail_with(500, queue="-cancels", action="SendMessage")
        run_id = cancelled(platform, "uploads_job")
        assert platform.marked(run_id, "interrupted") == "True REQUESTED wrong input ada"


def test_the_reason_of_a_run_that_nobody_has_begun(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        platform.jobs = CLEANUP_JOBS
        run_id = platform.launch("uploads_job")
        assert cancel_run(run_id, reason="not needed", requested_by="ada", instance=platform.instance)
        assert platform.status(run_id) is CANCELED
        assert platform.run(run_id).tags[CANCEL_REASON_TAG] == "not needed"
        assert "ada" in platform.wait_for_stage(run_id, Stage.REQUESTED)


def test_the_reason_of_a_run_in_dagsters_own_queue(endpoint: str) -> None:
    queued = {"run_coordinator": {"module": "dagster._core.run_coordinator", "class": "QueuedRunCoordinator"}}
    with open_platform(endpoint, extra=queued) as platform:
        platform.jobs = CLEANUP_JOBS
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("nowhere"), "repository")
        run = platform.create("uploads_job", remote_job_origin=RemoteJobOrigin(repository, "uploads_job"))
        platform.report(run, DagsterEventType.PIPELINE_ENQUEUED)
        assert platform.status(run.run_id) is DagsterRunStatus.QUEUED
        assert cancel_run(run.run_id, reason="not needed", requested_by="ada", instance=platform.instance)
        assert platform.status(run.run_id) is CANCELED
        assert platform.run(run.run_id).tags[CANCEL_REASON_TAG] == "not needed"
        assert "ada" in platform.wait_for_stage(run.run_id, Stage.REQUESTED)


def test_a_shutdown_is_told_as_one(endpoint: str) -> None:
    monitoring = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 1}}
    source = {"drain_seconds": 0}
    with open_platform(endpoint, extra=monitoring, source=source) as platform:
        platform.jobs = CLEANUP_JOBS
        with platform.worker("-n", "stops") as stops:
            run_id = platform.launch("uploads_job", seconds=30)
            platform.wait_started(run_id, 1)
            stops.stop()
        assert platform.marked(run_id, "interrupted").startswith("True SHUTDOWN None")
        assert platform.failure(run_id, "uploads").startswith("stopped: the worker stops\n")
        # The work goes on elsewhere; what an earlier attempt has kept is there when it is cancelled then.
        with platform.worker("-n", "heir"):
            wait_until(lambda: platform.mark_counts(run_id)["started"] == 2, "it is resumed", within=60)
            assert platform.mark_counts(run_id)["undo"] == 0
            assert platform.launcher.terminate(run_id)
            assert platform.finished(run_id) is CANCELED
        assert platform.mark_counts(run_id)["undo"] == 1


def test_a_signal_from_elsewhere_is_no_cancellation(tokens: Platform) -> None:
    run_id = tokens.launch("uploads_job")
    os.kill(int(tokens.marked(run_id, "started")), signal.SIGTERM)
    assert tokens.finished(run_id) is DagsterRunStatus.FAILURE
    assert tokens.marked(run_id, "interrupted").startswith("True SHUTDOWN None")
    assert tokens.failure(run_id, "uploads").startswith("stopped: a signal came that its worker has not sent\n")
    assert tokens.mark_counts(run_id)["undo"] == 0
