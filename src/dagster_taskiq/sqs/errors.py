"""Errors of botocore and its transport in our words, with the next step. Knows error codes, not requests."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from dagster_taskiq.errors import (
    AccessDenied,
    DagsterTaskiqError,
    LeaseLost,
    MessageTooLarge,
    QueueError,
    QueueMissing,
    QueueUnreachable,
)

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError
    from types_aiobotocore_sqs.type_defs import BatchResultErrorEntryTypeDef

MAX_MESSAGE_BYTES: Final = 1_048_576
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
    """Turn errors of botocore and its transport into ours, with the next step in the text.

    `receipt`: the request has a receipt handle, so refused parameters mean a lost lease.
    """
    try:
        yield
    except Exception as error:
        ours = _in_our_words(error, queue_url, region, receipt=receipt)
        if ours is None:
            raise
        raise ours from error


def refusal(queue_url: str, refused: "BatchResultErrorEntryTypeDef") -> QueueError:
    """Why one entry of a batch was refused that has a receipt handle."""
    code, text = _bare(refused["Code"]), " ".join(refused.get("Message", "").split())
    if code in LOST_CODES:
        return LeaseLost(f"{queue_url}: the message is no longer ours ({code}: {text})")
    return QueueUnreachable(f"{queue_url}: SQS could not serve one entry of a batch now ({code}: {text})")


def _bare(code: str) -> str:
    return re.split(r"[#]|SimpleQueueService\.", code)[-1]


def _in_our_words(error: Exception, url: str, region: str | None, *, receipt: bool) -> DagsterTaskiqError | None:
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    if isinstance(error, ClientError):
        return _from_answer(error, url, region, receipt=receipt)
    if isinstance(error, BotoCoreError):
        return _from_client(error, url, region)
    if isinstance(error, aiohttp.ClientError | OSError):  # TimeoutError is an OSError
        return QueueUnreachable(f"{url}: no answer from SQS ({_line(error)}); check the network")
    return None


def _from_answer(error: "ClientError", url: str, region: str | None, *, receipt: bool) -> DagsterTaskiqError:
    answer = error.response.get("Error", {})
    code = _bare(str(answer.get("Code", "")))
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


def _from_client(error: "BotoCoreError", url: str, region: str | None) -> QueueError:
    from botocore.exceptions import (
        CredentialRetrievalError,
        NoCredentialsError,
        NoRegionError,
        ParamValidationError,
        PartialCredentialsError,
        TokenRetrievalError,
    )

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
    """Whether the credentials are valid and only this permission is missing."""
    from botocore.exceptions import ClientError

    cause = error.__cause__
    return isinstance(cause, ClientError) and str(cause.response["Error"].get("Code")).startswith("AccessDenied")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
