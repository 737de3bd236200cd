"""A moto SQS server in a process of its own, on loopback and a free port."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import botocore.session
from botocore.config import Config

from dagster_taskiq.queue_names import sibling_queue

REGION = os.environ.get("AWS_REGION", "us-east-1") if "DAGSTER_TASKIQ_TEST_ENDPOINT" in os.environ else "us-east-1"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_SESSION_TOKEN": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}

ENDS_WITH_US = "import ctypes\nctypes.CDLL(None).prctl(1, 9)\n"
"""The beginning of a program that ends when the thread that has started it does (PR_SET_PDEATHSIG)."""


LOOPBACK = "127.0.0.1"
START_WITHIN_S = 100
"""Against a hang only: on a machine that does much else, all imports of a server have taken more than 30 s."""
PORTS = 3
"""While a server imports, somebody else's connection may be given the port that was free."""


def free_port() -> int:
    """A port on loopback that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextmanager
def moto_server() -> Iterator[str]:
    """Start a server and give its URL; it is gone afterwards."""
    server, url = _start()
    try:
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _start() -> "tuple[subprocess.Popen[bytes], str]":
    for _ in range(PORTS):
        port = free_port()
        server = subprocess.Popen(
            [
                sys.executable,
                "-c",
                ENDS_WITH_US + "from moto.server import main\nmain()",
                "-H",
                LOOPBACK,
                "-p",
                str(port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **CREDENTIALS},
        )
        if answers(server, port, "/moto-api/data.json"):
            return server, f"http://{LOOPBACK}:{port}"
        server.kill()
        server.wait()
    raise RuntimeError(f"moto started on none of {PORTS} ports (last exit code: {server.returncode})")


def answers(server: "subprocess.Popen[bytes]", port: int, path: str) -> bool:
    """Wait until the server says that it is well; False: it has ended, or does not within `START_WITHIN_S`."""
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and server.poll() is None:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200 and server.poll() is None:
                return True
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()
    return False


def sqs_client(endpoint: str, region: str = REGION) -> Any:
    """A synchronous client, to look at queues from outside."""
    return aws_client("sqs", endpoint, region)


@lru_cache
def aws_client(service: str, endpoint: str, region: str = REGION) -> Any:
    """A synchronous client of any service. Shared, because making one takes a while."""
    session = botocore.session.Session()
    if "DAGSTER_TASKIQ_TEST_ENDPOINT" not in os.environ:
        session.set_credentials("testing", "testing")
    return session.create_client(
        service, region_name=region, endpoint_url=endpoint, config=Config(retries={"total_max_attempts": 1})
    )


class NewQueues(Protocol):
    """Makes a work queue with its siblings, and gives its URL."""

    def __call__(self, *, fifo: bool = False, visibility_timeout_s: int = 30) -> str: ...


def with_siblings(queue_url: str) -> list[str]:
    """The URLs of the work, steps and cancel queue."""
    return [sibling_queue(queue_url, suffix) for suffix in ("", "-steps", "-cancels")]


def create_queues(endpoint: str, name: str, fifo: bool = False, visibility_timeout_s: int = 30) -> str:
    """Create the work, steps and cancel queue of that name (without `.fifo`); the work queue's URL."""
    client = sqs_client(endpoint)
    ending = ".fifo" if fifo else ""
    attributes = {"FifoQueue": "true"} if fifo else {}
    for suffix, seconds in (("-steps", visibility_timeout_s), ("-cancels", 5), ("", visibility_timeout_s)):
        url = client.create_queue(
            QueueName=f"{name}{suffix}{ending}", Attributes={**attributes, "VisibilityTimeout": str(seconds)}
        )["QueueUrl"]
    return str(url)
