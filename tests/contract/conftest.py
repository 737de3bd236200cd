"""One suite against every SQS endpoint: moto, LocalStack, or the one that `DAGSTER_TASKIQ_TEST_ENDPOINT` names.

The last may be AWS itself (`DAGSTER_TASKIQ_TEST_ENDPOINT=https://sqs.eu-west-1.amazonaws.com`, with `AWS_REGION` and
credentials as usual): the tests create queues whose names begin with `dagster-taskiq-contract-`, and delete them.
"""

import os
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import suppress

import pytest
from tests.support import moto
from tests.support.moto import CREDENTIALS, create_queues, sqs_client

ENDPOINT_VARIABLE = "DAGSTER_TASKIQ_TEST_ENDPOINT"
GIVEN = os.environ.get(ENDPOINT_VARIABLE)
EMULATORS = ["moto", pytest.param("localstack", marks=pytest.mark.xdist_group("localstack"))]
ON_BOTH = "test_sqs"
"""What is assumed of SQS, and so has to hold on both emulators at every commit; the rest needs LocalStack at night."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        of_test = getattr(item, "callspec", None)
        if of_test is not None and of_test.params.get("kind") == "localstack" and item.path.stem != ON_BOTH:
            item.add_marker(pytest.mark.nightly)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", params=["given"] if GIVEN else EMULATORS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which endpoint it is: each has deviations of its own."""
    return str(request.param)


@pytest.fixture(scope="session")
def endpoint(kind: str, request: pytest.FixtureRequest) -> str:
    return GIVEN if GIVEN is not None else str(request.getfixturevalue(kind))


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    if kind == "given":
        return
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


def _is_aws(endpoint: str) -> bool:
    return (urllib.parse.urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


@pytest.fixture
def new_queues(endpoint: str) -> Iterator["moto.NewQueues"]:
    """Makes work queues with their siblings; they are gone afterwards, where that matters."""
    made: list[str] = []

    def make(*, fifo: bool = False, visibility_timeout_s: int = 30) -> str:
        name = f"dagster-taskiq-contract-{uuid.uuid4().hex[:12]}"
        made.append(create_queues(endpoint, name, fifo, visibility_timeout_s))
        return made[-1]

    yield make
    if _is_aws(endpoint):
        client = sqs_client(endpoint)
        for url in made:
            for sibling in moto.with_siblings(url):
                with suppress(client.exceptions.ClientError):
                    client.delete_queue(QueueUrl=sibling)


@pytest.fixture(params=["standard", "fifo"])
def queue_url(request: pytest.FixtureRequest, new_queues: "moto.NewQueues") -> str:
    """A fresh work queue with its siblings, of either kind."""
    return new_queues(fifo=request.param == "fifo")


@pytest.fixture
def standard_url(new_queues: "moto.NewQueues") -> str:
    """A fresh standard work queue with its siblings."""
    return new_queues()
