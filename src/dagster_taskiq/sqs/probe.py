"""Requests to AWS that leave nothing behind: for `doctor`. Knows botocore; not what the answers mean.

SQS has no dry run. But it refuses a message that is too large, and a handle that is not valid. Such a request changes
nothing, and when a policy forbids the call, the answer is AccessDenied instead. (A body with a character that SQS does
not allow would be smaller, but emulators accept it, and then it is in the queue.)
"""

import asyncio
import time
import uuid
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Final

from dagster_taskiq.errors import AccessDenied, DagsterTaskiqError, QueueMissing, QueueUnreachable
from dagster_taskiq.queue_names import is_fifo
from dagster_taskiq.sqs.client import check_endpoint
from dagster_taskiq.sqs.errors import MAX_MESSAGE_BYTES, is_missing_permission, translated
from dagster_taskiq.sqs.s3_payloads import PAYLOAD_PREFIX

_TOO_LARGE: Final = "x" * (MAX_MESSAGE_BYTES + 1)
_NO_HANDLE: Final = "dagster-taskiq-doctor"
_WITHIN_S: Final = 10.0
Probe = Callable[[Any, str], Awaitable[Any]]


async def _send(client: Any, url: str) -> None:
    fifo = {"MessageGroupId": "doctor", "MessageDeduplicationId": "doctor"} if is_fifo(url) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # aiohttp warns about the large body
        await client.send_message(QueueUrl=url, MessageBody=_TOO_LARGE, **fifo)


async def _receive(client: Any, url: str) -> None:
    await client.receive_message(QueueUrl=url, MaxNumberOfMessages=11, WaitTimeSeconds=0)


async def _delete(client: Any, url: str) -> None:
    await client.delete_message(QueueUrl=url, ReceiptHandle=_NO_HANDLE)


async def _change(client: Any, url: str) -> None:
    await client.change_message_visibility(QueueUrl=url, ReceiptHandle=_NO_HANDLE, VisibilityTimeout=0)


async def _attributes(client: Any, url: str) -> None:
    await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])


PROBES: Final[Mapping[str, Probe]] = {
    "sqs:SendMessage": _send,
    "sqs:ReceiveMessage": _receive,
    "sqs:DeleteMessage": _delete,
    "sqs:ChangeMessageVisibility": _change,
    "sqs:GetQueueAttributes": _attributes,
}


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """One queue: its attributes, or the reason why they are not known."""

    attributes: Mapping[str, str] = field(default_factory=dict)
    error: DagsterTaskiqError | None = None
    clock_ahead_s: float | None = None
    """How much the clock of this machine is ahead of AWS's."""

    @property
    def exists(self) -> bool:
        """False only when AWS says so."""
        return not isinstance(self.error, QueueMissing)

    @property
    def known(self) -> bool:
        """Whether there are attributes."""
        return self.error is None


async def look_at_queue(client: Any, url: str) -> QueueFacts:
    """Read a queue's attributes."""
    try:
        check_endpoint(client, url)
        with translated(url, client.meta.region_name):
            async with asyncio.timeout(_WITHIN_S):
                answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
    except DagsterTaskiqError as error:
        return QueueFacts(error=error)
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    ahead_s = time.time() - parsedate_to_datetime(date).timestamp() if date else None
    return QueueFacts(dict(answer.get("Attributes", {})), clock_ahead_s=ahead_s)


async def may(client: Any, url: str, action: str) -> bool | None:
    """Whether the credentials allow an action on a queue; None when that is not known."""
    try:
        check_endpoint(client, url)
        with translated(url, client.meta.region_name):
            async with asyncio.timeout(_WITHIN_S):
                await PROBES[action](client, url)
    except AccessDenied as error:
        return False if is_missing_permission(error) else None
    except (QueueMissing, QueueUnreachable, TimeoutError):
        return None
    except DagsterTaskiqError as error:
        # SQS has looked at the request, and does not like it: that is what was wanted.
        return True if error.__cause__ is not None else None
    return True


async def has_credentials() -> bool:
    """Whether there are any credentials, in any place where AWS's libraries look for them."""
    import aioboto3
    from botocore.exceptions import BotoCoreError

    try:
        return await aioboto3.Session().get_credentials() is not None
    except BotoCoreError:
        return False


@dataclass(frozen=True, slots=True)
class BucketTried:
    """What came of writing, reading and deleting an object. `error`: None when all three are possible."""

    error: str | None = None
    denied: bool = False
    missing: bool = False


async def try_bucket(bucket: str, region_name: str) -> BucketTried:
    """Do with an object of our own what workers do: they may do that under the prefix, and nothing else.

    The object is deleted, or expires with the others.
    """
    import aioboto3
    from botocore.exceptions import BotoCoreError, ClientError

    key = f"{PAYLOAD_PREFIX}doctor-{uuid.uuid4().hex}"
    try:
        async with asyncio.timeout(_WITHIN_S), aioboto3.Session().client("s3", region_name=region_name) as s3:
            await s3.put_object(Bucket=bucket, Key=key, Body=b"dagster-taskiq doctor")
            try:
                await s3.get_object(Bucket=bucket, Key=key)
            finally:
                await s3.delete_object(Bucket=bucket, Key=key)
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        return BucketTried(_line(error), denied="AccessDenied" in code, missing=code == "NoSuchBucket")
    except (BotoCoreError, OSError) as error:
        return BucketTried(_line(error))
    return BucketTried()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
