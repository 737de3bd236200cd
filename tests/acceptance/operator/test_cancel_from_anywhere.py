"""`docs/cancel-from-anywhere.md`: its programs send messages that workers understand. (GraphQL: `test_browser.py`.)"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.conftest import missing
from tests.support.moto import sqs_client
from tests.support.pages import blocks
from tests.support.shell import Shell, path_with_aws

from dagster_taskiq.messages import CancelRequest, read_cancel

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

PAGE = "docs/cancel-from-anywhere.md"
NAME = "dagster-tasks-cancels"


@pytest.fixture(params=["", ".fifo"], ids=["standard", "fifo"])
def queue(request: pytest.FixtureRequest, endpoint: str) -> Iterator[tuple[Any, str]]:
    """A cancel queue: a client, and its URL."""
    client = sqs_client(endpoint)
    attributes = {"FifoQueue": "true"} if request.param else {}
    name = f"{uuid.uuid4().hex}{request.param}"
    yield client, client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
    client.close()


def received(queue: tuple[Any, str]) -> list[CancelRequest]:
    client, url = queue
    messages = client.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", [])
    for message in messages:
        client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
    cancels = [read_cancel(message["Body"]) for message in messages]
    assert all(isinstance(cancel, CancelRequest) for cancel in cancels)
    return cancels  # type: ignore[return-value]


def environment(endpoint: str, **more: str) -> dict[str, str]:
    return os.environ | {"AWS_ENDPOINT_URL": endpoint} | more


def test_with_the_command_line_of_aws(queue: tuple[Any, str], endpoint: str, tmp_path: Path) -> None:
    name = queue[1].rpartition("/")[2]
    fifo = name.endswith(".fifo")
    (block,) = [one for one in blocks(PAGE, "bash") if "send-message" in one.text and (".fifo" in one.text) is fifo]
    shell = Shell(tmp_path, tmp_path, environment(endpoint, PATH=path_with_aws(tmp_path)))
    for _ in range(2):  # the second one is not dropped as a copy of the first
        shell.run(block.text.replace(f"{NAME}.fifo" if fifo else NAME, name))
        (cancel,) = received(queue)
        assert (cancel.task_id, cancel.reason) == ("2c6422e1fc1848a1851fcbac7be2db6b", "wrong partition")


@pytest.mark.nightly
@pytest.mark.long
def test_with_node(queue: tuple[Any, str], endpoint: str, tmp_path: Path) -> None:
    """It installs the AWS SDK from npm."""
    if shutil.which("npm") is None:
        missing("no npm (apt-get install npm)")
    (block,) = blocks(PAGE, "javascript")
    (tmp_path / "cancel.mjs").write_text(block.text)
    environ = environment(endpoint)
    for command in (
        ["npm", "install", "--no-audit", "--no-fund", "@aws-sdk/client-sqs"],
        ["node", "cancel.mjs", queue[1], "t-1", "wrong partition"],
    ):
        subprocess.run(command, cwd=tmp_path, env=environ, check=True)
    (cancel,) = received(queue)
    assert (cancel.task_id, cancel.reason, cancel.requested_by) == ("t-1", "wrong partition", "a service")
    assert cancel.requested_at is not None
