"""What workers and runs depend on fails for a while: nothing is stopped because of it, and afterwards all goes on."""

import os
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import SNAPPY, open_platform, steps_platform
from tests.support.platform import JOBS, REAL_WORKER, Platform, WorkerProcess
from tests.support.proxy import SqsProxy, sqs_proxy
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import wait_until

from dagster_taskiq.dagster_compat.api import LaunchRunContext
from dagster_taskiq.errors import QueueUnreachable
from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

OUTAGE_S: float = 1.5 * SNAPPY["visibility_timeout_seconds"]
"""So long that leases run out, and heartbeats go stale, while it lasts."""

SQS_FAULTS: dict[str, Callable[[SqsProxy], None]] = {
    "away": SqsProxy.away,
    "hanging": SqsProxy.hang,
    "throttling": SqsProxy.throttle,
    "failing": lambda proxy: proxy.fail_with(500),
}


def outage(begin: Callable[[], None]) -> float:
    """Begin it; the moment at which it may end."""
    begin()
    return time.monotonic() + OUTAGE_S


def last_until(moment: float, holds: Callable[[], object], what: Callable[[], object]) -> None:
    """Look all the time of the outage whether everything is as it should be."""
    while time.monotonic() < moment:
        assert holds(), what()
        time.sleep(0.2)


def said(worker: WorkerProcess, text: str) -> int:
    return sum(text in line for line in worker.lines)


def assert_untouched(platform: Platform, run_id: str, worker: WorkerProcess) -> None:
    told = (platform.story(run_id), worker.log()[-3000:])
    assert platform.status(run_id) is DagsterRunStatus.STARTED, told
    assert platform.mark_counts(run_id)["started"] == 1, told
    assert not {Stage.INTERRUPTING, Stage.KILLED} & set(platform.stages(run_id)), told


def assert_stops(platform: Platform, run_id: str) -> None:
    assert platform.launcher.terminate(run_id)
    assert platform.finished(run_id, within=60) is DagsterRunStatus.CANCELED, platform.story(run_id)
    platform.assert_nothing_left(run_id)
    assert platform.mark_counts(run_id)["started"] == platform.mark_counts(run_id)["cleanup-end"] == 1


@pytest.mark.parametrize("fault", SQS_FAULTS)
def test_while_sqs_fails_runs_go_on_and_can_be_stopped(endpoint: str, fault: str) -> None:
    with sqs_proxy(endpoint) as proxy, open_platform(proxy.url) as platform, platform.worker("-n", "w") as worker:
        stays, goes = platform.launch("sleepy_job"), platform.launch("sleepy_job")
        platform.marked(stays, "started"), platform.marked(goes, "started")
        end = outage(lambda: SQS_FAULTS[fault](proxy))
        # Nobody can tell the worker but the database.
        assert platform.launcher.terminate(goes)
        assert platform.finished(goes, within=60) is DagsterRunStatus.CANCELED
        last_until(end, lambda: platform.processes(stays), worker.log)
        proxy.back()
        assert platform.finished(platform.launch("quick_job", seconds=0), within=60) is DagsterRunStatus.SUCCESS
        assert_untouched(platform, stays, worker)
        assert_stops(platform, stays)
    if fault != "hanging":  # or else a request may still wait for its answer
        assert said(worker, "cannot receive work, trying again") >= 1
        assert said(worker, "cannot receive work") <= 6, worker.log()
        assert said(worker, "can receive work again after") >= 1


@contextmanager
def behind_a_proxy(postgres: str) -> Iterator[tuple[TcpProxy, dict[str, Any]]]:
    """The database by way of a proxy; what stands in dagster.yaml."""
    url = urllib.parse.urlsplit(postgres)
    with tcp_proxy(url.hostname or "127.0.0.1", url.port or 5432) as proxy:
        through = f"{url.scheme}://{url.username}@{proxy.host}:{proxy.port}{url.path}"
        yield proxy, {"storage": {"postgres": {"postgres_url": through}}}


@pytest.mark.postgres
def test_while_the_database_is_away_runs_and_steps_go_on_and_a_message_stops_one(endpoint: str, postgres: str) -> None:
    with (
        behind_a_proxy(postgres) as (proxy, storage),
        steps_platform(endpoint, extra=storage) as platform,
        platform.worker("-n", "a") as a,
        platform.worker("-n", "b") as b,
    ):
        run_id = platform.launch("two_steps", seconds=OUTAGE_S * 0.6)
        stays = platform.launch("sleepy_steps")
        goes = replace(platform, jobs=JOBS).launch("sleepy_job")
        platform.wait_started(run_id, 2)
        platform.wait_started(stays, 1)
        platform.marked(goes, "started")
        task_id, marks = platform.task_id(goes), Path(platform.run(goes).tags["marks"])
        processes = {pid: Path(f"/proc/{pid}") for pid in platform.processes(stays)}
        end = outage(proxy.away)
        platform.cancel_by_message(task_id)
        wait_until(lambda: "cleanup-end" in marks.read_text(), "a message alone stops a run", within=OUTAGE_S / 2)
        # The steps of the first run end meanwhile, and cannot say so before the database is back.
        last_until(end, lambda: all(path.exists() for path in processes.values()), lambda: (a.log(), b.log()))
        proxy.back()

        def told() -> object:
            return platform.story(run_id), a.log()[-3000:], b.log()[-3000:]

        assert platform.finished(run_id, within=90) is DagsterRunStatus.SUCCESS, told()
        assert platform.finished(goes, within=90) is DagsterRunStatus.CANCELED, platform.story(goes)
        counts = platform.mark_counts(run_id)
        assert counts["started"] == counts["slept"] == counts["cleanup-end"] == 2, told()
        assert_untouched(platform, stays, a)
        assert_stops(platform, stays)
        assert DagsterEventType.STEP_UP_FOR_RETRY not in platform.events(run_id)
    for worker in (a, b):
        assert said(worker, "cannot write the heartbeat, trying again") >= 1
        assert said(worker, "can write the heartbeat again after") >= 1


CEILING_S = 12
LOWERED = f"import dagster_taskiq.sqs.lease\n\ndagster_taskiq.sqs.lease.MAX_LEASE_S = {CEILING_S}\n"


def test_what_outlives_the_longest_lease_of_sqs_is_neither_stopped_nor_started_twice(
    endpoint: str, tmp_path: Path
) -> None:
    """SQS keeps a message invisible for twelve hours at most; here it is seconds."""
    (tmp_path / "sitecustomize.py").write_text(LOWERED)
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))}
    visibility_s = CEILING_S - 4
    seconds = CEILING_S + 2.0 * visibility_s
    with (
        steps_platform(endpoint, source={"visibility_timeout_seconds": visibility_s}) as platform,
        platform.worker("-n", "a", env=env, program=REAL_WORKER) as a,
        platform.worker("-n", "b", env=env, program=REAL_WORKER) as b,
    ):
        run_id = platform.launch("two_steps", seconds=seconds)
        platform.wait_started(run_id, 2)
        wait_until(
            lambda: said(a, "lease lost") + said(b, "lease lost") >= 2,
            "the leases of the run and of steps are lost",
            within=60,
            seen=lambda: (a.log(), b.log()),
        )
        assert platform.finished(run_id, within=60) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        counts = platform.mark_counts(run_id)
        assert counts["started"] == counts["slept"], platform.story(run_id)
        wait_until(
            lambda: platform.waiting() == platform.waiting("-steps") == 0,
            "the messages that came again are gone",
            within=60,
            seen=lambda: (platform.waiting(), platform.waiting("-steps"), a.log(), b.log()),
        )
        assert Stage.INTERRUPTING not in platform.stages(run_id)


def test_a_run_that_is_terminated_while_its_launch_waits_for_sqs_stays_canceled(endpoint: str) -> None:
    with sqs_proxy(endpoint) as proxy, open_platform(proxy.url) as platform, ThreadPoolExecutor(1) as threads:
        run = platform.create("quick_job", seconds=0)
        proxy.hang(action="SendMessage")
        launching = threads.submit(platform.instance.launch_run, run.run_id, None)  # type: ignore[arg-type]
        wait_until(lambda: [asked for asked, _ in proxy.seen if asked == "SendMessage"], "the launch waits for SQS")
        assert platform.launcher.terminate(run.run_id)
        assert platform.status(run.run_id) is DagsterRunStatus.CANCELED
        proxy.away()
        launching.result(60)
        assert platform.status(run.run_id) is DagsterRunStatus.CANCELED, platform.story(run.run_id)
        # Also when it was marked before the launcher came to see it.
        run = platform.create("quick_job", seconds=0)
        platform.instance.report_run_canceled(run)
        platform.launcher.launch_run(LaunchRunContext(platform.run(run.run_id), workspace=None))
        assert platform.status(run.run_id) is DagsterRunStatus.CANCELED, platform.story(run.run_id)
        # Of one that nobody has terminated Dagster makes a failure.
        run = platform.create("quick_job", seconds=0)
        with pytest.raises(QueueUnreachable):
            platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        assert platform.status(run.run_id) is DagsterRunStatus.FAILURE


FILL: dict[str, Callable[[Path], object]] = {
    "bytes": lambda folder: (folder / "filler").write_bytes(b"x" * 100_000),
    "files": lambda folder: [(folder / f"filler{number}").write_bytes(b"") for number in range(20)],
}


@contextmanager
def full_disk(folder: Path, what: str) -> Iterator[None]:
    """A file system of its own on which there is no room left: for bytes, or for further files."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=8", "dagster-taskiq-test", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a file system (not root?)")
    try:
        with pytest.raises(OSError, match="No space left"):
            FILL[what](folder)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("what", FILL)
def test_while_the_disk_of_the_compute_logs_is_full_runs_go_on_and_can_be_stopped(
    endpoint: str, tmp_path: Path, what: str
) -> None:
    compute_logs = {
        "module": "dagster._core.storage.local_compute_log_manager",
        "class": "LocalComputeLogManager",
        "config": {"base_dir": str(tmp_path)},
    }
    with (
        open_platform(endpoint, extra={"compute_logs": compute_logs}) as platform,
        platform.worker("-n", "w") as worker,
        full_disk(tmp_path, what),
    ):
        stays, goes = platform.launch("sleepy_job"), platform.launch("sleepy_job")
        platform.marked(stays, "started"), platform.marked(goes, "started")
        assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
        assert_stops(platform, goes)
        assert_untouched(platform, stays, worker)
        assert_stops(platform, stays)
        assert what == "files" or (tmp_path / stays).exists(), "its compute logs went elsewhere"
