"""Queue names, and what the errors of SQS mean: one clear line each."""

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    ReadTimeoutError,
)
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.errors import (
    AccessDenied,
    DagsterTaskiqError,
    LeaseLost,
    MessageTooLarge,
    QueueError,
    QueueMissing,
    QueueUnreachable,
)
from dagster_taskiq.queue_names import cancel_queue_url, is_fifo, queue_name, steps_queue_url
from dagster_taskiq.sqs.errors import is_missing_permission, translated
from dagster_taskiq.sqs.queue import SQSQueue, batches, group_id, grouping

URL = "https://sqs.eu-west-1.amazonaws.com/123456789012/runs"


@pytest.mark.parametrize(
    ("url", "name", "cancels", "steps", "fifo"),
    [
        (URL, "runs", f"{URL}-cancels", f"{URL}-steps", False),
        (f"{URL}/", "runs", f"{URL}-cancels", f"{URL}-steps", False),
        (f"{URL}.fifo", "runs.fifo", f"{URL}-cancels.fifo", f"{URL}-steps.fifo", True),
        ("http://127.0.0.1:5000/0/a.fifo.b", "a.fifo.b", "http://127.0.0.1:5000/0/a.fifo.b-cancels", None, False),
    ],
)
def test_the_names_of_the_siblings(url: str, name: str, cancels: str, steps: str | None, fifo: bool) -> None:
    assert queue_name(url) == name
    assert cancel_queue_url(url) == cancels
    assert steps is None or steps_queue_url(url) == steps
    assert is_fifo(url) is fifo


def answer(code: str, text: str = "no", status: int = 400) -> ClientError:
    response = {"Error": {"Code": code, "Message": text}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "ReceiveMessage")  # type: ignore[arg-type]


def translation(error: BaseException, *, receipt: bool = False) -> DagsterTaskiqError:
    with pytest.raises(DagsterTaskiqError) as caught, translated(URL, "eu-west-1", receipt=receipt):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    assert URL in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            answer("AWS.SimpleQueueService.NonExistentQueue"),
            QueueMissing,
            "no such queue in region eu-west-1; create it",
        ),
        (answer("QueueDoesNotExist"), QueueMissing, "dagster-taskiq queue create"),
        (answer("com.amazonaws.sqs#QueueDoesNotExist"), QueueMissing, "infra/queues.yaml"),
        (answer("AccessDenied"), AccessDenied, "permissions"),
        (answer("ExpiredToken", "two\nlines", 403), AccessDenied, "two lines"),
        (answer("RequestThrottled"), QueueUnreachable, "could not serve"),
        (answer("InternalError", status=500), QueueUnreachable, "tried again"),
        (answer("AWS.SimpleQueueService.BatchRequestTooLong"), MessageTooLarge, "1,048,576"),
        (answer("InvalidParameterValue", "Message must be shorter than 1048576 bytes."), MessageTooLarge, "limit"),
        (answer("MissingParameter", "The request must contain the parameter MessageGroupId."), QueueError, ".fifo"),
        (answer("InvalidParameterValue"), QueueError, "refused"),
        (NoCredentialsError(), AccessDenied, "AWS_ACCESS_KEY_ID"),
        (NoRegionError(), QueueError, "AWS_REGION"),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1/"), QueueUnreachable, "endpoint_url"),
        (ConnectTimeoutError(endpoint_url="http://10.0.0.1/"), QueueUnreachable, "network"),
        (ReadTimeoutError(endpoint_url="http://10.0.0.1/"), QueueUnreachable, "network"),
        (ParamValidationError(report="bad\nthing"), QueueError, "bad thing"),
        (aiohttp.ClientPayloadError("cut short"), QueueUnreachable, "cut short"),
        (ConnectionResetError(), QueueUnreachable, "ConnectionResetError"),
    ],
)
def test_every_error_says_what_to_do(error: BaseException, kind: type[DagsterTaskiqError], says: str) -> None:
    translated = translation(error)
    assert type(translated) is kind
    assert says in str(translated)


@pytest.mark.parametrize("code", ["MessageNotInflight", "ReceiptHandleIsInvalid", "InvalidParameterValue"])
@pytest.mark.parametrize("prefix", ["", "AWS.SimpleQueueService.", "com.amazonaws.sqs#"])
def test_a_refused_receipt_is_a_lost_lease(prefix: str, code: str) -> None:
    assert type(translation(answer(prefix + code), receipt=True)) is LeaseLost
    assert type(translation(answer(prefix + code))) is QueueError


def test_a_missing_permission_is_not_a_wrong_credential() -> None:
    lacking, wrong = translation(answer("AccessDenied")), translation(answer("InvalidClientTokenId", status=403))
    assert isinstance(lacking, AccessDenied)
    assert isinstance(wrong, AccessDenied)
    assert is_missing_permission(lacking)
    assert not is_missing_permission(wrong)


def test_what_is_no_error_of_sqs_passes() -> None:
    with pytest.raises(ZeroDivisionError), translated(URL):
        raise ZeroDivisionError


@given(st.text(min_size=1))
def test_any_text_makes_a_group_id_that_sqs_takes(text: str) -> None:
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", group_id(text))


@given(st.text(min_size=1), st.text(min_size=1))
def test_distinct_texts_have_distinct_group_ids(one: str, other: str) -> None:
    assert (group_id(one) == group_id(other)) is (one == other)


def test_grouping() -> None:
    assert grouping(False, None) == {}
    assert grouping(False, "job a") == {"MessageGroupId": group_id("job a")}
    assert grouping(True, "t", "t") == {"MessageGroupId": "t", "MessageDeduplicationId": "t"}
    assert grouping(True, "t") != grouping(True, "t")


def test_batches_are_of_ten() -> None:
    assert [len(batch) for batch in batches(range(25))] == [10, 10, 5]
    assert batches([]) == []


class Client:
    """Answers batches as told."""

    def __init__(self, answer: dict[str, Any] | Exception) -> None:
        self.meta = SimpleNamespace(region_name="eu-west-1", endpoint_url="https://sqs.eu-west-1.amazonaws.com")
        self._answer = answer

    async def _request(self, **_: Any) -> dict[str, Any]:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    send_message_batch = delete_message_batch = change_message_visibility_batch = _request


def queue_with(answer: dict[str, Any] | Exception) -> SQSQueue:
    async def client() -> Any:
        return Client(answer)

    return SQSQueue(URL, client)


def test_a_batch_may_fail_in_part_or_as_a_whole() -> None:
    refused = {"Failed": [{"Id": "1", "Code": "InternalError", "Message": "try again"}, {"Id": "2", "Code": "Other"}]}
    bodies: list[tuple[str, dict[str, str]]] = [("a", {}), ("b", {}), ("c", {})]
    assert asyncio.run(queue_with(refused).send_batch(bodies)) == {1: "try again", 2: "Other"}
    assert asyncio.run(queue_with({}).send_batch(bodies)) == {}
    with pytest.raises(AccessDenied, match="permissions"):
        asyncio.run(queue_with(answer("AccessDenied")).send_batch(bodies))


def test_what_cannot_be_deleted_or_handed_back_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    for reply in ({"Failed": [{"Id": "0", "Code": "ReceiptHandleIsInvalid"}]}, answer("RequestThrottled")):
        queue = queue_with(reply)
        asyncio.run(queue.delete_all(["receipt"]))
        asyncio.run(queue.hand_back(["receipt"]))
    assert sum("messages not" in text for text in caplog.messages) == 2
