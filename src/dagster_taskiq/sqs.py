"""SQS itself: clients, queue names, limits, queues, and what its errors mean. The only module that knows botocore.

Knows nothing of taskiq, of what messages contain, or of who sends and receives.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import aioboto3
import aiohttp
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    TokenRetrievalError,
)

from dagster_taskiq.errors import (
    AccessDenied,
    DagsterTaskiqError,
    LeaseLost,
    MessageTooLarge,
    QueueError,
    QueueMissing,
    QueueUnreachable,
)
from dagster_taskiq.settings import sibling_queue

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

MAX_MESSAGE_BYTES: Final = 1_048_576
MAX_BATCH: Final = 10
CANCEL_VISIBILITY_S: Final = 5
CANCEL_RETENTION_S: Final = 600
WORK_RETENTION_S: Final = 1_209_600
"""Fourteen days, the longest that SQS allows: a message that it drops is a run that never starts."""
_FIFO: Final = ".fifo"


def queue_name(queue_url: str) -> str:
    """The last part of the URL."""
    return queue_url.rstrip("/").rsplit("/", 1)[-1]


def is_fifo(queue_url: str) -> bool:
    """Whether the queue is a FIFO queue: AWS lets exactly those end in `.fifo`."""
    return queue_url.rstrip("/").endswith(_FIFO)


def cancel_queue_url(queue_url: str) -> str:
    """`name` has `name-cancels`, `name.fifo` has `name-cancels.fifo`."""
    return sibling_queue(queue_url, "-cancels")


def steps_queue_url(queue_url: str) -> str:
    """`name` has `name-steps`, `name.fifo` has `name-steps.fifo`."""
    return sibling_queue(queue_url, "-steps")


class Connection:
    """One warm client, opened at first use; it belongs to the event loop that is running then."""

    def __init__(self, region: str | None, endpoint_url: str | None) -> None:
        self.loop = asyncio.get_running_loop()
        self._region = region
        self._endpoint_url = endpoint_url
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._client: SQSClient | None = None

    async def client(self) -> "SQSClient":
        """The client. Raises a `QueueError` when there is no region."""
        async with self._opening:
            if self._client is None:
                config = Config(
                    # Polls, renewals and cancels share one pool: with the default of 10, polls starve renewals.
                    max_pool_connections=50,
                    connect_timeout=3,
                    read_timeout=30,  # must outlast the longest long poll, 20 s
                    retries={"mode": "standard", "total_max_attempts": 3},
                )
                session = aioboto3.Session()
                with translated("SQS", self._region):
                    opening = session.client(
                        "sqs", region_name=self._region, endpoint_url=self._endpoint_url, config=config
                    )
                    opened: SQSClient = await self._stack.enter_async_context(opening)
                self._client = opened
            return self._client

    async def close(self) -> None:
        """Close the client; the next use opens another one."""
        async with self._opening:
            self._client = None
            await self._stack.aclose()


def warm_up() -> None:
    """Import and load what making a client takes, without a request and without looking for credentials."""

    async def make() -> None:
        known = {"aws_access_key_id": "warm-up", "aws_secret_access_key": "warm-up", "region_name": "us-east-1"}
        async with aioboto3.Session().client("sqs", **known):
            pass

    asyncio.run(make())


# Error codes without their prefixes ("AWS.SimpleQueueService.", "com.amazonaws.sqs#").
MISSING_CODES: Final = {"NonExistentQueue", "QueueDoesNotExist", "InvalidAddress"}
_DENIED: Final = {
    "AccessDenied",
    "AccessDeniedException",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "SignatureDoesNotMatch",
    "IncompleteSignature",
    "InvalidSecurity",
    "ExpiredToken",
    "ExpiredTokenException",
    "MissingAuthenticationToken",
    "OptInRequired",
    "KmsAccessDenied",
    "KMS.AccessDeniedException",
}
_THROTTLED: Final = {"Throttling", "ThrottlingException", "RequestThrottled", "OverLimit", "TooManyRequestsException"}
LOST_CODES: Final = {"MessageNotInflight", "ReceiptHandleIsInvalid", "InvalidParameterValue"}
_TOO_LARGE: Final = {"BatchRequestTooLong"}


@contextmanager
def translated(queue_url: str, region: str | None = None, *, receipt: bool = False) -> Iterator[None]:
    """What botocore and its transport raise inside leaves as one of our errors, with the next step in its text.

    `receipt`: the request names a receipt handle, so that a refusal of its parameters means a lost lease.
    """
    try:
        yield
    except ClientError as error:
        raise _from_answer(error, queue_url, region, receipt=receipt) from error
    except BotoCoreError as error:
        raise _from_client(error, queue_url, region) from error
    except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
        raise QueueUnreachable(f"{queue_url}: no answer from SQS ({_line(error)}); check the network") from error


def _from_answer(error: ClientError, url: str, region: str | None, *, receipt: bool) -> DagsterTaskiqError:
    answer = error.response.get("Error", {})
    code = re.split(r"[#]|SimpleQueueService\.", str(answer.get("Code", "")))[-1]
    text = " ".join(str(answer.get("Message", "")).split())
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
    if code in MISSING_CODES:
        where = f" in region {region}" if region else ""
        return QueueMissing(
            f"{url}: no such queue{where}; create it with 'dagster-taskiq queue create' or infra/queues.yaml"
        )
    if code in _DENIED or status in {401, 403}:
        return AccessDenied(f"{url}: AWS refused {error.operation_name} ({code}: {text}); check the role's permissions")
    if code in _THROTTLED or status >= 500:
        return QueueUnreachable(f"{url}: SQS could not serve {error.operation_name} now ({code}); it is tried again")
    if receipt and code in LOST_CODES:
        return LeaseLost(f"{url}: the message is no longer ours ({code}: {text})")
    if code in _TOO_LARGE or "shorter than" in text:
        return MessageTooLarge(f"{url}: message over the SQS limit of {MAX_MESSAGE_BYTES:,} bytes ({text})")
    if "MessageGroupId" in text or "MessageDeduplicationId" in text:
        return QueueError(
            f"{url}: FIFO and standard queue mixed up ({text}); the URL of a FIFO queue, and no other, ends in .fifo"
        )
    return QueueError(f"{url}: SQS refused {error.operation_name} ({code}: {text})")


def _from_client(error: BotoCoreError, url: str, region: str | None) -> QueueError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | TokenRetrievalError):
        return AccessDenied(
            f"{url}: no usable AWS credentials ({_line(error)});"
            " give the task an IAM role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, NoRegionError):
        return QueueError(f"{url}: no AWS region; set region_name in the configuration, or the variable AWS_REGION")
    if isinstance(error, ParamValidationError):
        return QueueError(f"{url}: not a valid request ({_line(error)})")
    where = f" in region {region}" if region else ""
    return QueueUnreachable(f"{url}: cannot reach SQS{where} ({_line(error)}); check the network and endpoint_url")


def is_missing_permission(error: AccessDenied) -> bool:
    """Whether the credentials are fine and only lack this permission."""
    cause = error.__cause__
    return isinstance(cause, ClientError) and str(cause.response["Error"].get("Code")).startswith("AccessDenied")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """One queue as it is now. Counts are SQS's approximations; `warnings` are sentences for a person."""

    role: str
    url: str
    exists: bool
    fifo: bool
    visible: int = 0
    in_flight: int = 0
    delayed: int = 0
    visibility_timeout_s: int = 0
    retention_s: int = 0
    has_redrive: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The queue's name."""
        return queue_name(self.url)


def queue_urls(queue_url: str) -> Mapping[str, str]:
    """Role to URL of the queues that belong together: work, steps, cancels."""
    return {"work": queue_url, "steps": steps_queue_url(queue_url), "cancels": cancel_queue_url(queue_url)}


async def create_queues(
    client: "SQSClient", queue_url: str, *, visibility_timeout_s: int = 30, steps: bool = True
) -> tuple[str, ...]:
    """Create those of the queues that do not exist; existing ones are left as they are. Returns the names created."""
    created = []
    for role, url in queue_urls(queue_url).items():
        if role == "steps" and not steps:
            continue
        with translated(url, client.meta.region_name):
            try:
                await client.get_queue_url(QueueName=queue_name(url))
            except client.exceptions.QueueDoesNotExist:
                attributes = _attributes(role, visibility_timeout_s, fifo=is_fifo(url))
                await client.create_queue(QueueName=queue_name(url), Attributes=attributes)
                created.append(queue_name(url))
    return tuple(created)


def _attributes(role: str, visibility_timeout_s: int, *, fifo: bool) -> dict[Any, str]:
    attributes = {
        "ReceiveMessageWaitTimeSeconds": "20",
        "VisibilityTimeout": str(visibility_timeout_s),
        "MessageRetentionPeriod": str(WORK_RETENTION_S),
    }
    if role == "cancels":
        # No redrive policy: every hand-back counts as a receive, so a dead-letter queue would swallow live cancels.
        attributes |= {"VisibilityTimeout": str(CANCEL_VISIBILITY_S), "MessageRetentionPeriod": str(CANCEL_RETENTION_S)}
    if fifo:
        attributes |= {
            "FifoQueue": "true",
            "DeduplicationScope": "messageGroup",
            "FifoThroughputLimit": "perMessageGroupId",
        }
    return attributes


async def queue_status(client: "SQSClient", queue_url: str) -> tuple[QueueStatus, ...]:
    """What work, steps and cancel queue are like. A queue that does not exist is part of the answer, not an error."""
    return tuple([await _status(client, role, url) for role, url in queue_urls(queue_url).items()])


async def _status(client: "SQSClient", role: str, url: str) -> QueueStatus:
    try:
        with translated(url, client.meta.region_name):
            answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
    except QueueMissing as error:
        return QueueStatus(role, url, exists=False, fifo=is_fifo(url), warnings=(str(error),))
    known: dict[Any, str] = dict(answer.get("Attributes", {}))
    counts = {field: int(known.get(attribute, 0)) for attribute, field in _COUNTS.items()}
    fifo, redrive = known.get("FifoQueue") == "true", bool(known.get("RedrivePolicy"))
    status = QueueStatus(role, url, exists=True, fifo=fifo, has_redrive=redrive, warnings=(), **counts)
    return replace(status, warnings=_warnings(status))


_COUNTS: Final = {
    "ApproximateNumberOfMessages": "visible",
    "ApproximateNumberOfMessagesNotVisible": "in_flight",
    "ApproximateNumberOfMessagesDelayed": "delayed",
    "VisibilityTimeout": "visibility_timeout_s",
    "MessageRetentionPeriod": "retention_s",
}


def _warnings(status: QueueStatus) -> tuple[str, ...]:
    found = []
    if status.fifo != is_fifo(status.url):
        found.append(f"{status.name}: FIFO queues, and no others, have names that end in .fifo; sending will fail")
    if status.role == "cancels" and status.has_redrive:
        found.append(f"{status.name}: remove its RedrivePolicy; it swallows cancel messages that are handed on")
    if status.role == "cancels" and status.visibility_timeout_s > 30:
        found.append(
            f"{status.name}: lower its VisibilityTimeout to {CANCEL_VISIBILITY_S} s; a lost poll hides cancels"
        )
    if status.role == "cancels" and status.retention_s > 3_600:
        found.append(
            f"{status.name}: lower its MessageRetentionPeriod to {CANCEL_RETENTION_S} s; old cancels only cost"
        )
    return tuple(found)
