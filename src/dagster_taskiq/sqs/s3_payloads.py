"""Payloads too large for a message of SQS, in an S3 bucket by their task id. Knows botocore; not their content.

Messages never name an object, so with access to a queue one cannot make a worker read another object.
"""

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final

from dagster_taskiq.errors import PayloadUnavailable

_PREFIX: Final = "dagster-taskiq/payloads/"
MAX_PAYLOAD_BYTES: Final = 64 * 1024 * 1024


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
        answer = await self._request("get_object", task_id)
        if answer["ContentLength"] > MAX_PAYLOAD_BYTES:
            raise PayloadUnavailable(f"s3://{self.bucket}/{_PREFIX}{task_id}: over {MAX_PAYLOAD_BYTES:,} bytes")
        async with answer["Body"] as body:
            data: bytes = await body.read()
        return data.decode("ascii", errors="replace")

    async def delete(self, task_id: str) -> None:
        """Delete the payload of a task. Raises `PayloadUnavailable`."""
        await self._request("delete_object", task_id)

    async def close(self) -> None:
        """Close the client; the next use opens another one."""
        async with self._opening:
            self._client = None
            await self._stack.aclose()

    async def _request(self, operation: str, task_id: str, **arguments: Any) -> Any:
        import aioboto3
        from botocore.exceptions import BotoCoreError, ClientError

        key = f"{_PREFIX}{task_id}"
        try:
            async with self._opening:
                if self._client is None:
                    opening = aioboto3.Session().client("s3", region_name=self._region_name)
                    self._client = await self._stack.enter_async_context(opening)
            return await getattr(self._client, operation)(Bucket=self.bucket, Key=key, **arguments)
        except (ClientError, BotoCoreError, OSError) as error:
            cause = " ".join(str(error).split())
            raise PayloadUnavailable(
                f"s3://{self.bucket}/{key}: {cause}; check payload_bucket and the permissions on it"
            ) from error
