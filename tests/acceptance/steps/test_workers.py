"""Steps on workers that serve one queue or both, that die, that are stopped, and that get messages twice."""

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import PythonFileTarget
from tests.acceptance.conftest import steps_platform
from tests.support.moto import aws_client
from tests.support.platform import STEP_JOBS, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.executor import SQSStepHandler
from dagster_taskiq.messages import StepMessage, pack
from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

MONITORING: dict[str, Any] = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 2}}
NO_STATE: dict[str, Any] = {"attempts": {}, "mappings": {}, "outputs": []}


def bodies(platform: Platform, run_id: str) -> Counter[str]:
    """How often the body of each step has begun, by its key."""
    marks = [mark.split() for mark in platform.marks(run_id)]
    return Counter(mark[1] for mark in marks if mark[0] == "started")


def test_runs_that_wait_for_steps_never_take_the_steps_slots(endpoint: str) -> None:
    """One worker, one slot for steps, more runs than slots for runs: all finish."""
    with steps_platform(endpoint) as platform, platform.worker("--max-runs", "2", "--max-steps", "1"):
        runs = [platform.launch("two_steps", seconds=0) for _ in range(5)]
        for run_id in runs:
            assert platform.finished(run_id, within=90) is DagsterRunStatus.SUCCESS, platform.story(run_id)
            assert platform.mark_counts(run_id)["slept"] == 2
            assert platform.mark_counts(run_id)["afterwards"] == 1


def test_split_fleets(endpoint: str) -> None:
    with steps_platform(endpoint) as platform, ExitStack() as stack:
        runs_worker = stack.enter_context(platform.worker("-n", "runs", "--runs-only", ready=False))
        steps_worker = stack.enter_context(platform.worker("-n", "steps", "--steps-only", ready=False))
        runs_worker.wait_ready()
        steps_worker.wait_ready()
        run_id = platform.launch("two_steps", seconds=0)
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        workers = {
            facts["dagster-taskiq/worker"].split("-")[0] for facts in platform.step_notes(run_id, Stage.PICKED_UP)
        }
        assert workers == {"steps"}
        assert any("picked up by worker runs-" in line for line in platform.story(run_id))


@pytest.mark.parametrize("job", ["sleepy_steps", "tried_again_steps"])
def test_a_steps_worker_is_killed(endpoint: str, job: str) -> None:
    """The step fails with a reason that names the worker, or is tried again where its op says so."""
    with steps_platform(endpoint) as platform, platform.worker("-n", "runs", "--runs-only"):
        with platform.worker("-n", "doomed", "--steps-only") as doomed:
            run_id = platform.launch(job)
            platform.wait_started(run_id, 1)
            (task_id,) = platform.step_tasks(run_id)
            doomed.process.kill()
            doomed.process.wait(10)
        with platform.worker("-n", "other", "--steps-only"):
            expected = DagsterRunStatus.FAILURE if job == "sleepy_steps" else DagsterRunStatus.SUCCESS
            assert platform.finished(run_id, within=60) is expected, platform.story(run_id)
        platform.assert_nothing_left(run_id)
        errors = str([entry.dagster_event for entry in platform.instance.all_logs(run_id)])
        assert "worker doomed-" in errors
        assert "is gone" in errors
        assert platform.mark_counts(run_id)["started"] == (1 if job == "sleepy_steps" else 2)
        assert platform.step_tasks(run_id)[0] == task_id


def test_a_step_whose_process_dies_fails_at_once_with_the_reason(working_steps: Platform) -> None:
    platform = working_steps
    run_id = platform.launch("dies_steps")
    assert platform.finished(run_id) is DagsterRunStatus.FAILURE, platform.story(run_id)
    (lost,) = platform.step_notes(run_id, Stage.STEP_LOST)
    assert "exit code 17" in lost["why"]
    assert "exit code 17" in str([entry.dagster_event for entry in platform.instance.all_logs(run_id)])


def test_the_runs_worker_is_killed_and_the_run_resumed(endpoint: str) -> None:
    """The steps that are at work go on meanwhile, and none of them is run twice."""
    with steps_platform(endpoint, extra=MONITORING) as platform, platform.worker("-n", "steps", "--steps-only"):
        with platform.worker("-n", "doomed", "--runs-only") as doomed:
            run_id = platform.launch("two_steps", seconds=4)
            platform.wait_started(run_id, 2)
            doomed.process.kill()
            doomed.process.wait(10)
        with platform.worker("-n", "heir", "--runs-only"):
            assert platform.finished(run_id, within=90) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert set(bodies(platform, run_id).values()) == {1}
        assert platform.mark_counts(run_id)["afterwards"] == 1
        assert any("Resuming the run" in line for line in platform.story(run_id))


def test_a_step_that_could_not_begin_while_nobody_had_its_run(endpoint: str) -> None:
    """Its process writes RESOURCE_INIT_FAILURE; the step's failure is for the run to write, once it is resumed."""
    with steps_platform(endpoint, extra=MONITORING) as platform:
        with platform.worker("-n", "doomed", "--runs-only") as doomed:
            config = {"marks": str(platform.home / "cluster"), "seconds": -1.0}
            run_id = platform.launch("cluster_steps", resources={"resources": {"cluster": {"config": config}}})
            wait_until(
                lambda: DagsterEventType.STEP_WORKER_STARTING in platform.events(run_id),
                "the step is sent",
                within=60,
                seen=lambda: platform.story(run_id),
            )
            doomed.process.kill()
            doomed.process.wait(10)
            wait_until(lambda: not platform.processes(run_id), "the orphan has ended")
        with platform.worker("-n", "steps", "--steps-only"):
            wait_until(
                lambda: platform.step_notes(run_id, Stage.TREE_GONE),
                "the step's process is gone",
                within=60,
                seen=lambda: platform.story(run_id),
            )
            assert DagsterEventType.RESOURCE_INIT_FAILURE in platform.events(run_id)
            assert DagsterEventType.STEP_FAILURE not in platform.events(run_id)
            with platform.worker("-n", "heir", "--runs-only"):
                assert platform.finished(run_id, within=60) is DagsterRunStatus.FAILURE, platform.story(run_id)
        assert platform.events(run_id).count(DagsterEventType.STEP_FAILURE) == 1
        assert "no cluster to be had" in str([entry.dagster_event for entry in platform.instance.all_logs(run_id)])
        assert len(platform.step_tasks(run_id)) == 1


def test_the_runs_worker_is_killed_without_monitoring(endpoint: str) -> None:
    """FAILURE with the reason, after the steps have been stopped."""
    with steps_platform(endpoint) as platform, platform.worker("-n", "steps", "--steps-only"):
        with platform.worker("-n", "doomed", "--runs-only") as doomed:
            run_id = platform.launch("two_steps")
            platform.wait_started(run_id, 2)
            doomed.process.kill()
            doomed.process.wait(10)
        with platform.worker("-n", "heir", "--runs-only"):
            assert platform.finished(run_id, within=90) is DagsterRunStatus.FAILURE, platform.story(run_id)
        assert platform.mark_counts(run_id)["cleanup-end"] == 2, "the steps were stopped before"
        platform.assert_nothing_left(run_id)
        assert any("worker doomed-" in line and "gone" in line for line in platform.story(run_id))


def test_the_runs_worker_is_killed_and_the_run_terminated(endpoint: str) -> None:
    """CANCELED by the next worker, after the steps have stopped."""
    with steps_platform(endpoint) as platform, platform.worker("-n", "steps", "--steps-only"):
        with platform.worker("-n", "doomed", "--runs-only") as doomed:
            run_id = platform.launch("two_steps")
            platform.wait_started(run_id, 2)
            doomed.process.kill()
            doomed.process.wait(10)
        assert platform.launcher.terminate(run_id) is True
        wait_until(lambda: platform.mark_counts(run_id)["cleanup-end"] == 2, "the status watch stops the steps")
        with platform.worker("-n", "heir", "--runs-only"):
            assert platform.finished(run_id, within=60) is DagsterRunStatus.CANCELED, platform.story(run_id)
        platform.assert_nothing_left(run_id)


def test_the_runs_own_process_is_killed(working_steps: Platform) -> None:
    """Out of memory, say: FAILURE, and its steps do not run on."""
    platform = working_steps
    run_id = platform.launch("two_steps")
    platform.wait_started(run_id, 2)
    (pid,) = [
        int(line.partition("(pid: ")[2].partition(")")[0])
        for line in platform.story(run_id)
        if "Started process for run" in line
    ]
    platform.kill(pid)
    assert platform.finished(run_id) is DagsterRunStatus.FAILURE, platform.story(run_id)
    assert platform.mark_counts(run_id)["cleanup-end"] == 2, "the steps were stopped before"
    platform.assert_nothing_left(run_id)


def test_a_worker_that_is_stopped_hands_on_what_has_not_begun_and_interrupts_the_rest(endpoint: str) -> None:
    source = {"drain_seconds": 0, "stop_timeout_seconds": 10}
    with steps_platform(endpoint, source=source) as platform, platform.worker("-n", "runs", "--runs-only"):
        with platform.worker("-n", "stopped", "--steps-only") as stopped:
            run_id = platform.launch("tried_again_steps")
            platform.wait_started(run_id, 1)
            assert stopped.stop() == 0
        with platform.worker("-n", "other", "--steps-only"):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert platform.mark_counts(run_id)["started"] == 2
        assert any("shutdown reached worker stopped-" in line for line in platform.story(run_id))


def order_of(task_id: str, run_id: str, step_key: str) -> StepMessage:
    order = StepMessage(run_id, step_key, 1, "deferred", state=pack(NO_STATE))
    assert order.task_id == task_id
    return order


@pytest.fixture
def steps_by_hand(working_steps: Platform) -> Any:
    """A run that is STARTED and whose steps the test sends itself."""
    handler = SQSStepHandler(working_steps.launcher.settings)

    def begin(job: str, **config: Any) -> tuple[DagsterRun, SQSStepHandler]:
        run = working_steps.create(job, **config)
        working_steps.report(run, DagsterEventType.RUN_START)
        return run, handler

    yield begin
    handler.close()


def test_of_messages_that_come_twice_each_step_is_run_once(working_steps: Platform, steps_by_hand: Any) -> None:
    platform = working_steps
    run, handler = steps_by_hand("fifty_steps", seconds=0.2)
    orders = [StepMessage(run.run_id, f"step_{n}", 1, "deferred", state=pack(NO_STATE)) for n in range(12)]
    for _ in range(3):
        assert handler.send(orders, "fifty_steps") == {}
    wait_until(
        lambda: platform.events(run.run_id).count(DagsterEventType.STEP_SUCCESS) == 12,
        "all steps are done",
        within=60,
        seen=lambda: platform.story(run.run_id),
    )
    wait_until(lambda: platform.waiting("-steps") == 0, "all messages are gone", within=60)
    assert set(bodies(platform, run.run_id).values()) == {1}
    assert len(bodies(platform, run.run_id)) == 12
    platform.instance.report_run_canceled(run)


def test_a_state_too_large_for_a_message_goes_over_s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with steps_platform(endpoint, source={"payload_bucket": "payloads"}) as platform:
        s3 = aws_client("s3", endpoint)
        s3.create_bucket(Bucket="payloads")

        def keys() -> list[str]:
            return [found["Key"] for found in s3.list_objects_v2(Bucket="payloads").get("Contents", [])]

        run = platform.create("sleepy_steps", seconds=0)
        platform.report(run, DagsterEventType.RUN_START)
        outputs = [["other", "result", os.urandom(16).hex()] for _ in range(60_000)]
        order = StepMessage(run.run_id, "sleepy", 1, "deferred", state=pack({**NO_STATE, "outputs": outputs}))
        assert len(order.state or "") > 1_048_576
        handler = SQSStepHandler(platform.launcher.settings)
        try:
            handler.send([order], "sleepy_steps")
        finally:
            handler.close()
        assert keys() == [f"dagster-taskiq/payloads/{order.task_id}"]
        with platform.worker("-n", "w", "--steps-only"):
            wait_until(
                lambda: DagsterEventType.STEP_SUCCESS in platform.events(run.run_id),
                "the step is done",
                within=60,
                seen=lambda: platform.story(run.run_id),
            )
            wait_until(lambda: keys() == [], "its payload is deleted")


@pytest.mark.xdist_group("crowds")
@pytest.mark.timeout(480)
@pytest.mark.parametrize("outputs", [100, pytest.param(1_000, marks=pytest.mark.nightly)])
def test_a_dynamic_fan_out_of_many(working_steps: Platform, outputs: int) -> None:
    """The known state of the last step has them all."""
    platform = working_steps
    run_id = platform.launch("many_outputs", count=outputs)
    assert platform.finished(run_id, within=400) is DagsterRunStatus.SUCCESS, platform.story(run_id)[-5:]
    assert platform.mark_counts(run_id)[f"collected-{sum(range(outputs))}"] == 1


def execute(home: Path, job: str, marks: Path, **options: Any) -> "subprocess.Popen[str]":
    config = home / "run.yaml"
    ops = {op: {"config": {"marks": str(marks), **options}} for op in ("step_0", "step_1", "afterwards")}
    config.write_text(yaml.safe_dump({"ops": ops}))
    command = [sys.executable, "-m", "dagster", "job", "execute", "-f", str(STEP_JOBS), "-j", job, "-c", str(config)]
    return subprocess.Popen(
        command,
        env=os.environ | {"DAGSTER_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_run_that_nobody_launched(working_steps: Platform, tmp_path: Path) -> None:
    """`dagster job execute`: the run's process is in a terminal, its steps are on our workers."""
    process = execute(working_steps.home, "two_steps", tmp_path / "marks", seconds=0)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out
    marks = Counter(line.split()[0] for line in (tmp_path / "marks").read_text().splitlines())
    assert marks["slept"] == 2
    assert marks["afterwards"] == 1


def test_ctrl_c_in_the_terminal_stops_the_steps(working_steps: Platform, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    process = execute(working_steps.home, "two_steps", marks)
    try:
        wait_until(
            lambda: marks.exists() and marks.read_text().count("started") == 2, "both steps are at work", within=60
        )
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert marks.read_text().count("cleanup-end") == 2, "its process ended after its steps"
    (run,) = working_steps.instance.get_runs(limit=1)
    assert run.status is DagsterRunStatus.FAILURE
    working_steps.assert_no_step_left(run.run_id)


def test_under_dagsters_own_launcher(endpoint: str) -> None:
    """The default launcher; the executor is told its queue by the environment; Terminate is Dagster's own."""
    target = PythonFileTarget(str(STEP_JOBS), None, str(STEP_JOBS.parents[2]), "steps")
    with steps_platform(endpoint) as platform, ExitStack() as stack:
        stack.enter_context(platform.worker("-n", "w"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DAGSTER_TASKIQ_SQS_QUEUE_URL", platform.queue_url)
        patch.setenv("DAGSTER_TASKIQ_SQS_ENDPOINT_URL", endpoint)
        # The same home, and so the same storage, without our launcher.
        settings = "telemetry: {enabled: false}\ncode_servers: {wait_for_local_processes_on_shutdown: true}\n"
        (platform.home / "default.yaml").write_text(settings)
        instance = stack.enter_context(DagsterInstance.from_config(str(platform.home), "default.yaml"))
        process = stack.enter_context(WorkspaceProcessContext(instance, target))
        workspace = process.create_request_context()
        repository = next(iter(workspace.get_code_location("steps").get_repositories().values()))
        origin = repository.get_full_job("two_steps").get_remote_origin()
        default = Platform(platform.home, platform.queue_url, endpoint, instance, STEP_JOBS)

        done, stopped = (default.create("two_steps", remote_job_origin=origin, seconds=seconds) for seconds in (0, 300))
        instance.launch_run(done.run_id, workspace)
        assert default.finished(done.run_id, within=60) is DagsterRunStatus.SUCCESS, default.story(done.run_id)
        instance.launch_run(stopped.run_id, workspace)
        default.wait_started(stopped.run_id, 2)
        assert instance.run_launcher.terminate(stopped.run_id)
        assert default.finished(stopped.run_id) is DagsterRunStatus.CANCELED, default.story(stopped.run_id)
        assert default.mark_counts(stopped.run_id)["cleanup-end"] == 2
        default.assert_no_step_left(stopped.run_id)


def test_the_tags_of_ops_for_celery_are_said_to_have_no_effect(working_steps: Platform) -> None:
    run_id = working_steps.launch("celery_tags_steps", seconds=0)
    assert working_steps.finished(run_id) is DagsterRunStatus.SUCCESS
    (entry,) = [e for e in working_steps.instance.all_logs(run_id) if "dagster-celery" in str(e.dagster_event)]
    assert entry.level == logging.WARNING
    message = entry.get_dagster_event().message or ""
    which = "dagster-celery/priority of 2 steps (one, other)"
    assert message.startswith(f"Without effect, because they are dagster-celery's: {which}. Instead: "), message
    assert "set dagster/priority on the op" in message
    assert "worker start -q urgent -q default" in message
