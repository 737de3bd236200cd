"""How steps are sent."""

import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from dagster import DagsterInstance, job

from dagster_taskiq.errors import DagsterTaskiqError, SettingsError
from dagster_taskiq.executor import _MOST_STATE, SQSStepHandler, _limits
from dagster_taskiq.messages import StepMessage
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.tags import QUEUE_TAG, ROUTE_TAG, RUN_ID_TAG, TASK_ID_TAG

SETTINGS = Settings(
    queue_url="http://127.0.0.1:1/1/tasks",
    region_name="us-east-1",
    endpoint_url="http://127.0.0.1:1",
    payload_bucket="payloads",
)


def test_a_slow_bucket_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together the states of a batch may take longer than any request to SQS may."""
    kept: list[str] = []

    class SlowBucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.3)
            kept.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    monkeypatch.setattr("dagster_taskiq.tasks.producer.REQUEST_TIMEOUT_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowBucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_port}"}
        for name, value in {**environment, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
            monkeypatch.setenv(name, value)
        run_id, state = "1dc80e42-cefb-4add-9b4e-77c668a79ced", "x" * (_MOST_STATE + 1)
        messages = [
            StepMessage(run_id, key, attempt=1, retries="disabled", reexecution=False, state=state)
            for key in ("a", "b")
        ]
        handler = SQSStepHandler(SETTINGS)
        try:
            # Nobody is behind the queue's address: what is asked for here is what comes before.
            with suppress(DagsterTaskiqError, TimeoutError):
                handler.send(messages, "job")
        finally:
            handler.close()
            server.shutdown()
    assert [path.rpartition("/")[2].split("?")[0] for path in kept] == [one.task_id for one in messages]


@job
def nothing() -> None: ...


def test_steps_go_with_their_run_whoever_has_launched_it() -> None:
    handler = SQSStepHandler(SETTINGS)
    table = {
        "ours, to a route": ({TASK_ID_TAG: "1", ROUTE_TAG: "gpu", QUEUE_TAG: "other"}, "gpu"),
        "ours, of a version without routes": ({TASK_ID_TAG: "1", QUEUE_TAG: "other"}, "default"),
        "another launcher's": ({QUEUE_TAG: "gpu"}, "gpu"),
        "another launcher's, copied": ({TASK_ID_TAG: "1", ROUTE_TAG: "x", RUN_ID_TAG: "of another"}, "default"),
    }
    with DagsterInstance.ephemeral() as instance:
        for case, (tags, route) in table.items():
            run = instance.create_run_for_job(nothing, tags=tags)
            assert handler.route_of(instance, run) == route, case


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"GPU": 1}, "max_concurrent_by_route: 'GPU' is not the name of a route"),
        ({"gpu": 0}, "max_concurrent_by_route: the limit of gpu must be a whole number, at least 1, not 0"),
    ],
)
def test_limits_by_route_are_checked(limits: dict[str, int], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        _limits({"max_concurrent_by_route": limits})


def test_limits_by_route_are_limits_of_tags_for_dagster() -> None:
    own = {"key": "database", "limit": 3}
    assert _limits({"tag_concurrency_limits": [own], "max_concurrent_by_route": {"gpu": 2}}) == [
        own,
        {"key": ROUTE_TAG, "value": "gpu", "limit": 2},
    ]
    assert _limits({"max_concurrent_by_route": None}) is None
