"""`dagster-taskiq run explain`: the stories of real runs, as an operator reads them, afterwards and meanwhile."""

import json
import signal
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus
from tests.acceptance.cancel.test_truth_table import (
    canceling,
    finished,
    never_launched_by_us,
    started,
    started_owner_dead,
    starting_claimed,
    starting_not_claimed,
)
from tests.acceptance.conftest import open_platform
from tests.acceptance.operator.test_coordinator import beat, queued, submit
from tests.support.moto import sqs_client
from tests.support.platform import CLEANUP_JOBS, Platform
from tests.support.run_logs import record, replay
from tests.support.waiting import wait_until

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.story.gather import story_of
from dagster_taskiq.story.model import Story

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


def told(story: Story) -> str:
    return "\n".join([*story.summary, *(f"{wait.what}: {wait.advice}" for wait in story.waits), *story.advice])


def explained(platform: Platform, run_id: str, *arguments: str) -> str:
    ended = platform.command("run", "explain", run_id, *arguments)
    assert ended.returncode == 0, ended
    return ended.stdout


def test_a_run_that_was_cancelled(working: Platform, tmp_path: Path) -> None:
    run_id = working.launch("sleepy_job")
    working.marked(run_id, "started")
    working.launcher.cancel(run_id, reason="wrong <script>alert(1)</script> file", requested_by="ada@host")
    assert working.finished(run_id) is DagsterRunStatus.CANCELED
    said = explained(working, run_id[:8])
    for words in (
        "CANCELED",
        "Cancelled by ada@host",
        "Cancellation reached worker w-",
        "SIGTERM to pid",
        "1 cancelled",
    ):
        assert words in said, said
    page, picture = tmp_path / "run.html", tmp_path / "run.svg"
    assert explained(working, run_id, "--html", str(page), "--svg", str(picture)).count("written: ") == 2
    assert "<script" not in page.read_text()
    assert ET.parse(picture).getroot().tag.endswith("svg")  # noqa: S314 - our own
    told_to_programs = json.loads(explained(working, run_id, "--json"))
    assert told_to_programs["status"] == "CANCELED"
    assert [bar["outcome"] for bar in told_to_programs["bars"] if bar["kind"] == "step"] == ["cancelled"]


def test_an_op_that_ignores_its_signal_and_one_that_is_killed_by_the_system(working: Platform) -> None:
    stubborn, killed = working.launch("carries_on_job", grace=1), working.launch("sleepy_job")
    working.kill(int(working.marked(killed, "started")))
    working.marked(stubborn, "started")
    working.launcher.terminate(stubborn)
    working.finished(stubborn)
    working.finished(killed)
    said = explained(working, stubborn)
    assert "It ignored SIGTERM: pid" in said, said
    assert "killed" in said
    said = " ".join(explained(working, killed).split())
    assert "was killed by SIGKILL, likely out of memory" in said, said
    assert "Look at the memory of the worker's container" in said


def test_a_dead_worker_and_a_run_without_one(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        with platform.worker("-n", "first") as worker:
            lost = platform.launch("sleepy_job")
            platform.marked(lost, "started")
            meanwhile = story_of(platform.instance, lost)
            assert (meanwhile.waits, meanwhile.status) == ((), "STARTED"), told(meanwhile)
            worker.process.send_signal(signal.SIGKILL)
            worker.process.wait(20)
        wait_until(lambda: not platform.processes(lost), "its processes are gone")
        waiting = platform.launch("quick_job")
        wait_until(
            lambda: "its worker first-" in told(story_of(platform.instance, lost)),
            "it waits for another worker",
            seen=lambda: told(story_of(platform.instance, lost)),
        )
        assert "no worker is alive to do it" in told(story_of(platform.instance, lost))
        said = explained(platform, waiting)
        assert "no worker that takes runs is alive" in said, said
        assert "dagster-taskiq worker start" in said
        with platform.worker("-n", "second"):
            assert platform.finished(lost) is DagsterRunStatus.FAILURE
            platform.finished(waiting)
        record(platform.instance, lost, "worker_dead")
        said = explained(platform, lost)
        assert "first-" in said
        assert "max_resume_run_attempts" in said, said


@pytest.mark.parametrize(
    ("run_is", "says", "terminated"),
    [
        (finished, "", ""),
        (never_launched_by_us, "it was not sent to a queue yet", "Taskiq task ID missing"),
        (starting_not_claimed, "no worker that takes runs is alive", "Cancelled by somebody"),
        (starting_claimed, "worker some-worker-1 starts it", "reach worker some-worker-1"),
        (started, "", "the cancellation to reach worker some-worker-1"),
        (canceling, "the cancellation to reach worker some-worker-1", "the cancellation to reach worker some-worker-1"),
        (started_owner_dead, "its worker some-worker-1 is dead", "its worker some-worker-1 is dead"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_run_of_each_row_of_the_table(
    platform: Platform, run_is: Callable[[Platform], str], says: str, terminated: str
) -> None:
    run_id = run_is(platform)
    assert says in told(story_of(platform.instance, run_id))
    platform.launcher.terminate(run_id)
    assert terminated in told(story_of(platform.instance, run_id))


def test_a_run_in_dagsters_queue(endpoint: str) -> None:
    """The limits that Dagster's own daemon would hit."""
    limit = [{"key": "team", "limit": 1}]
    with queued(endpoint, 1, tag_concurrency_limits=limit) as platform:
        first, other = submit(platform, {"team": "a"}), submit(platform, {"dagster/priority": "9"})

        def look(run_id: str) -> str:
            return told(story_of(platform.instance, run_id))

        assert "has never run here" in look(first)
        assert "2 runs are taken before it" in look(first), look(first)
        assert "are taken before it" not in look(other)
        platform.launch("quick_job", tags={"team": "a"})
        assert "the limit 1 of tag team" in look(first), look(first)
        assert "no worker that takes runs is alive" in look(other), look(other)
        beat(platform.instance, "a", 8)
        assert "no worker" not in look(other), look(other)
        assert platform.instance.run_coordinator.cancel_run(other)
        assert story_of(platform.instance, other).status == "CANCELED"


def test_what_cannot_be_explained_is_one_line(platform: Platform) -> None:
    for given in ("11111111-2222-3333-4444-555555555555", "11111111", "7"):
        ended = platform.command("run", "explain", given)
        assert (ended.returncode, ended.stdout) == (1, ""), ended
        (line,) = [line for line in ended.stderr.splitlines() if "Error" in line]
        assert "there is no run" in line
    deleted = started(platform)
    platform.instance.delete_run(deleted)
    ended = platform.command("run", "explain", deleted)
    assert ended.returncode == 1
    assert "was deleted; worker some-worker-1 has had it" in ended.stderr
    run = platform.create("quick_job")
    platform.report(run, DagsterEventType.RUN_START)
    with pytest.raises(DagsterTaskiqError, match="was not launched by TaskiqRunLauncher"):
        story_of(platform.instance, run.run_id)
    with DagsterInstance.ephemeral() as other, pytest.raises(DagsterTaskiqError, match="the run launcher of this"):
        story_of(other, run.run_id)


def test_the_message_of_a_run_is_gone(platform: Platform) -> None:
    run_id = platform.launch("quick_job")
    sqs_client(platform.endpoint_url).purge_queue(QueueUrl=platform.queue_url)
    assert "its message is gone: the queue is empty" in explained(platform, run_id)


@pytest.mark.nightly
def test_logs_for_the_unit_tests(working: Platform, working_steps: Platform) -> None:
    """The runs whose logs the unit tests replay; see `tests/support/run_logs.py`."""
    ask: Any = {"requested_by": "ada@host", "reason": "wrong <b>input</b> file"}

    def tell(platform: Platform, name: str, job: str, steps: int = 0, **options: Any) -> None:
        run_id = platform.launch(job, **options)
        if steps:
            platform.wait_started(run_id, steps)
            platform.launcher.cancel(run_id, **ask)
        platform.finished(run_id)
        record(platform.instance, run_id, name)
        assert story_of(platform.instance, run_id).waits == ()

    tell(working, "cancelled", "sleepy_job", 1)
    tell(working, "killed", "carries_on_job", 1, grace=1)
    tell(working, "succeeded", "quick_job")
    tell(working, "failed", "fails_job")
    tell(working, "processes_cancelled", "multiprocess_job", 2)
    killed = working.launch("sleepy_job")
    working.kill(int(working.marked(killed, "started")))
    working.finished(killed)
    record(working.instance, killed, "out_of_memory")
    ask["reason"] = "wrong day"
    working.jobs, jobs = CLEANUP_JOBS, working.jobs
    try:
        tell(working, "cleaned_up", "many_handlers_job", 1)
        tell(working, "not_cleaned_up", "cannot_be_cleaned_up_job", 1)
    finally:
        working.jobs = jobs
    tell(working_steps, "steps_cancelled", "two_steps", 2)
    tell(working_steps, "steps_succeeded", "dynamic_steps", seconds=0.1)


@pytest.mark.postgres
def test_it_reads_the_same_in_postgresql(endpoint: str, postgres: str) -> None:
    """The columns of the table of events, and their times; also of half of a log."""
    with open_platform(endpoint, extra={"storage": {"postgres": {"postgres_url": postgres}}}) as platform:
        run = replay(platform.instance, "not_cleaned_up")
        story = story_of(platform.instance, run.run_id)
        bars = {bar.label: bar for bar in story.bars}
        assert bars["cannot_be_cleaned_up"].outcome.value == "cancelled"
        assert story.ended is not None
        assert 0 < bars["cannot_be_cleaned_up"].began - story.created < story.ended - story.created < 60
        assert story.events == len(platform.instance.all_logs(run.run_id))
        half = replay(platform.instance, "steps_cancelled", until=20)
        assert [bar.ended for bar in story_of(platform.instance, half.run_id).bars if bar.kind.value == "step"]
