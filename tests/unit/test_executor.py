"""How steps are sent."""

import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.executor import _MOST_STATE, SQSStepHandler
from dagster_taskiq.messages import StepMessage
from dagster_taskiq.settings import Settings

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
