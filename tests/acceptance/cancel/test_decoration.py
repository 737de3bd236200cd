"""A reason, an author, a tag or a note never stands before the end of a run: on every database, with every text."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from tests.acceptance.cancel.test_truth_table import started
from tests.acceptance.conftest import open_platform
from tests.support.moto import sqs_client
from tests.support.platform import Platform

from dagster_taskiq import cancel_run
from dagster_taskiq.storage.cleanup_events import cleanup
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import append_event, read_engine_events
from dagster_taskiq.storage.step_state import state_of
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

STATUS = DagsterRunStatus
BAD = "bad\x00file"
"""PostgreSQL refuses it."""
HALF = "caf\ud83d"
"""Nothing can encode it."""
LATIN_1 = b"mauvais mill\xe9sime"
MARK = "\N{REPLACEMENT CHARACTER}"
QUEUED = {"run_coordinator": {"module": "dagster._core.run_coordinator", "class": "QueuedRunCoordinator"}}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def stored(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Platform]:
    """No worker; on each database."""
    extra: dict[str, Any] = {}
    if request.param == "postgres":
        extra = {"storage": {"postgres": {"postgres_url": request.getfixturevalue("postgres")}}}
    with open_platform(endpoint, extra={**QUEUED, **extra}) as platform:
        yield platform


def cancel_message(platform: Platform) -> dict[str, Any]:
    """The body of the one message in the cancel queue."""
    client = sqs_client(platform.endpoint_url)
    (message,) = client.receive_message(QueueUrl=f"{platform.queue_url}-cancels", WaitTimeSeconds=5)["Messages"]
    client.delete_message(QueueUrl=f"{platform.queue_url}-cancels", ReceiptHandle=message["ReceiptHandle"])
    client.close()
    body: dict[str, Any] = json.loads(message["Body"])
    return body


def queued(platform: Platform) -> str:
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("nowhere"), "repository")
    run = platform.create("quick_job", remote_job_origin=RemoteJobOrigin(repository, "quick_job"))
    platform.report(run, DagsterEventType.PIPELINE_ENQUEUED)
    return run.run_id


def test_no_text_keeps_a_run_from_its_end(stored: Platform) -> None:
    """By the API, to a run at work and to one that waits; and by the command line, with a byte that is no UTF-8."""
    for reason, by in ((BAD, "ada"), (HALF, BAD), ("x" * 5000, HALF)):
        run_id = started(stored)
        assert cancel_run(run_id, reason=reason, requested_by=by, instance=stored.instance)
        run, sent = stored.run(run_id), cancel_message(stored)
        assert run.status is STATUS.CANCELING
        assert (
            run.tags[CANCEL_REASON_TAG] == sent["reason"] == reason.replace("\x00", MARK).replace("\ud83d", MARK)[:1024]
        )
        assert run.tags[CANCELLED_BY_TAG] == sent["requested_by"]
        assert Stage.REQUESTED in stored.stages(run_id)
        waits = queued(stored)
        assert cancel_run(waits, reason=reason, requested_by=by, instance=stored.instance)
        assert stored.run(waits).tags[CANCEL_REASON_TAG] == run.tags[CANCEL_REASON_TAG]
        assert stored.status(waits) is STATUS.CANCELED
    run_id = started(stored)
    given = [b"run", b"cancel", run_id.encode(), b"--reason", LATIN_1, b"--requested-by", LATIN_1]
    ended = subprocess.run(
        [sys.executable, "-m", "dagster_taskiq.cli", *given],
        env=os.environ | {"DAGSTER_HOME": str(stored.home)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended
    assert stored.status(run_id) is STATUS.CANCELING
    assert stored.run(run_id).tags[CANCEL_REASON_TAG] == f"mauvais mill{MARK}sime"
    assert cancel_message(stored)["requested_by"] == f"mauvais mill{MARK}sime"


def test_what_handlers_and_ops_say_can_be_stored_and_shown(stored: Platform) -> None:
    run = stored.run(started(stored))
    append_event(stored.instance, run, cleanup(f"undo {HALF}", f"op {BAD}", 1, 0.1, f"OSError: {BAD} {HALF}"))
    told = [facts for stage, facts in read_engine_events(stored.instance, run.run_id) if stage is Stage.CLEANUP]
    assert [facts["failed"] for facts in told] == [f"OSError: bad{MARK}file caf{MARK}"]
    for line in stored.story(run.run_id):
        line.encode()
    state = state_of(stored.instance, run.run_id, "step")
    state[f"{BAD}{HALF}"] = {"half": HALF, "bad": BAD}
    assert dict(state_of(stored.instance, run.run_id, "step")) == {f"{BAD}{HALF}": {"half": HALF, "bad": BAD}}


@pytest.mark.parametrize("make", [started, queued])
def test_tags_that_cannot_be_written_keep_no_run_from_its_end(endpoint: str, make: Any) -> None:
    with open_platform(endpoint, extra=QUEUED) as platform:
        run_id = make(platform)
        with sqlite3.connect(platform.home / "history" / "runs.db") as database:
            database.execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON run_tags WHEN NEW.key LIKE 'dagster-taskiq/canc%'"
                " BEGIN SELECT RAISE(ABORT, 'no tags today'); END"
            )
        assert cancel_run(run_id, reason="wrong file", requested_by="ada", instance=platform.instance)
        assert platform.status(run_id) is (STATUS.CANCELED if make is queued else STATUS.CANCELING)
        if make is started:
            assert cancel_message(platform)["reason"] == "wrong file"
