"""How long does `run cancel` take for very many runs that wait in Dagster's queue, and is one launched meanwhile?

    make benchmark-cancel-runs      # or: python -m benchmarks.cancel_runs 5000 [directory of the home]

Dagster's daemon takes runs from the queue all the time, as quickly as it can, for 50 free slots. The storage is SQLite:
where its files are decides how long it takes. SQS is moto on loopback.
"""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.utils import make_new_run_id
from tests.acceptance.conftest import open_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, Daemon, beat
from tests.support.moto import CREDENTIALS, moto_server
from tests.support.platform import Platform
from tests.support.warm import CLI

from dagster_taskiq.dagster_compat.many_runs import store_events
from dagster_taskiq.run_selection import groups_of
from dagster_taskiq.storage.tags import TASK_ID_TAG

SLOTS = 50


def enqueue(platform: Platform, count: int) -> None:
    """As submitted; in a quicker way, because it is not what is measured."""
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__")
    first = platform.create("quick_job", remote_job_origin=RemoteJobOrigin(repository, "quick_job"))
    platform.instance.delete_run(first.run_id)
    event = DagsterEvent(DagsterEventType.RUN_ENQUEUED.value, first.job_name, message="")
    runs = [first._replace(run_id=make_new_run_id(), status=DagsterRunStatus.QUEUED) for _ in range(count)]
    storage: Any = platform.instance.event_log_storage
    empty = _empty_log(platform.instance, first.run_id, event)
    for some in groups_of(100, [run.run_id for run in runs]):
        for run_id in some:
            Path(storage.path_for_shard(run_id)).write_bytes(empty)
        store_events(platform.instance, {run_id: [event] for run_id in some})
    for run in runs:
        platform.instance.add_run(run)


def _empty_log(instance: DagsterInstance, run_id: str, event: DagsterEvent) -> bytes:
    """The file in which Dagster keeps the events of a run: making one takes a third of a second, copying it nothing."""
    storage: Any = instance.event_log_storage
    path = Path(storage.path_for_shard(run_id))
    store_events(instance, {run_id: [event]})
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM event_logs")
    return path.read_bytes()


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    tempfile.tempdir = sys.argv[2] if len(sys.argv) > 2 else None
    os.environ.update(CREDENTIALS)
    with moto_server() as endpoint, open_platform(endpoint, extra={"run_coordinator": COORDINATOR}) as platform:
        enqueue(platform, count)
        beat(platform.instance, "a", SLOTS)
        over = threading.Event()

        def dequeue() -> None:
            with DagsterInstance.from_config(str(platform.home)) as instance:
                daemon = Daemon(instance)
                while not over.is_set():
                    daemon.take()
                    beat(instance, "a", SLOTS)

        taking = threading.Thread(target=dequeue)
        taking.start()
        while not platform.instance.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.STARTING])):
            time.sleep(0.05)
        before = launched(platform)
        command = (*CLI, "run", "cancel", "--job", "quick_job", "--yes", "--json", "--reason", "benchmark")
        began = time.monotonic()
        ended = subprocess.run(command, env=platform.environ(), capture_output=True, text=True, check=False)
        took = time.monotonic() - began
        over.set()
        taking.join()
        report = json.loads(ended.stdout)
        counts = ", ".join(
            f"{len(ids)} {kind}" for kind, ids in report.items() if isinstance(ids, (list, dict)) and ids
        )
        ends = platform.instance.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.CANCELED]))
        print(f"{counts}; {took:.1f} s, {took / count * 1000:.1f} ms each; CANCELED: {ends} of {count};")
        print(f"exit code {ended.returncode}; launched before: {before}, meanwhile: {launched(platform) - before},")
        print(f"of these after the first was cancelled: {launched_after_the_first_cancel(platform)}")


def launched_after_the_first_cancel(platform: Platform) -> int:
    """Until then the command starts, and reads which runs are meant; what it has not asked for yet may start."""
    query = (
        "SELECT count(*) FROM event_logs WHERE dagster_event_type = 'PIPELINE_STARTING' AND timestamp >"
        " (SELECT min(timestamp) FROM event_logs WHERE dagster_event_type = 'PIPELINE_CANCELING')"
    )
    storage: Any = platform.instance.event_log_storage
    with storage.index_connection() as connection:
        return int(connection.exec_driver_sql(query).scalar())


def launched(platform: Platform) -> int:
    """How many have been given to SQS."""
    return sum(TASK_ID_TAG in run.tags for run in platform.instance.get_runs())


if __name__ == "__main__":
    main()
