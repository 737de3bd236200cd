"""Whatever an op does, Terminate stops it: CANCELED, nothing alive, clean-up to its end."""

import re
import signal
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.support.platform import FOREIGN_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq import cancel_run
from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

POLITE = ["sleepy_job", "busy_job", "retried_job", "holds_a_transaction_job"]
LEAVES_PROCESSES = {
    "runs_a_subprocess_job": "subprocess",
    "double_forks_a_daemon_job": "daemon",
    "has_a_setsid_grandchild_job": "grandchild",
}
STUBBORN = ["blocked_in_c_job", "carries_on_job"]


def terminate(platform: Platform, run_id: str) -> None:
    assert platform.launcher.terminate(run_id) is True
    assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    events = Counter(platform.events(run_id))
    assert events[DagsterEventType.RUN_CANCELED] == 1, "\n".join(
        f"{entry.timestamp:.3f} {entry.dagster_event.event_type_value if entry.dagster_event else ''} {entry.message}"
        for entry in platform.instance.all_logs(run_id)
    )
    assert not events[DagsterEventType.RUN_FAILURE]
    assert not events[DagsterEventType.RUN_SUCCESS]


@pytest.mark.parametrize("job", POLITE)
def test_a_polite_op_is_interrupted_and_cleans_up_exactly_once(working: Platform, job: str) -> None:
    run_id = working.launch(job)
    working.marked(run_id, "started")
    terminate(working, run_id)
    marks = Counter(working.marks(run_id))
    assert marks["cleanup-begin"] == marks["cleanup-end"] == 1, marks
    assert Stage.KILLED not in working.stages(run_id)


def test_a_terminated_run_tells_its_story_in_order(working: Platform) -> None:
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    terminate(working, run_id)
    story = [Stage.REACHED, Stage.INTERRUPTING, Stage.TREE_GONE]
    assert [stage for stage in working.stages(run_id) if stage in story] == story
    told = "\n".join(working.story(run_id))
    assert "picked up by worker w-" in told
    assert "Requested Taskiq task cancellation." in told
    assert told.index("process tree gone") < told.index("PIPELINE_CANCELED")


@pytest.mark.parametrize("how_late", [Stage.TREE_GONE, DagsterRunStatus.CANCELED])
def test_a_launcher_that_is_slower_than_the_worker_changes_nothing(
    working: Platform, monkeypatch: pytest.MonkeyPatch, how_late: Stage | DagsterRunStatus
) -> None:
    """The cancel message is sent before CANCELING is written, and a database may be slow."""
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    report = working.instance.report_run_canceling

    def late(*args: Any, **kwargs: Any) -> None:
        wait_until(
            lambda: how_late in working.stages(run_id) or working.status(run_id) is how_late,
            f"run {run_id} is {how_late}",
            seen=lambda: working.story(run_id),
        )
        report(*args, **kwargs)

    monkeypatch.setattr(working.instance, "report_run_canceling", late)
    assert working.launcher.terminate(run_id) is True
    assert working.finished(run_id) is DagsterRunStatus.CANCELED
    events = [event for event in working.events(run_id) if event.value.startswith("PIPELINE_CANCEL")]
    canceling, canceled = DagsterEventType.RUN_CANCELING, DagsterEventType.RUN_CANCELED
    expected = [canceling, canceled]
    assert events == (expected[::-1] if how_late is DagsterRunStatus.CANCELED else expected), "it has one end"


def test_an_open_transaction_is_rolled_back(working: Platform) -> None:
    run_id = working.launch("holds_a_transaction_job")
    working.marked(run_id, "started")
    terminate(working, run_id)
    database = Path(working.run(run_id).tags["marks"].replace("marks-", "database-"))
    connection = sqlite3.connect(database)
    assert connection.execute("SELECT count(*) FROM rows").fetchone() == (0,)
    connection.close()


@pytest.mark.parametrize("job", STUBBORN)
def test_an_op_that_does_not_obey_is_killed_after_the_grace(working: Platform, job: str) -> None:
    run_id = working.launch(job, grace=0.5)
    working.marked(run_id, "started")
    terminate(working, run_id)
    assert Stage.KILLED in working.stages(run_id)
    assert "slept" not in working.marks(run_id)


@pytest.mark.parametrize(("job", "what"), LEAVES_PROCESSES.items())
def test_what_an_op_started_is_gone_with_it(working: Platform, job: str, what: str) -> None:
    run_id = working.launch(job)
    pid = int(working.marked(run_id, what))
    working.marked(run_id, "started")
    assert Path(f"/proc/{pid}").exists()
    terminate(working, run_id)
    assert not Path(f"/proc/{pid}").exists()


def test_an_op_with_a_retry_policy_is_not_tried_again(working: Platform) -> None:
    run_id = working.launch("retried_job")
    working.marked(run_id, "started")
    terminate(working, run_id)
    assert [mark.split()[0] for mark in working.marks(run_id)].count("started") == 1
    assert Stage.KILLED not in working.stages(run_id)


def test_after_a_swallowed_interrupt_no_further_step_begins(working: Platform) -> None:
    run_id = working.launch("swallows_once_job")
    working.marked(run_id, "started")
    terminate(working, run_id)
    assert "swallowed" in working.marks(run_id)
    assert "afterwards" not in working.marks(run_id)


def test_the_steps_of_a_multiprocess_run_clean_up_too(working: Platform) -> None:
    run_id = working.launch("multiprocess_job")
    working.marked(run_id, "started")
    terminate(working, run_id)
    marks = Counter(working.marks(run_id))
    assert marks["cleanup-begin"] == marks["cleanup-end"]
    assert Stage.KILLED not in working.stages(run_id)


@pytest.mark.parametrize("job", ["in_process", "in_processes", "in_forked_processes", "coroutine"])
def test_the_failure_of_the_step_says_who_has_stopped_it_and_where_it_was(working: Platform, job: str) -> None:
    """By the job's own code alone: none of Dagster's frames, none of ours."""
    platform = replace(working, jobs=FOREIGN_JOBS)
    run_id = platform.launch(job)
    platform.marked(run_id, "started")
    assert cancel_run(run_id, reason="wrong input file", requested_by="ada", instance=platform.instance)
    assert platform.finished(run_id) is DagsterRunStatus.CANCELED
    op = "loads_later" if job == "coroutine" else "loads"
    told = platform.failure(run_id, op)
    assert told.startswith("stopped: run terminated by ada: wrong input file\n"), told
    files = {Path(file).name for file in re.findall(r'File "(.+?)", line', told)} - {"tasks.py"}  # of asyncio
    assert files == {FOREIGN_JOBS.name}, told
    assert "    await asyncio.sleep(300)" in told or "    time.sleep(300)" in told, told
    assert ("ConnectionError: it does not answer" in told) == (op == "loads"), told


def test_a_second_click_changes_nothing(working: Platform) -> None:
    run_id = working.launch("carries_on_job", grace=1)
    working.marked(run_id, "started")
    assert working.launcher.terminate(run_id)
    working.marked(run_id, "swallowed")
    assert working.launcher.terminate(run_id)
    terminate(working, run_id)
    assert working.marks(run_id).count("swallowed") == 1, "interrupted more than once"


def test_a_killed_run_gives_its_pool_slots_back(working: Platform) -> None:
    storage = working.instance.event_log_storage
    storage.set_concurrency_slots("scarce", 1)
    run_id = working.launch("holds_a_pool_slot_job", grace=0.3)
    working.marked(run_id, "started")
    assert storage.get_concurrency_info("scarce").active_run_ids == {run_id}
    terminate(working, run_id)
    assert Stage.KILLED in working.stages(run_id)
    assert not storage.get_concurrency_info("scarce").active_run_ids
    again = working.launch("holds_a_pool_slot_job", seconds=0)
    assert working.finished(again) is DagsterRunStatus.SUCCESS


def test_a_signal_that_nobody_announced_is_an_interruption_not_a_cancellation(working: Platform) -> None:
    run_id = working.launch("sleepy_job")
    pid = int(working.marked(run_id, "started"))
    working.kill(pid, signal.SIGTERM)
    assert working.finished(run_id) is DagsterRunStatus.FAILURE
    assert "No user initiated termination request was found" in "\n".join(working.story(run_id))
    assert Counter(working.marks(run_id))["cleanup-end"] == 1
    working.assert_nothing_left(run_id)


def test_a_process_that_a_run_leaves_behind_is_killed_and_named(working: Platform) -> None:
    run_id = working.launch("leaves_a_daemon_job")
    pid = int(working.marked(run_id, "daemon"))
    assert working.finished(run_id) is DagsterRunStatus.SUCCESS
    told = working.wait_for_stage(run_id, Stage.LEFT_BEHIND)
    assert str(pid) in told
    assert not Path(f"/proc/{pid}").exists()


def test_a_child_that_dies_makes_the_run_fail_with_the_reason(working: Platform) -> None:
    run_id = working.launch("dies_job")
    assert working.finished(run_id) is DagsterRunStatus.FAILURE
    assert "exit code 17" in "\n".join(working.story(run_id))


def test_a_child_that_is_killed_makes_the_run_fail_with_the_reason(working: Platform) -> None:
    run_id = working.launch("sleepy_job")
    pid = int(working.marked(run_id, "started"))
    working.kill(pid)
    assert working.finished(run_id) is DagsterRunStatus.FAILURE
    assert "killed by SIGKILL, likely out of memory" in "\n".join(working.story(run_id))


def test_a_job_that_fails_by_itself_is_a_failure(working: Platform) -> None:
    run_id = working.launch("fails_job")
    assert working.finished(run_id) is DagsterRunStatus.FAILURE
    assert "as it should" in str(working.instance.all_logs(run_id))
