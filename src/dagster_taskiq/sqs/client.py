"""Clients of SQS. Knows connections and limits; not queues, messages or taskiq."""

import asyncio
from contextlib import AsyncExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from dagster_taskiq.errors import QueueError
from dagster_taskiq.sqs.errors import translated

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

MAX_BATCH: Final = 10


def split_endpoint(endpoint_url: str | None) -> tuple[str | None, dict[str, str]]:
    """An endpoint, and the credentials in it (`http://key:secret@host`), as arguments for a client.

    An emulator takes any, so those of the environment stay free for who needs them.
    """
    parts = urlsplit(endpoint_url or "")
    if parts.username is None:
        return endpoint_url, {}
    without = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return without, {
        "aws_access_key_id": unquote(parts.username),
        "aws_secret_access_key": unquote(parts.password or ""),
    }


def check_endpoint(client: "SQSClient", queue_url: str) -> None:
    """Raises `QueueError` when requests about an emulator's queue would go to AWS.

    The endpoint decides where they go, not the queue's URL; AWS would answer that it knows no such queue.
    """
    _check_endpoint(client.meta.endpoint_url, queue_url)


@lru_cache(maxsize=64)
def _check_endpoint(endpoint_url: str, queue_url: str) -> None:
    if _is_aws(endpoint_url) and not _is_aws(queue_url):
        parts = urlsplit(queue_url)
        raise QueueError(
            f"{queue_url}: this is not a queue of AWS, and there is no endpoint_url; set endpoint_url to"
            f" {parts.scheme}://{parts.netloc} beside queue_url, or in the variable DAGSTER_TASKIQ_SQS_ENDPOINT_URL"
        )


def _is_aws(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


class Connection:
    """One warm client, opened when it is first used. It belongs to the event loop that is running then."""

    def __init__(self, region: str | None, endpoint_url: str | None) -> None:
        self.loop = asyncio.get_running_loop()
        self._region = region
        self._endpoint_url, self._credentials = split_endpoint(endpoint_url)
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._client: SQSClient | None = None

    async def client(self) -> "SQSClient":
        """The client. Raises a `QueueError` when there is no region."""
        async with self._opening:
            if self._client is None:
                import aioboto3
                from botocore.config import Config

                config = Config(
                    # Polls, renewals and cancels share one pool: with the default of 10, renewals would wait for polls.
                    max_pool_connections=50,
                    connect_timeout=3,
                    read_timeout=30,  # longer than the longest long poll, 20 s; `queue` has a bound for each request
                    retries={"mode": "standard", "total_max_attempts": 3},
                )
                session = aioboto3.Session()
                with translated("SQS", self._region):
                    opening = session.client(
                        "sqs",
                        region_name=self._region,
                        endpoint_url=self._endpoint_url,
                        config=config,
                        **self._credentials,
                    )
                    opened: SQSClient = await self._stack.enter_async_context(opening)
                self._client = opened
            return self._client

    async def close(self) -> None:
        """Close the client; the next use opens another one."""
        async with self._opening:
            self._client = None
            await self._stack.aclose()


WARM_UP: Final = "dagster_taskiq.sqs.client:warm_up"


def warm_up() -> None:
    """Import and load what a new client needs, without a request and without looking for credentials."""
    import aioboto3

    async def make() -> None:
        known = {"aws_access_key_id": "warm-up", "aws_secret_access_key": "warm-up", "region_name": "us-east-1"}
        async with aioboto3.Session().client("sqs", **known):
            pass

    asyncio.run(make())
