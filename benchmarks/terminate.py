"""How fast is a launch, how fast is a Terminate? Against Dagster's own launcher and a bare SQS message, in one run.

    make benchmark                  # or: python -m benchmarks.terminate 60

Absolute times depend on the machine; what counts are the ratios. SQS is moto on loopback, the storage SQLite.
"""

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dagster import DagsterEventType, DagsterInstance, DagsterRun
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import PythonFileTarget
from rich.console import Console
from rich.table import Table
from tests.acceptance.conftest import open_platform
from tests.support.moto import CREDENTIALS, moto_server, sqs_client
from tests.support.platform import JOBS, Platform

CLEANUP_S = 0.05
"""What the op's own `finally` takes; taken off."""
Times = dict[str, list[float]]


def bare_message(endpoint: str, times: int) -> list[float]:
    """Seconds from sending a message until a waiting long poll has it."""
    sender, receiver = sqs_client(endpoint), sqs_client(endpoint)
    url = sender.create_queue(QueueName="bare")["QueueUrl"]
    taken: list[float] = []
    for _ in range(times):
        polling = threading.Event()
        arrived: list[float] = []

        def receive(polling: threading.Event = polling, arrived: list[float] = arrived) -> None:
            polling.set()
            message = receiver.receive_message(QueueUrl=url, WaitTimeSeconds=10)["Messages"][0]
            arrived.append(time.time())
            receiver.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])

        poll = threading.Thread(target=receive)
        poll.start()
        polling.wait()
        time.sleep(0.1)  # until the poll waits in the server
        began = time.time()
        sender.send_message(QueueUrl=url, MessageBody="x")
        poll.join()
        taken.append(arrived[0] - began)
    return taken


def mark_at(run: DagsterRun, name: str) -> float:
    lines = Path(run.tags["marks"]).read_text().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def one(platform: Platform, origin: Any, workspace: Any, times: Times) -> None:
    """One run: launched, terminated while its op sleeps."""
    run = platform.create("sleepy_job", remote_job_origin=origin)
    began = time.time()
    platform.instance.launch_run(run.run_id, workspace)
    platform.marked(run.run_id, "started")
    times["launch_run() to first line of the op"].append(mark_at(run, "started") - began)
    time.sleep(0.3)  # so that the start of a run does not disturb its end
    began = time.time()
    platform.instance.run_launcher.terminate(run.run_id)
    times["terminate() returns"].append(time.time() - began)
    platform.finished(run.run_id)
    canceled = platform.instance.all_logs(run.run_id, of_type=DagsterEventType.RUN_CANCELED)
    times["terminate() to op interrupted"].append(mark_at(run, "interrupted") - began)
    times["terminate() to CANCELED"].append(canceled[-1].timestamp - began - CLEANUP_S)


@contextmanager
def dagsters_own() -> Iterator[tuple[Platform, Any, Any]]:
    """A home with the default launcher, whose runs start from a code server; the origin of its job; its workspace."""
    target = PythonFileTarget(str(JOBS), None, str(Path.cwd()), "benchmark")
    with TemporaryDirectory() as home:
        (Path(home) / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        with (
            DagsterInstance.from_config(home) as instance,
            WorkspaceProcessContext(instance, target) as process,
        ):
            workspace = process.create_request_context()
            repository = next(iter(workspace.get_code_location("benchmark").get_repositories().values()))
            origin = repository.get_full_job("sleepy_job").get_remote_origin()
            yield Platform(Path(home), "", "", instance), origin, workspace


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def show(bare: list[float], ours: Times, dagsters: Times) -> None:
    def cell(values: list[float]) -> str:
        return f"{percentile(values, 0.5) * 1000:.1f} / {percentile(values, 0.99) * 1000:.1f}"

    table = Table("ms, p50 / p99", "dagster-taskiq", "DefaultRunLauncher", "ratio of p50")
    for what, values in ours.items():
        ratio = percentile(values, 0.5) / percentile(dagsters[what], 0.5)
        table.add_row(what, cell(values), cell(dagsters[what]), f"{ratio:.2f}")
    table.add_row("bare SQS message, send to receive", cell(bare), "", "")
    interrupted = ours["terminate() to op interrupted"]
    ratios = [percentile(interrupted, share) / percentile(bare, 0.5) for share in (0.5, 0.99)]
    table.add_row("interrupted, in bare messages (p50)", f"{ratios[0]:.2f} / {ratios[1]:.2f}", "", "")
    Console().print(table)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    os.environ.update(CREDENTIALS)
    ours: Times = defaultdict(list)
    dagsters: Times = defaultdict(list)
    with (
        moto_server() as endpoint,
        open_platform(endpoint) as platform,
        platform.worker("--log-level", "WARNING"),
        dagsters_own() as (default, origin, workspace),
    ):
        bare = bare_message(endpoint, rounds)
        one(platform, None, None, defaultdict(list))
        one(default, origin, workspace, defaultdict(list))
        for _ in range(rounds):  # alternating, so that whatever else the machine does meets both
            one(platform, None, None, ours)
            one(default, origin, workspace, dagsters)
    show(bare, ours, dagsters)


if __name__ == "__main__":
    main()
