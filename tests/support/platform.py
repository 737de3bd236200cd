"""A data platform in small: a DAGSTER_HOME, queues on an emulator, workers as real processes."""

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from dagster import (
    AssetKey,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    GraphDefinition,
)
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository

from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.process.child_handle import find_processes
from dagster_taskiq.queue_names import cancel_queue_url, is_fifo, queue_name, sibling_queue
from dagster_taskiq.storage.engine_events import TASK_ID_KEY, Stage
from dagster_taskiq.storage.event_log import parse_event, read_engine_events
from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG, TASK_ID_TAG
from tests.support.moto import create_queues, sqs_client
from tests.support.waiting import wait_until
from tests.support.warm import CLI, Lines, Process, start_command, start_program

JOBS = Path(__file__).parent / "jobs.py"
STEP_JOBS = Path(__file__).parent / "step_jobs.py"
CLEANUP_JOBS = Path(__file__).parent / "cleanup_jobs.py"
FOREIGN_JOBS = Path(__file__).parent / "foreign_jobs.py"
LATE_JOBS = Path(__file__).parent / "late_jobs.py"
STATE_JOBS = Path(__file__).parent / "state_jobs.py"
STORM_JOBS = Path(__file__).parent / "storm_jobs.py"
REAL_WORKER = (*CLI, "worker", "start")
"""For a worker with an interpreter of its own, as people start it."""
ENTRYPOINT = Path(__file__).parents[2] / "worker_entrypoint.py"
FINISHED = {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED}


@dataclass
class WorkerProcess:
    """A `dagster-taskiq worker start` of the test's own."""

    process: Process
    lines: list[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> None:
        wait_until(
            lambda: any(" is ready" in line for line in self.lines) or self.process.poll() is not None,
            "worker is ready",
            within=60,
            seen=lambda: self.lines,
        )
        assert self.process.poll() is None, self.lines

    def stop(self, number: int = signal.SIGTERM, within: float = 40) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(within)

    def log(self) -> str:
        return "".join(self.lines)


@dataclass
class Platform:
    """What a test talks to. Every process that it starts is stopped by it."""

    home: Path
    queue_url: str
    endpoint_url: str
    instance: DagsterInstance
    jobs: Path = JOBS
    _marks: dict[str, Path] = field(default_factory=dict)
    """Where the ops of a run make their marks."""

    @property
    def launcher(self) -> TaskiqRunLauncher:
        launcher = self.instance.run_launcher
        assert isinstance(launcher, TaskiqRunLauncher)
        return launcher

    def create(
        self,
        job: str,
        tags: Mapping[str, str] | None = None,
        *,
        remote_job_origin: Any = None,
        resources: Mapping[str, Any] | None = None,
        assets: Sequence[AssetKey] | None = None,
        **config: Any,
    ) -> DagsterRun:
        recon = self._recon(job)
        if assets is not None:
            recon = recon.get_subset(asset_selection=frozenset(assets))
        definition = recon.get_definition()
        token = os.urandom(6).hex()
        marks = self.home / f"marks-{token}"
        if job == "holds_a_transaction_job":
            config["database"] = str(self.home / f"database-{token}")
        run_config = {"ops": _ops_config(definition.graph, {"marks": str(marks), **config}), **(resources or {})}
        return self.instance.create_run_for_job(
            definition,
            run_config=run_config,
            tags={"marks": str(marks), **(tags or {})},
            job_code_origin=recon.get_python_origin(),
            remote_job_origin=remote_job_origin,
            asset_selection=frozenset(assets) if assets is not None else None,
        )

    def _recon(self, job: str) -> ReconstructableJob:
        if job.endswith("assets_job"):  # which is put together by the definitions that it is in
            return ReconstructableRepository.for_file(str(self.jobs), "defs").get_reconstructable_job(job)
        return ReconstructableJob.for_file(str(self.jobs), job)

    def launch(
        self, job: str, *, grace: float | None = None, tags: Mapping[str, str] | None = None, **config: Any
    ) -> str:
        graced = {GRACE_SECONDS_TAG: str(grace)} if grace is not None else {}
        run = self.create(job, {**graced, **(tags or {})}, **config)
        self.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        return run.run_id

    def run(self, run_id: str) -> DagsterRun:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def status(self, run_id: str) -> DagsterRunStatus:
        return self.run(run_id).status

    def task_id(self, run_id: str) -> str:
        return self.run(run_id).tags[TASK_ID_TAG]

    def marks(self, run_id: str) -> list[str]:
        if run_id not in self._marks:
            self._marks[run_id] = Path(self.run(run_id).tags["marks"])
        path = self._marks[run_id]
        return [line.rpartition(" ")[0] for line in path.read_text().splitlines()] if path.exists() else []

    def mark_counts(self, run_id: str) -> Counter[str]:
        """How often each mark was made, in whichever step."""
        return Counter(mark.split()[0] for mark in self.marks(run_id))

    def wait_started(self, run_id: str, steps: int) -> None:
        """Wait until the bodies of so many steps have begun."""
        wait_until(
            lambda: self.mark_counts(run_id)["started"] >= steps,
            f"{steps} steps are at work",
            within=90,
            seen=lambda: (self.mark_counts(run_id), self.status(run_id), self.story(run_id)[-20:]),
        )

    def marked(self, run_id: str, name: str, *, within: float = 60) -> str:
        """Wait for a mark; returns what stands behind its name."""
        found = wait_until(
            lambda: [mark for mark in self.marks(run_id) if mark.split()[0] == name],
            f"mark {name!r} of run {run_id}",
            within=within,
            seen=lambda: (self.status(run_id), self.marks(run_id), self.story(run_id)),
        )
        return found[-1].partition(" ")[2]

    def finished(self, run_id: str, *, within: float = 60) -> DagsterRunStatus:
        wait_until(
            lambda: self.status(run_id) in FINISHED,
            f"run {run_id} is finished",
            within=within,
            seen=lambda: (self.status(run_id), self.marks(run_id), self.story(run_id)),
        )
        return self.status(run_id)

    def story(self, run_id: str) -> list[str]:
        entries = self.instance.all_logs(run_id)
        events = [entry.dagster_event for entry in entries]
        return [f"{event.event_type_value}: {(event.message or '')[:200]}" for event in events if event is not None]

    def events(self, run_id: str) -> list[DagsterEventType]:
        entries = self.instance.all_logs(run_id)
        return [entry.dagster_event.event_type for entry in entries if entry.dagster_event is not None]

    def stages(self, run_id: str) -> list[Stage]:
        return [stage for stage, _ in read_engine_events(self.instance, run_id)]

    def failure(self, run_id: str, step_key: str) -> str:
        """What Dagster's UI shows of the error of a step that has failed."""
        entries = self.instance.all_logs(run_id, of_type=DagsterEventType.STEP_FAILURE)
        (event,) = [entry.dagster_event for entry in entries if entry.step_key == step_key and entry.dagster_event]
        return event.step_failure_data.error_display_string

    def wait_for_stage(self, run_id: str, stage: Stage) -> str:
        """The facts of that engine event, as text."""
        wait_until(lambda: stage in self.stages(run_id), f"{stage} of {run_id}", seen=lambda: self.story(run_id))
        messages = [str(entry.dagster_event) for entry in self.instance.all_logs(run_id) if entry.dagster_event]
        return next(message for message in messages if stage.value in message)

    def report(self, run: DagsterRun, *events: DagsterEventType) -> None:
        """Have these events happen to a run."""
        for event in events:
            self.instance.report_dagster_event(DagsterEvent(event.value, run.job_name, message=""), run.run_id)

    def waiting(self, suffix: str = "") -> int:
        """Messages of a queue, in flight or not."""
        known = sqs_client(self.endpoint_url).get_queue_attributes(
            QueueUrl=sibling_queue(self.queue_url, suffix), AttributeNames=["All"]
        )["Attributes"]
        return int(known["ApproximateNumberOfMessages"]) + int(known["ApproximateNumberOfMessagesNotVisible"])

    def create_route(self, route: str) -> str:
        """The queues of a route; the URL of its work queue."""
        name = queue_name(self.queue_url).removesuffix(".fifo")
        return create_queues(self.endpoint_url, f"{name}-{route}", is_fifo(self.queue_url))

    def cancel_by_message(self, task_id: str, **more: Any) -> None:
        """As anybody can who may write to the cancel queue."""
        body = json.dumps({"task_id": task_id, **more})
        sqs_client(self.endpoint_url).send_message(QueueUrl=cancel_queue_url(self.queue_url), MessageBody=body)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Signal one process of a run of ours."""
        os.kill(pid, number)

    def processes(self, run_id: str) -> list[int]:
        """Living processes of the run's tree, wherever they have gone."""
        return find_processes(self.task_id(run_id))

    def assert_nothing_left(self, run_id: str) -> None:
        assert self.processes(run_id) == []
        self.assert_no_step_left(run_id)

    def assert_no_step_left(self, run_id: str) -> None:
        for task_id in self.step_tasks(run_id):
            assert find_processes(task_id) == [], task_id

    def step_notes(self, run_id: str, stage: Stage) -> list[dict[str, Any]]:
        """The facts of the engine events of that stage about steps, in the order of the log; `step_key` is one."""
        events = [entry.dagster_event for entry in self.instance.all_logs(run_id)]
        about = [(event, parse_event(event)) for event in events if event is not None and event.step_key is not None]
        return [note[1] | {"step_key": event.step_key} for event, note in about if note and note[0] is stage]

    def step_tasks(self, run_id: str) -> list[str]:
        """The task ids of the steps that any worker has picked up."""
        return [facts[TASK_ID_KEY] for facts in self.step_notes(run_id, Stage.PICKED_UP)]

    def environ(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Where a process of ours finds this platform."""
        return os.environ | {"DAGSTER_HOME": str(self.home)} | dict(more or {})

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Give a command of ours, as people do."""
        out, error = Lines(), Lines()
        try:
            process = start_command(arguments, self.environ(), out.writer, error.writer)
        finally:
            out.close_writer()
            error.close_writer()
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise
        out.join()
        error.join()
        return subprocess.CompletedProcess(arguments, code, "".join(out.lines), "".join(error.lines))

    @contextmanager
    def worker(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        ready: bool = True,
        program: Sequence[str] | None = None,
    ) -> Iterator[WorkerProcess]:
        """A `dagster-taskiq worker start`, forked from a warm interpreter; or a program that is one."""
        told = Lines()
        try:
            if program is None:
                process = start_command(("worker", "start", *arguments), self.environ(env), told.writer)
            else:
                process = start_program([*program, *arguments], self.environ(env), told.writer)
        finally:
            told.close_writer()
        worker = WorkerProcess(process, told.lines)
        try:
            if ready:
                worker.wait_ready()
            yield worker
        finally:
            try:
                worker.stop()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
                raise AssertionError(f"the worker did not stop within its bound: {worker.log()[-3000:]}") from None
            finally:
                told.join()


def _ops_config(graph: GraphDefinition, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for every op, wherever it is; but for one that takes none."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if isinstance(node.definition, GraphDefinition) and node.definition.config_mapping is not None:
            found[node.name] = {"config": dict(config)}
        elif isinstance(node.definition, GraphDefinition):
            found[node.name] = {"ops": _ops_config(node.definition, config)}
        elif node.definition.name != "fails":
            found[node.name] = {"config": dict(config)}
    return found


def write_home(
    home: Path, queue_url: str, endpoint_url: str, *, source: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """A dagster.yaml as an operator would write it."""
    home.mkdir(parents=True, exist_ok=True)
    launcher = {
        "module": "dagster_taskiq.launcher",
        "class": "TaskiqRunLauncher",
        "config": {
            "queue_url": queue_url,
            "region_name": "us-east-1",
            "endpoint_url": endpoint_url,
            "config_source": dict(source),
        },
    }
    # Dagster only asks a code server to end; one that nobody has waited for fails whichever test collects it.
    code_servers = {"wait_for_local_processes_on_shutdown": True}
    document = {"run_launcher": launcher, "telemetry": {"enabled": False}, "code_servers": code_servers, **extra}
    (home / "dagster.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(document))))
