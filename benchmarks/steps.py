"""What does a step cost? With `taskiq_executor`, against Dagster's own executors, in one run.

    make benchmark-steps            # or: python -m benchmarks.steps 3
    python -m benchmarks.steps --help

Steps that do nothing, so that what is measured is what an executor adds to them. All runs come from the same
`TaskiqRunLauncher` and are worked on by the same worker; only their executor differs. Absolute times depend on the
machine; what counts are the ratios. SQS is moto on loopback.

*Wall* is told by the timestamps in the event log. *CPU* is the growth of user and system time, of living and of
waited-for processes, over the worker's process tree (`/proc/PID/stat`), from before the launch until the tree is idle
again. Nothing of it gets lost: Linux hands the time of a process to whoever waits for it, the worker's fork server and
the keepers are subreapers, and wait for all. Linux tells it in steps of 10 ms for each living process. Emulator and
PostgreSQL are no part of that tree.

Queries and requests are counted in runs of their own, which nobody times: statements of all processes by a hook into
SQLAlchemy, requests by moto's own recorder.
"""

import argparse
import os
import pstats
import re
import shutil
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableJob
from rich.console import Console
from rich.table import Table
from tests.acceptance.conftest import DEFAULT_POSTGRES, POSTGRES_VARIABLE, open_platform
from tests.support.moto import CREDENTIALS, moto_server
from tests.support.platform import FINISHED, Platform, WorkerProcess
from tests.support.waiting import wait_until

from benchmarks import step_jobs

EXECUTORS = ("in_process", "multiprocess", "taskiq")
JOBS = {
    "forty": (f"40 parallel steps, {step_jobs.AT_A_TIME} at a time, and a closing one", 41, 0.15),
    "chain": ("a chain of 10 steps", 10, 0.2),
    "two_hundred": (f"200 parallel steps, {step_jobs.AT_A_TIME} at a time, and a closing one", 201, None),
}
"""Title, number of steps, and the share of multiprocess_executor's time that taskiq_executor may take."""
AS_USERS_HAVE_IT = {"wait_time_seconds": 20, "visibility_timeout_seconds": 30, "status_poll_seconds": 5}
IDLE_S = 5.0
ROUND_TIMEOUT_S = 600.0
PROFILED = 25

COUNT_STATEMENTS = """
import os
from sqlalchemy import event
from sqlalchemy.engine import Engine

log = os.open(os.environ["STEPS_STATEMENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@event.listens_for(Engine, "before_cursor_execute")
def count(connection, cursor, statement, *_):
    os.write(log, f"{os.getpid()} {' '.join(statement.split())[:1000]}\\n".encode())
"""
"""As `sitecustomize` in the worker and all that it starts. One line for a statement, so that no end can lose any."""

PROFILE = """
import atexit, cProfile, os

running = None

def begin():
    global running
    if running is not None:  # a fork of a fork
        running.disable()
    running = cProfile.Profile()
    atexit.register(write, running, os.getpid())
    running.enable()

def write(profile, pid):
    if pid == os.getpid():
        profile.disable()
        profile.dump_stats(os.path.join(os.environ["STEPS_PROFILES"], f"{pid}.prof"))

os.register_at_fork(after_in_child=begin)
begin()
"""
"""As `sitecustomize`: each process writes its profile (of its main thread) when its exit handlers run."""


@dataclass(frozen=True)
class Timing:
    """One run."""

    run_s: float
    launch_s: float
    life_s: float
    """Median over the steps, from the first event of a step to its last one."""
    cpu_s: float
    emulator_cpu_s: float


@dataclass
class Counts:
    """What one run asked of others, or an idle worker in `IDLE_S`."""

    statements: Counter[str] = field(default_factory=Counter)
    """By process: worker, run, steps."""
    requests: Counter[str] = field(default_factory=Counter)
    """By action."""
    texts: Counter[str] = field(default_factory=Counter)
    """The statements themselves, by process."""


@dataclass
class Stage:
    """Platform and worker, and what watches them."""

    platform: Platform
    worker: WorkerProcess
    emulator: psutil.Process
    statements: Path
    requests: Path

    def run(self, name: str) -> str:
        """One run of that job, seen to its end; its id."""
        recon = ReconstructableJob.for_file(str(step_jobs.__file__), name)
        instance = self.platform.instance
        run = instance.create_run_for_job(recon.get_definition(), job_code_origin=recon.get_python_origin())
        before = len(tree(self.worker.pid))
        instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        # Rarely, because looking takes what the run needs; how long it took is in its event log.
        wait_until(lambda: self.platform.status(run.run_id) in FINISHED, name, within=ROUND_TIMEOUT_S, every=0.25)
        if self.platform.status(run.run_id) is not DagsterRunStatus.SUCCESS:
            raise RuntimeError("\n".join([f"{name} did not succeed", *self.platform.story(run.run_id)[-10:]]))
        wait_until(lambda: len(tree(self.worker.pid)) <= before, "the worker is idle again")
        return run.run_id

    def time(self, name: str) -> Timing:
        cpu, emulator_cpu, began = cpu_of(self.worker.pid), cpu_of(self.emulator.pid), time.time()
        run_id = self.run(name)
        cpu, emulator_cpu = cpu_of(self.worker.pid) - cpu, cpu_of(self.emulator.pid) - emulator_cpu
        at: dict[DagsterEventType, float] = {}
        of_step: dict[str, list[float]] = defaultdict(list)
        for entry in self.platform.instance.all_logs(run_id):
            if entry.dagster_event is not None:
                at[entry.dagster_event.event_type] = entry.timestamp
                if entry.dagster_event.step_key is not None:
                    of_step[entry.dagster_event.step_key].append(entry.timestamp)
        done = at[DagsterEventType.RUN_SUCCESS]
        life = median(max(times) - min(times) for times in of_step.values())
        return Timing(done - at[DagsterEventType.RUN_START], done - began, life, cpu, emulator_cpu)

    def count(self, name: str | None) -> Counts:
        """What that job asks for; without a name: what an idle worker does."""
        self.statements.write_bytes(b"")
        self.requests.write_bytes(b"")
        self.record("start")
        if name is None:
            time.sleep(IDLE_S)
        else:
            self.run(name)
        self.record("stop")
        counts = Counts()
        roles = {str(self.worker.pid): "worker"}
        for line in self.statements.read_text().splitlines():
            pid, _, text = line.partition(" ")
            # After the worker the run's own process is the first that asks anything; all others are steps.
            role = roles.setdefault(pid, "run" if len(roles) == 1 else "steps")
            counts.statements[role] += 1
            counts.texts[f"{role:6} {text}"] += 1
        counts.requests.update(re.findall(r'"X-Amz-Target": "AmazonSQS\.(\w+)"', self.requests.read_text()))
        return counts

    def record(self, what: str) -> None:
        url = f"{self.platform.endpoint_url}/moto-api/recorder/{what}-recording"
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10).close()  # noqa: S310 - ours


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_of(pid: int) -> float:
    """Seconds that the tree has taken since it began."""
    times = [process.cpu_times() for process in tree(pid)]
    return float(sum(one.user + one.system + one.children_user + one.children_system for one in times))


@contextmanager
def empty_database() -> Iterator[Mapping[str, Any]]:
    """A new PostgreSQL database, as `storage` in dagster.yaml."""
    import psycopg2
    from psycopg2.extensions import ISOLATION_LEVEL_AUTOCOMMIT

    base = os.environ.get(POSTGRES_VARIABLE, DEFAULT_POSTGRES)
    name = f"dagster_taskiq_benchmark_{uuid.uuid4().hex[:12]}"
    connection = psycopg2.connect(base, connect_timeout=3)
    connection.set_isolation_level(ISOLATION_LEVEL_AUTOCOMMIT)
    cursor = connection.cursor()
    cursor.execute(f"CREATE DATABASE {name}")
    url = urllib.parse.urlsplit(base)._replace(scheme="postgresql+psycopg2", path=f"/{name}").geturl()
    try:
        yield {"postgres": {"postgres_url": url}}
    finally:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
        connection.close()


@contextmanager
def emulator(recording: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Moto with a recorder, which is off; its URL and its process."""
    before = set(psutil.Process().children())
    os.environ["MOTO_RECORDER_FILEPATH"] = str(recording)
    with moto_server() as endpoint:
        (process,) = set(psutil.Process().children()) - before
        yield endpoint, process


@contextmanager
def stage(storage: Mapping[str, Any], watch: str | None = None, profiles: Path | None = None) -> Iterator[Stage]:
    """Everything that runs need, warm. `watch`: a sitecustomize for the worker and what it starts."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint, process = stack.enter_context(emulator(folder / "requests"))
        extra = {"storage": storage} if storage else {}
        platform = stack.enter_context(open_platform(endpoint, source=AS_USERS_HAVE_IT, extra=extra))
        env = {"STEPS_STATEMENTS": str(folder / "statements"), "STEPS_PROFILES": str(profiles)}
        if watch is not None:
            (folder / "sitecustomize.py").write_text(watch)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        worker = stack.enter_context(platform.worker("--log-level", "WARNING", env=env))
        ready = Stage(platform, worker, process, folder / "statements", folder / "requests")
        for executor in EXECUTORS:
            ready.run(f"one_{executor}")
        yield ready


def wanted(job: str, executor: str, *, everything: bool) -> bool:
    return everything or (job, executor) != ("two_hundred", "multiprocess")


Timings = dict[str, dict[str, list[Timing]]]
Counted = dict[str, dict[str, Counts]]


def timed(storage: Mapping[str, Any], jobs: list[str], rounds: int, *, everything: bool) -> Timings:
    timings: Timings = {job: defaultdict(list) for job in jobs}
    with stage(storage) as ready:
        for _ in range(rounds):  # alternating, so that whatever else the machine does meets all
            for job in jobs:
                for executor in EXECUTORS:
                    if wanted(job, executor, everything=everything):
                        timings[job][executor].append(ready.time(f"{job}_{executor}"))
    return timings


def counted(storage: Mapping[str, Any], jobs: list[str], *, everything: bool) -> tuple[Counted, Counts]:
    counts: Counted = {job: {} for job in jobs}
    with stage(storage, COUNT_STATEMENTS) as ready:
        idle = ready.count(None)
        for job in jobs:
            for executor in EXECUTORS:
                if wanted(job, executor, everything=everything):
                    counts[job][executor] = ready.count(f"{job}_{executor}")
    return counts, idle


def show_times(job: str, timings: Mapping[str, list[Timing]]) -> None:
    title, steps, budget = JOBS[job]

    def of(executor: str, what: str) -> float | None:
        values = [getattr(timing, what) for timing in timings[executor]] if timings.get(executor) else []
        return median(values) if values else None

    def ratio(one: float | None, other: float | None) -> str:
        return f"{one / other:.3f}" if one is not None and other else ""

    table = Table("", *EXECUTORS, "taskiq / multiprocess", "taskiq / in_process", "budget", title=title)
    rows = [
        ("RUN_START to RUN_SUCCESS, s", "run_s", 1.0),
        ("launch_run() to RUN_SUCCESS, s", "launch_s", 1.0),
        ("RUN_START to RUN_SUCCESS for a step, ms", "run_s", 1000 / steps),
        ("first to last event of a step, ms", "life_s", 1000.0),
        ("CPU, s", "cpu_s", 1.0),
        ("CPU of the emulator, s", "emulator_cpu_s", 1.0),
    ]
    for row, (text, what, factor) in enumerate(rows):
        values = {executor: of(executor, what) for executor in EXECUTORS}
        cells = ["not run (--all)" if value is None else f"{value * factor:.2f}" for value in values.values()]
        ours, theirs = values["taskiq"], values["multiprocess"]
        verdict = ""
        if row == 0 and budget is not None:
            kept = ours is not None and theirs is not None and ours <= budget * theirs
            verdict = f"[{'green' if kept else 'red'}]{'kept' if kept else 'missed'}: ≤ {budget:g} x multiprocess"
        table.add_row(text, *cells, ratio(ours, theirs), ratio(ours, values["in_process"]), verdict)
    Console().print(table)


def show_steps(timings: Timings, counts: Counted, idle: Counts) -> None:
    table = Table(
        *("for one step", "CPU, ms", "database statements", "of worker / run / steps", "SQS requests", "by action"),
        caption=f"An idle worker: {sum(idle.statements.values()) / IDLE_S:.1f} statements and"
        f" {sum(idle.requests.values()) / IDLE_S:.1f} requests a second, which are in these figures.",
    )
    for job, by_executor in counts.items():
        steps = JOBS[job][1]
        for executor, count in by_executor.items():
            cpu = median(timing.cpu_s for timing in timings[job][executor])
            table.add_row(
                f"{job.replace('_', ' ')}, {executor}",
                f"{cpu / steps * 1000:.0f}",
                f"{sum(count.statements.values()) / steps:.1f}",
                " / ".join(f"{count.statements[role] / steps:.1f}" for role in ("worker", "run", "steps")),
                f"{sum(count.requests.values()) / steps:.2f}",
                ", ".join(f"{action} {times / steps:.2f}" for action, times in count.requests.most_common()),
            )
        table.add_section()
    Console().print(table)


def show_statements(counts: Counted) -> None:
    for job, by_executor in counts.items():
        for executor, count in by_executor.items():
            table = Table("times", "for a step", "process and statement", title=f"{job}, {executor}")
            for text, times in count.texts.most_common(PROFILED):
                table.add_row(str(times), f"{times / JOBS[job][1]:.1f}", text[:200])
            Console().print(table)


def profile(storage: Mapping[str, Any], job: str) -> None:
    """Where the time of that job goes: one profile of the run's process, one of all its steps' together."""
    for executor in EXECUTORS:
        profiles = Path(tempfile.mkdtemp(prefix=f"steps-{executor}-"))
        with stage(storage, PROFILE, profiles) as ready:
            shutil.rmtree(profiles)
            profiles.mkdir()
            ready.run(f"{job}_{executor}")
            written = sorted(profiles.glob("*.prof"))
        for role in ("run", "steps"):
            files = [str(file) for file in written if role_of(file) == role]
            if files:
                print(f"\n{job}, {executor}: {role} ({len(files)} processes; profiles in {profiles})")
                pstats.Stats(*files).sort_stats("cumulative").print_stats(PROFILED)


def role_of(file: Path) -> str | None:
    names = {function[2] for function in pstats.Stats(str(file)).stats}  # type: ignore[attr-defined]
    if "execute_run_iterator" in names:
        return "run"
    return "steps" if "inner_plan_execution_iterator" in names else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=3, help="how often each job is timed; default: 3")
    parser.add_argument("--job", choices=JOBS, action="append", help="this job only; may be given several times")
    parser.add_argument("--all", action="store_true", help="200 steps with multiprocess_executor, too (minutes)")
    parser.add_argument("--postgres", action="store_true", help=f"not SQLite but PostgreSQL, at ${POSTGRES_VARIABLE}")
    parser.add_argument("--statements", action="store_true", help="show which statements the database was asked")
    parser.add_argument("--profile", action="store_true", help="no measuring; show where the time of --job goes")
    arguments = parser.parse_args()
    jobs = arguments.job or list(JOBS)
    os.environ.update(CREDENTIALS)
    os.environ.pop("DAGSTER_HOME", None)
    with ExitStack() as stack:

        def storage() -> Mapping[str, Any]:
            return stack.enter_context(empty_database()) if arguments.postgres else {}

        if arguments.profile:
            for job in arguments.job or ["chain"]:
                profile(storage(), job)
            return
        timings = timed(storage(), jobs, arguments.rounds, everything=arguments.all)
        counts, idle = counted(storage(), jobs, everything=arguments.all)
    for job in jobs:
        show_times(job, timings[job])
    show_steps(timings, counts, idle)
    if arguments.statements:
        show_statements(counts)


if __name__ == "__main__":
    main()
