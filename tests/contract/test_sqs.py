"""What this package assumes of SQS, without this package: the same lines for AWS and for whatever stands in for it.

Where an emulator is known to differ from AWS, the test says so and expects it to (`DEVIATIONS`): one that is mended is
noticed. The source of each expectation is AWS's documentation of the API action.
"""

import json
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tests.support.moto import REGION, NewQueues, sqs_client

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.sqs.errors import LOST_CODES, MISSING_CODES

pytestmark = [pytest.mark.slow]

MIB = 1_048_576
DEVIATIONS = {
    "test_nothing_is_hidden_for_more_than_twelve_hours": {"localstack"},
    "test_a_fifo_queue_drops_a_duplicate_even_when_the_first_one_is_gone": {"moto"},
    "test_a_fifo_message_with_an_expired_receipt_is_not_deleted": {"moto"},
    "test_a_message_has_a_mebibyte_in_bytes_not_characters": {"moto"},
    "test_a_poll_of_a_fifo_queue_wakes_when_its_group_is_free_again": {"moto"},
}


@pytest.fixture(autouse=True)
def _known_deviations(request: pytest.FixtureRequest, kind: str) -> None:
    if kind in DEVIATIONS.get(request.node.originalname, ()):
        request.applymarker(pytest.mark.xfail(strict=True, reason=f"known of {kind}"))


class Queue:
    """One queue, seen by somebody who knows only SQS."""

    def __init__(self, endpoint: str, url: str) -> None:
        self.url = url
        self.fifo = url.endswith(".fifo")
        self.client = sqs_client(endpoint, REGION)

    def send(self, body: str = "x", group: str = "g", key: str | None = None) -> str:
        fifo = {"MessageGroupId": group, "MessageDeduplicationId": key or uuid.uuid4().hex} if self.fifo else {}
        return str(self.client.send_message(QueueUrl=self.url, MessageBody=body, **fifo)["MessageId"])

    def receive(self, wait: int = 1, count: int = 1, **options: Any) -> list[dict[str, Any]]:
        answer = self.client.receive_message(
            QueueUrl=self.url,
            MaxNumberOfMessages=count,
            WaitTimeSeconds=wait,
            MessageSystemAttributeNames=["All"],
            **options,
        )
        return list(answer.get("Messages", []))

    def receive_one(self, within: float = 20, **options: Any) -> dict[str, Any]:
        until = time.monotonic() + within
        while time.monotonic() < until:
            if found := self.receive(**options):
                return found[0]
        raise AssertionError(f"no message within {within} s")

    def hide(self, message: dict[str, Any], seconds: int) -> None:
        self.client.change_message_visibility(
            QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=seconds
        )

    def delete(self, message: dict[str, Any]) -> None:
        self.client.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])

    def counts(self) -> tuple[int, int]:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        known = self.client.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)["Attributes"]
        return int(known[names[0]]), int(known[names[1]])


@pytest.fixture
def queue(endpoint: str, queue_url: str) -> Queue:
    """Of either kind."""
    return Queue(endpoint, queue_url)


@pytest.fixture
def standard(endpoint: str, new_queues: NewQueues) -> Queue:
    return Queue(endpoint, new_queues())


@pytest.fixture
def fifo(endpoint: str, new_queues: NewQueues) -> Queue:
    return Queue(endpoint, new_queues(fifo=True))


def code_of(call: Callable[[], object]) -> str:
    """The error's code without prefixes."""
    with pytest.raises(ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"]).rpartition(".")[2].rpartition("#")[2]


def test_a_send_wakes_a_poll_that_waits(queue: Queue) -> None:
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        waiting = pool.submit(queue.receive, 15)
        time.sleep(0.5)  # the poll is on its way; should it not have arrived, this proves less
        queue.send()
        assert len(waiting.result(20)) == 1
    assert time.monotonic() - began < 10


def test_an_empty_poll_waits_as_long_as_it_was_told(queue: Queue) -> None:
    began = time.monotonic()
    assert queue.receive(wait=2) == []
    assert time.monotonic() - began > 1.5


def test_what_was_received_is_hidden_and_comes_again_with_a_higher_count(queue: Queue) -> None:
    sent = queue.send()
    first = queue.receive_one(VisibilityTimeout=2)
    assert first["MessageId"] == sent
    assert first["Attributes"]["ApproximateReceiveCount"] == "1"
    assert queue.receive(wait=0) == []
    again = queue.receive_one()
    assert again["MessageId"] == sent
    assert again["Attributes"]["ApproximateReceiveCount"] == "2"


def test_the_time_of_sending_is_in_milliseconds(queue: Queue) -> None:
    queue.send()
    attributes = queue.receive_one()["Attributes"]
    assert abs(int(attributes["SentTimestamp"]) / 1000 - time.time()) < 60


def test_a_lease_that_is_renewed_lasts(queue: Queue) -> None:
    queue.send()
    message = queue.receive_one(VisibilityTimeout=2)
    queue.hide(message, 20)
    assert queue.receive(wait=4) == []
    queue.delete(message)


def test_handed_back_it_is_there_at_once(queue: Queue) -> None:
    sent = queue.send()
    queue.hide(queue.receive_one(), 0)
    again = queue.receive_one(within=5)
    assert again["MessageId"] == sent
    assert again["Attributes"]["ApproximateReceiveCount"] == "2"


def test_handed_back_with_a_delay_it_comes_later(queue: Queue) -> None:
    queue.send()
    queue.hide(queue.receive_one(), 2)
    assert queue.receive(wait=0) == []
    assert queue.receive_one(within=10)


def test_nothing_is_hidden_for_more_than_twelve_hours(queue: Queue) -> None:
    queue.send()
    message = queue.receive_one()
    assert code_of(lambda: queue.hide(message, 43_201)) == "InvalidParameterValue"
    queue.delete(message)


def test_deleted_is_deleted_and_twice_is_no_error(queue: Queue) -> None:
    queue.send()
    message = queue.receive_one(VisibilityTimeout=1)
    queue.delete(message)
    queue.delete(message)
    assert queue.receive(wait=2) == []


def test_a_deleted_message_has_no_lease_to_renew(queue: Queue) -> None:
    queue.send()
    message = queue.receive_one()
    queue.delete(message)
    assert code_of(lambda: queue.hide(message, 5)) in LOST_CODES


def test_a_receipt_that_never_was_is_refused(queue: Queue) -> None:
    nonsense = {"ReceiptHandle": "nonsense"}
    assert code_of(lambda: queue.hide(nonsense, 5)) in LOST_CODES
    assert code_of(lambda: queue.delete(nonsense)) in LOST_CODES


def test_a_fifo_message_with_an_expired_receipt_is_not_deleted(fifo: Queue) -> None:
    fifo.send()
    message = fifo.receive_one(VisibilityTimeout=1)
    time.sleep(1.5)
    assert code_of(lambda: fifo.delete(message)) in LOST_CODES
    assert fifo.receive_one()


def test_a_group_waits_for_its_first_and_others_do_not(fifo: Queue) -> None:
    fifo.send("a1", group="a")
    fifo.send("a2", group="a")
    fifo.send("b1", group="b")
    first = fifo.receive_one()
    assert first["Body"] == "a1"
    assert fifo.receive_one()["Body"] == "b1"
    assert fifo.receive(wait=0) == []
    fifo.delete(first)
    assert fifo.receive_one(within=10)["Body"] == "a2"


def test_a_poll_of_a_fifo_queue_wakes_when_its_group_is_free_again(fifo: Queue) -> None:
    fifo.send("a1", group="a")
    fifo.send("a2", group="a")
    first = fifo.receive_one()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fifo.receive, 10)
        time.sleep(0.5)
        fifo.delete(first)
        assert [message["Body"] for message in waiting.result(15)] == ["a2"]


def test_a_fifo_queue_drops_a_duplicate(fifo: Queue) -> None:
    fifo.send("first", group="a", key="k")
    fifo.send("second", group="a", key="k")
    fifo.delete(fifo.receive_one())
    assert fifo.receive(wait=1) == []


def test_a_fifo_queue_drops_a_duplicate_even_when_the_first_one_is_gone(fifo: Queue) -> None:
    fifo.send("first", group="a", key="k")
    fifo.delete(fifo.receive_one())
    fifo.send("second", group="a", key="k")
    assert fifo.receive(wait=1) == []


def test_a_standard_queue_takes_a_message_group(standard: Queue) -> None:
    """By which SQS shares it out fairly."""
    standard.client.send_message(QueueUrl=standard.url, MessageBody="x", MessageGroupId="the_job")
    assert standard.receive_one()["Attributes"]["MessageGroupId"] == "the_job"


def test_ten_go_and_come_at_once_and_eleven_do_not(queue: Queue) -> None:
    def entry(number: int) -> dict[str, str]:
        fifo = {"MessageGroupId": f"g{number}", "MessageDeduplicationId": uuid.uuid4().hex} if queue.fifo else {}
        return {"Id": str(number), "MessageBody": f"body {number}", **fifo}

    answer = queue.client.send_message_batch(QueueUrl=queue.url, Entries=[entry(number) for number in range(10)])
    assert {sent["Id"] for sent in answer["Successful"]} == {str(number) for number in range(10)}
    assert (
        code_of(
            lambda: queue.client.send_message_batch(QueueUrl=queue.url, Entries=[entry(number) for number in range(11)])
        )
        == "TooManyEntriesInBatchRequest"
    )
    found: set[str] = set()
    until = time.monotonic() + 20
    while len(found) < 10 and time.monotonic() < until:
        found |= {message["Body"] for message in queue.receive(count=10)}
    assert len(found) == 10


def test_a_message_has_a_mebibyte(standard: Queue) -> None:
    standard.send("x" * MIB)
    assert len(standard.receive_one()["Body"]) == MIB
    assert code_of(lambda: standard.send("x" * (MIB + 1))) == "InvalidParameterValue"


def test_a_message_has_a_mebibyte_in_bytes_not_characters(standard: Queue) -> None:
    assert code_of(lambda: standard.send("ü" * (MIB // 2 + 1))) == "InvalidParameterValue"


def test_a_queue_tells_what_is_in_it(queue: Queue) -> None:
    queue.send()
    until = time.monotonic() + 60  # "approximate": on AWS it may lag
    while queue.counts() != (1, 0) and time.monotonic() < until:
        time.sleep(0.2)
    assert queue.counts() == (1, 0)
    message = queue.receive_one()
    while queue.counts() != (0, 1) and time.monotonic() < until:
        time.sleep(0.2)
    assert queue.counts() == (0, 1)
    queue.delete(message)


def test_a_queue_that_is_not_there_has_a_code_of_its_own(standard: Queue) -> None:
    url = f"{standard.url}-never"
    missing = Queue.__new__(Queue)
    missing.__dict__ |= {**standard.__dict__, "url": url}
    assert code_of(missing.counts) in MISSING_CODES
    assert code_of(missing.send) in MISSING_CODES
    assert code_of(lambda: missing.receive(wait=0)) in MISSING_CODES


def test_a_queue_that_exists_is_not_created_otherwise(standard: Queue) -> None:
    name = queue_name(standard.url)
    assert standard.client.create_queue(QueueName=name)["QueueUrl"].endswith(name)
    code = code_of(lambda: standard.client.create_queue(QueueName=name, Attributes={"VisibilityTimeout": "77"}))
    assert code in ("QueueNameExists", "QueueAlreadyExists")


def test_any_text_of_json_arrives_as_it_was(queue: Queue) -> None:
    body = json.dumps({"task_id": "t", "reason": 'ünï\u2028cödé "quoted" \\ \n tab\t'})
    queue.send(body)
    assert queue.receive_one()["Body"] == body
