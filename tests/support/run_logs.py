"""Event logs of real runs, in files: written by acceptance tests that are told to, replayed by unit tests."""

import getpass
import json
import os
import socket
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.runs.schema import RunsTable

from dagster_taskiq.dagster_compat.api import deserialize_value, serialize_value
from dagster_taskiq.dagster_compat.storage import deserialize_entry

RECORD_VARIABLE = "DAGSTER_TASKIQ_TEST_RECORD_LOGS"
"""Set it to have the acceptance tests of `run explain` write the logs of their runs anew."""
LOGS = Path(__file__).parents[1] / "unit" / "story" / "logs"
_ROOT = Path(__file__).parents[2]


def record(instance: DagsterInstance, run_id: str, name: str) -> None:
    """Write the run and its log into a file, without anything of this machine; only when it is asked for."""
    if not os.environ.get(RECORD_VARIABLE):
        return
    found = instance.get_run_record_by_id(run_id)
    assert found is not None
    document = {
        "created": found.create_timestamp.timestamp(),
        "run": json.loads(serialize_value(found.dagster_run)),
        "events": [json.loads(serialize_value(entry)) for entry in instance.all_logs(run_id)],
    }
    text = json.dumps(_without_stacks(document), indent=1)
    folder = tempfile.gettempdir()
    for ours, theirs in {
        str(_ROOT): "/app",
        socket.gethostname(): "host",
        f"{getpass.getuser()}@": "ada@",
        f"{folder}/dagster-taskiq-": "/home/",
        f"{folder}/": "/temporary/",
    }.items():
        text = text.replace(ours, theirs)
    LOGS.mkdir(exist_ok=True)
    (LOGS / f"{name}.json").write_text(text + "\n")


def _without_stacks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: [] if key == "stack" else _without_stacks(nested) for key, nested in value.items()}
    return [_without_stacks(nested) for nested in value] if isinstance(value, list) else value


def replay(instance: DagsterInstance, name: str, *, until: int | None = None) -> DagsterRun:
    """Have it all happen in another instance, up to that event; at the same times."""
    document = json.loads((LOGS / f"{name}.json").read_text())
    run = deserialize_value(json.dumps(document["run"]), DagsterRun)
    run = run._replace(job_snapshot_id=None, execution_plan_snapshot_id=None)  # what it looked like is not recorded
    instance.run_storage.add_run(run.with_status(DagsterRunStatus.NOT_STARTED))
    for event in document["events"][:until]:
        entry: EventLogEntry = deserialize_entry(json.dumps(event))
        instance.handle_new_event(entry)
    storage: Any = instance.run_storage
    with storage.connect() as connection:
        created = datetime.fromtimestamp(document["created"], UTC).replace(tzinfo=None)
        connection.execute(RunsTable.update().where(RunsTable.c.run_id == run.run_id).values(create_timestamp=created))
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found
