"""Payloads too large for a message of SQS, in an S3 bucket by their task id. Knows botocore; not their content.

Messages never name an object, so with access to a queue one cannot make a worker read another object.
"""

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final

from dagster_taskiq.errors import PayloadUnavailable

PAYLOAD_PREFIX: Final = "dagster-taskiq/payloads/"
"""Of every object; infra/queues.yaml allows nothing else."""
MAX_PAYLOAD_BYTES: Final = 64 * 1024 * 1024
WITHIN_S: Final = 60.0
"""For one object, further tries included. An attempt that hears nothing for ten seconds is given up before that."""
_CONNECT_WITHIN_S: Final = 3
_HEAR_WITHIN_S: Final = 10


class PayloadBucket:
    """The objects of one bucket. For another endpoint than that of AWS, set the variable `AWS_ENDPOINT_URL_S3`."""

    def __init__(self, bucket: str, region_name: str) -> None:
        self.bucket = bucket
        self._region_name = region_name
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def put(self, task_id: str, payload: str) -> None:
        """Store the payload of a task. Raises `PayloadUnavailable`."""
        await self._request("put_object", task_id, Body=payload.encode())

    async def get(self, task_id: str) -> str:
        """The payload of a task. Raises `PayloadUnavailable`, also when there is none."""
        data: bytes = await self._request("get_object", task_id, read=True)
        return data.decode("ascii", errors="replace")

    async def delete(self, task_id: str) -> None:
        """Delete the payload of a task. Raises `PayloadUnavailable`."""
        await self._request("delete_object", task_id)

    async def close(self) -> None:
        """Close the client; the next use opens another one."""
        async with self._opening:
            self._client = None
            await self._stack.aclose()

    async def _request(self, operation: str, task_id: str, *, read: bool = False, **arguments: Any) -> Any:
        """The answer; `read`: the object that comes with it."""
        import aiohttp
        from botocore.exceptions import BotoCoreError, ClientError

        key = f"{PAYLOAD_PREFIX}{task_id}"
        try:
            async with asyncio.timeout(WITHIN_S):
                await self._open()
                answer = await getattr(self._client, operation)(Bucket=self.bucket, Key=key, **arguments)
                return await self._read(answer, key) if read else answer
        except (ClientError, BotoCoreError, aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            cause = " ".join(str(error).split()) or f"no answer within {WITHIN_S:g} s"
            raise PayloadUnavailable(
                f"s3://{self.bucket}/{key}: {cause}; check payload_bucket and the permissions on it"
            ) from error

    async def _open(self) -> None:
        import aioboto3
        from botocore.config import Config

        async with self._opening:
            if self._client is None:
                config = Config(
                    connect_timeout=_CONNECT_WITHIN_S,
                    read_timeout=_HEAR_WITHIN_S,
                    retries={"mode": "standard", "total_max_attempts": 3},
                )
                opening = aioboto3.Session().client("s3", region_name=self._region_name, config=config)
                self._client = await self._stack.enter_async_context(opening)

    async def _read(self, answer: Any, key: str) -> bytes:
        if answer["ContentLength"] > MAX_PAYLOAD_BYTES:
            raise PayloadUnavailable(f"s3://{self.bucket}/{key}: over {MAX_PAYLOAD_BYTES:,} bytes")
        async with answer["Body"] as body:
            data: bytes = await body.read()
        return data
