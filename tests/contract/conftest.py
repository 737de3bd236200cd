"""One suite against an SQS endpoint: a moto server in its own process."""

import uuid
from collections.abc import Iterator

import pytest
from tests.support.moto import CREDENTIALS, create_queues, moto_server


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


@pytest.fixture(params=["standard", "fifo"])
def queue_url(request: pytest.FixtureRequest, endpoint: str) -> str:
    """A fresh work queue with its siblings, of either kind."""
    return create_queues(endpoint, f"q-{uuid.uuid4().hex[:12]}", fifo=request.param == "fifo")


@pytest.fixture
def standard_url(endpoint: str) -> str:
    """A fresh standard work queue with its siblings."""
    return create_queues(endpoint, f"q-{uuid.uuid4().hex[:12]}")
