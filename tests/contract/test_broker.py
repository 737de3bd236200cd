"""The broker against an SQS endpoint: the wire, leases, cancel messages, and what is said when something is wrong."""

import asyncio
import base64
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from taskiq import BrokerMessage
from taskiq_aws import SQSBroker
from tests.support.eventually import eventually
from tests.support.moto import REGION, free_port
from tests.support.proxy import SqsProxy, sqs_proxy
from tests.support.tcp_proxy import tcp_proxy
from tests.support.workers import Outside, broker_for

from dagster_taskiq.cancellable_broker import CancellableSQSBroker, LeasedMessage
from dagster_taskiq.errors import (
    AccessDenied,
    DagsterTaskiqError,
    MessageTooLarge,
    PayloadUnavailable,
    QueueError,
    QueueMissing,
    QueueUnreachable,
)
from dagster_taskiq.messages import CancelRequest
from dagster_taskiq.queue_names import is_fifo, queue_name
from dagster_taskiq.sqs.admin import create_queues, queue_status, queue_urls
from dagster_taskiq.sqs.s3_payloads import PayloadBucket
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.tasks.producer import Producer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def broker(queue_url: str, endpoint: str) -> AsyncIterator[CancellableSQSBroker]:
    made = broker_for(queue_url, endpoint)
    await made.startup()
    yield made
    await made.shutdown()


@pytest.fixture
def outside(queue_url: str, endpoint: str) -> Outside:
    return Outside(queue_url, endpoint)


def task_message(task_id: str, data: bytes = b"data", **labels: Any) -> BrokerMessage:
    return BrokerMessage(task_id=task_id, task_name="work", message=data, labels=labels)


async def error_of(request: Awaitable[Any]) -> Exception | None:
    try:
        await request
    except Exception as error:  # noqa: BLE001 - to be looked at
        return error
    return None


async def next_of(listening: Any, within: float = 20) -> LeasedMessage:
    async with asyncio.timeout(within):
        message = await anext(listening)
    assert isinstance(message, LeasedMessage)
    return message


async def test_what_is_sent_is_received_and_deleted_once_settled(
    broker: CancellableSQSBroker, outside: Outside
) -> None:
    await broker.kick(task_message("t-1", b"\x00\xff"))
    listening = broker.listen()
    message = await next_of(listening)
    assert (message.data, message.receive_count) == (b"\x00\xff", 1)
    assert message.sent_at > 1_600_000_000
    assert outside.work() == (0, 1)
    await message.ack()  # type: ignore[misc]
    assert outside.work() == (0, 0)
    await listening.aclose()


async def test_the_envelope_is_that_of_the_plain_broker(broker: CancellableSQSBroker, outside: Outside) -> None:
    await broker.kick(task_message("t-1", b"abc", key="value"))
    (raw,) = outside.receive(outside.queue_url)
    assert json.loads(raw["Body"]) == {
        "task_id": "t-1",
        "task_name": "work",
        "message": base64.b64encode(b"abc").decode(),
        "labels": {"key": "value"},
    }


async def test_the_plain_broker_and_ours_feed_each_other(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    plain = SQSBroker(standard_url, REGION, wait_time=1)
    ours = broker_for(standard_url, endpoint)
    await plain.kick(task_message("t-1", b"from plain"))
    listening = ours.listen()
    message = await next_of(listening)
    assert message.data == b"from plain"
    await message.lease.settle(Settlement.DELETE)
    await listening.aclose()
    await ours.kick(task_message("t-2", b"from ours"))
    plainly = plain.listen()
    async with asyncio.timeout(20):
        received = await anext(plainly)
    assert received.data == b"from ours"
    await received.ack()
    await plainly.aclose()
    await ours.shutdown()


async def test_fifo_tasks_are_groups_of_their_own_and_retries_no_duplicates(queue_url: str, endpoint: str) -> None:
    broker = broker_for(queue_url, endpoint)
    retry = broker._grouping(task_message("t" * 200, _retries=1))
    first = broker._grouping(task_message("t" * 200, message_group="job"))
    if is_fifo(queue_url):
        assert first["MessageGroupId"] == retry["MessageGroupId"] != "job"
        assert first["MessageDeduplicationId"] != retry["MessageDeduplicationId"]
        assert broker._grouping(task_message("t")) == {"MessageGroupId": "t", "MessageDeduplicationId": "t"}
    else:
        assert (first, retry) == ({"MessageGroupId": "job"}, {})


async def test_a_message_group_is_sent_on_a_standard_queue(standard_url: str, endpoint: str) -> None:
    broker, outside = broker_for(standard_url, endpoint), Outside(standard_url, endpoint)
    await broker.kick(task_message("t-1", message_group="a job of mine"))
    (raw,) = outside.receive(standard_url)
    assert raw["Attributes"]["MessageGroupId"].startswith("a_job_of_mine-")
    await broker.shutdown()


async def test_a_message_over_the_limit_is_refused_before_it_is_sent(broker: CancellableSQSBroker) -> None:
    with pytest.raises(MessageTooLarge, match=r"1,048,576; pass a reference"):
        await broker.kick(task_message("t-1", b"x" * 800_000))


async def test_many_tasks_are_sent_ten_at_a_time_and_as_many_as_fit(
    broker: CancellableSQSBroker, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    send_batch = broker._work.send_batch

    async def counted(entries: Any) -> dict[int, str]:
        batches.append(len(entries))
        return await send_batch(entries)

    monkeypatch.setattr(broker._work, "send_batch", counted)
    small = [task_message(f"s-{number}") for number in range(23)]
    large = [task_message(f"l-{number}", b"x" * 300_000) for number in range(4)]
    assert await broker.kick_all([*small, *large]) == {}
    assert outside.work() == (27, 0)
    assert batches[:2] == [10, 10]
    assert sum(batches) == 27
    assert len(batches) <= 5


async def test_of_many_tasks_those_that_are_refused_are_named(
    broker: CancellableSQSBroker, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_batch = broker._work.send_batch

    async def without_the_second(entries: Any) -> dict[int, str]:
        await send_batch([entry for number, entry in enumerate(entries) if number != 1])
        return {1: "InternalError: try again"}

    monkeypatch.setattr(broker._work, "send_batch", without_the_second)
    refused = await broker.kick_all([task_message(f"t-{number}") for number in range(12)])
    assert refused == {"t-1": "InternalError: try again", "t-11": "InternalError: try again"}
    assert outside.work() == (10, 0)


async def test_of_many_tasks_none_is_sent_when_one_is_too_large(broker: CancellableSQSBroker, outside: Outside) -> None:
    with pytest.raises(MessageTooLarge):
        await broker.kick_all([*map(task_message, "abc"), task_message("t", b"x" * 800_000)])
    assert outside.work() == (0, 0)


async def test_the_lease_keeps_a_message_invisible(queue_url: str, endpoint: str, outside: Outside) -> None:
    broker = broker_for(queue_url, endpoint, visibility_timeout_s=1)
    await broker.kick(task_message("t-1"))
    listening = broker.listen()
    message = await next_of(listening)
    loop = asyncio.get_running_loop()
    until = loop.time() + 2.5
    while loop.time() < until:
        assert outside.receive(outside.queue_url) == []
        await asyncio.sleep(0.2)
    await message.lease.settle(Settlement.HAND_BACK)
    (again,) = outside.receive(outside.queue_url)
    assert again["Attributes"]["ApproximateReceiveCount"] == "2"
    await listening.aclose()
    await broker.shutdown()


async def test_closing_hands_back_what_was_received_and_not_yielded(standard_url: str, endpoint: str) -> None:
    broker, outside = broker_for(standard_url, endpoint, max_messages=10), Outside(standard_url, endpoint)
    for number in range(4):
        await broker.kick(task_message(f"t-{number}"))
    listening = broker.listen()
    message = await next_of(listening)
    await listening.aclose()
    assert outside.work() == (3, 1)
    await message.lease.settle(Settlement.HAND_BACK)
    assert outside.work() == (4, 0)
    await broker.shutdown()


async def test_leases_are_renewed_together_and_lost_alone(standard_url: str, endpoint: str) -> None:
    outside = Outside(standard_url, endpoint)
    with sqs_proxy(endpoint) as proxy:
        broker = broker_for(proxy.through(standard_url), proxy.url, max_messages=10, visibility_timeout_s=2)
        assert await broker.kick_all([task_message(f"t-{number}") for number in range(12)]) == {}
        listening = broker.listen()
        messages = [await next_of(listening) for _ in range(12)]

        def renewals() -> Counter[str]:
            return Counter({action: count for (action, _), count in proxy.seen.items() if "Visibility" in action})

        began = time.monotonic()
        await eventually(lambda: renewals().total() >= 8, "the leases are renewed")
        moments = (time.monotonic() - began) / 0.5 + 2
        assert set(renewals()) == {"ChangeMessageVisibilityBatch"}
        assert renewals().total() <= 2 * moments, "twelve are two batches"
        assert outside.work() == (0, 12)
        gone = messages[3]
        await broker._work.delete(gone.lease._calls._handle)  # type: ignore[attr-defined]
        await eventually(lambda: gone.lease.lost, "the lease of the one that is gone is lost")
        assert [message for message in messages if message.lease.lost] == [gone]
        for message in messages:
            await message.lease.settle(Settlement.DELETE)
        await listening.aclose()
        await broker.shutdown()
    assert outside.work() == (0, 0)


def asked_for_messages(proxy: SqsProxy) -> bool:
    return any(action == "ReceiveMessage" for action, _ in proxy.seen)


async def test_a_receive_that_is_cancelled_hands_back_what_it_brings(standard_url: str, endpoint: str) -> None:
    outside = Outside(standard_url, endpoint)
    with sqs_proxy(endpoint) as proxy:
        broker = broker_for(proxy.through(standard_url), proxy.url, wait_time=1)
        await broker.startup()
        receiving = asyncio.create_task(anext(broker.listen()))
        await eventually(lambda: asked_for_messages(proxy), "it polls")
        receiving.cancel()
        await asyncio.sleep(0)
        await broker.kick(task_message("t-1"))
        with pytest.raises(asyncio.CancelledError):
            await receiving
        assert outside.work() == (1, 0)
        await broker.shutdown()


async def test_a_long_receive_that_is_cancelled_ends_at_once(standard_url: str, endpoint: str) -> None:
    with sqs_proxy(endpoint) as proxy:
        broker = broker_for(proxy.through(standard_url), proxy.url, wait_time=20)
        await broker.startup()
        receiving = asyncio.create_task(anext(broker.listen()))
        await eventually(lambda: asked_for_messages(proxy), "it polls")
        receiving.cancel()
        async with asyncio.timeout(10):  # half of what the poll would take
            await asyncio.wait({receiving})
        await broker.shutdown()


async def test_no_request_waits_for_an_answer_that_never_comes(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_taskiq.sqs.queue.ANSWER_S", 0.5)
    monkeypatch.setattr("dagster_taskiq.sqs.queue._POLL_MARGIN_S", 0.5)
    url = urlsplit(endpoint)
    with tcp_proxy(str(url.hostname), url.port or 80) as proxy:
        through = f"http://{proxy.host}:{proxy.port}"
        broker = broker_for(standard_url.replace(endpoint, through), through, wait_time=1)
        await broker.kick(task_message("t-1"))
        await broker.cancel_task("t-1")
        message = await next_of(broker.listen())
        (cancel,) = await broker.receive_cancels()
        proxy.swallow()
        requests: dict[str, Callable[[], Awaitable[Any]]] = {
            "kick": lambda: broker.kick(task_message("t-2")),
            "kick all": lambda: broker.kick_all([task_message("t-2")]),
            "cancel": lambda: broker.cancel_task("t-1"),
            "check": broker.check_queues,
            "receive cancels": broker.receive_cancels,
            "renew": lambda: message.lease._calls.renew(30),
            "hand back": lambda: message.lease._calls.hand_back(0),
        }
        for name, request in requests.items():
            async with asyncio.timeout(3):
                assert isinstance(await error_of(request()), QueueUnreachable), name
        async with asyncio.timeout(6):
            await broker.hand_back_cancels([cancel])
            await broker.delete_cancels([cancel])
            assert (await broker.cancel_tasks(["t-1"])).failed
        proxy.heal()
        await message.lease.settle(Settlement.DELETE)
        await broker.kick(task_message("t-3"))
        await broker.shutdown()


def test_a_producer_gives_up_and_works_again(standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.tasks.producer.REQUEST_TIMEOUT_S", 1.0)
    url = urlsplit(endpoint)
    with tcp_proxy(str(url.hostname), url.port or 80) as proxy:
        through = f"http://{proxy.host}:{proxy.port}"
        producer = Producer(lambda _: broker_for(standard_url.replace(endpoint, through), through), name="producer")
        producer.submit(lambda broker: broker.kick(task_message("t-1"))).result(10)
        proxy.swallow()
        asking = [producer.submit(lambda broker: broker.kick(task_message("t-2"))) for _ in range(20)]
        for request in asking:
            with pytest.raises(TimeoutError):
                request.result(5)
        proxy.heal()
        producer.submit(lambda broker: broker.kick(task_message("t-3"))).result(10)
        producer.close()
    assert Outside(standard_url, endpoint).work() == (2, 0)


async def test_unreadable_messages_are_logged_once_and_left(
    broker: CancellableSQSBroker, outside: Outside, caplog: pytest.LogCaptureFixture
) -> None:
    broker.visibility_timeout_s = 1
    junk = ["junk", "[]", "{}", '{"message": 7}', '{"message": "not base64!"}']
    for number, body in enumerate(junk):
        outside.send(outside.queue_url, body, f"x-{number}")
    listening = broker.listen()
    receiving = asyncio.create_task(next_of(listening))
    await eventually(lambda: sum("unreadable" in text for text in caplog.messages) == len(junk), "they are logged")
    await broker.kick(task_message("t-1"))
    message = await receiving
    await message.lease.settle(Settlement.DELETE)
    receiving = asyncio.create_task(next_of(listening))
    await asyncio.sleep(1.3)  # long enough for the unreadable ones to be received again
    receiving.cancel()
    await asyncio.wait({receiving})
    assert sum("unreadable" in text for text in caplog.messages) == len(junk)
    assert sum(outside.work()) == len(junk)


async def test_a_cancel_reaches_who_receives_it(broker: CancellableSQSBroker, outside: Outside) -> None:
    await broker.cancel_task("t-1", reason="why", requested_by="who")
    (received,) = await broker.receive_cancels()
    request = received.request
    assert isinstance(request, CancelRequest)
    assert (request.task_id, request.reason, request.requested_by) == ("t-1", "why", "who")
    assert request.requested_at == pytest.approx(received.sent_at, abs=5)
    assert received.receive_count == 1
    await broker.hand_back_cancels([received])
    (again,) = await broker.receive_cancels()
    assert (again.message_id, again.receive_count) == (received.message_id, 2)
    await broker.delete_cancels([again])
    assert outside.cancels() == (0, 0)
    await broker.delete_cancels([again])
    await broker.hand_back_cancels([again])


async def test_a_second_cancel_of_the_same_task_is_a_message_of_its_own(
    broker: CancellableSQSBroker, outside: Outside
) -> None:
    await broker.cancel_task("t-1")
    await broker.cancel_task("t-1")
    assert sum(outside.cancels()) == 2


async def test_anybody_can_cancel_with_a_line_of_json(broker: CancellableSQSBroker, outside: Outside) -> None:
    outside.send(outside.cancel_url, '{"task_id": "t-1"}')
    (received,) = await broker.receive_cancels()
    assert isinstance(received.request, CancelRequest)
    assert received.request.task_id == "t-1"


async def test_an_unreadable_cancel_is_logged_once_and_left(
    broker: CancellableSQSBroker, outside: Outside, caplog: pytest.LogCaptureFixture
) -> None:
    broker.cancel_visibility_timeout_s = 0
    outside.send(outside.cancel_url, "junk")
    assert await broker.receive_cancels() == []
    assert await broker.receive_cancels() == []
    assert sum("unreadable" in text for text in caplog.messages) == 1
    assert sum(outside.cancels()) == 1


async def test_many_cancels_with_a_failing_batch(
    broker: CancellableSQSBroker, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, batches = broker._cancel_queue.send_batch, 0

    async def second_fails(bodies: Any) -> dict[int, str]:
        nonlocal batches
        batches += 1
        return dict.fromkeys(range(len(bodies)), "down") if batches == 2 else await send(bodies)

    monkeypatch.setattr(broker._cancel_queue, "send_batch", second_fails)
    ids = [f"t-{number}" for number in range(25)]
    report = await broker.cancel_tasks([*ids, ids[0], "not an id"], reason="cleaning up")
    assert report.sent == (*ids[:10], *ids[20:])
    assert set(report.failed) == {*ids[10:20], "not an id"}
    assert report.failed["t-10"] == "down"
    assert sum(outside.cancels()) == 15


async def test_cancellation_can_be_disabled(queue_url: str, endpoint: str) -> None:
    broker = broker_for(queue_url, endpoint, enable_cancellation=False)
    with pytest.raises(DagsterTaskiqError, match="cancellation is disabled; set enable_cancellation"):
        await broker.cancel_task("t-1")
    with pytest.raises(DagsterTaskiqError, match="cancellation is disabled"):
        await broker.cancel_tasks(["t-1"])


async def arn_of(client: Any, url: str) -> str:
    answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    return str(answer["Attributes"]["QueueArn"])


async def test_queues_are_created_once_and_described(endpoint: str, queue_url: str) -> None:
    url = queue_url.replace("-contract-", "-contract-new-")
    broker = broker_for(url, endpoint)
    client = await broker._client()
    missing = await queue_status(client, url)
    assert [status.exists for status in missing] == [False] * 3
    assert "create" in missing[0].warnings[0]
    created = await create_queues(client, url)
    assert set(created) == {queue_name(each) for each in queue_urls(url).values()}
    assert await create_queues(client, url) == ()
    work, steps, cancels = await queue_status(client, url)
    assert (work.role, steps.role, cancels.role) == ("work", "steps", "cancels")
    assert all(status.exists and status.fifo is is_fifo(url) for status in (work, steps, cancels))
    assert (work.visibility_timeout_s, cancels.visibility_timeout_s, cancels.retention_s) == (30, 5, 600)
    assert (work.warnings, cancels.warnings) == ((), ())
    policy = json.dumps({"deadLetterTargetArn": await arn_of(client, steps.url), "maxReceiveCount": 3})
    await client.set_queue_attributes(QueueUrl=cancels.url, Attributes={"RedrivePolicy": policy})
    described = (await queue_status(client, url))[2]
    assert described.has_redrive
    assert "RedrivePolicy" in described.warnings[0]
    for sibling in queue_urls(url).values():
        await client.delete_queue(QueueUrl=sibling)
    await broker.shutdown()


async def test_queues_that_are_there_pass_the_check(broker: CancellableSQSBroker) -> None:
    await broker.check_queues()


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1"])
async def test_a_missing_queue_is_one_clear_line(endpoint: str, standard_url: str, region: str) -> None:
    url = standard_url if region == "eu-west-1" else f"{standard_url}-not"
    broker = CancellableSQSBroker(url, region, endpoint_url=endpoint)
    with pytest.raises(QueueMissing) as caught:
        await broker.check_queues()
    assert str(caught.value) == (
        f"{url}: no such queue in region {region}; create it with 'dagster-taskiq queue create' or infra/queues.yaml"
    )
    await broker.shutdown()


async def test_an_endpoint_that_is_down_is_one_clear_line(standard_url: str) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    broker = CancellableSQSBroker(standard_url, REGION, endpoint_url=nowhere)
    with pytest.raises(QueueUnreachable, match=r"cannot reach SQS in region us-east-1 .*; check the network") as caught:
        await broker.check_queues()
    assert "\n" not in str(caught.value)
    await broker.shutdown()


async def test_no_credentials_is_one_clear_line(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    broker = broker_for(standard_url, endpoint)
    with pytest.raises(AccessDenied, match=r"no usable AWS credentials .*; give the task an IAM role"):
        await broker.check_queues()
    await broker.shutdown()


async def test_no_region_is_one_clear_line(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    broker = CancellableSQSBroker(standard_url, endpoint_url=endpoint)
    with pytest.raises(QueueError, match="no AWS region; set region_name"):
        await broker.check_queues()
    await broker.shutdown()


async def test_a_failing_receive_is_logged_once_and_survived(
    standard_url: str, endpoint: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "dagster_taskiq")
    broker = broker_for(standard_url, endpoint)
    receive, failures = broker._work.receive, 3

    async def failing(**options: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise QueueUnreachable("down")
        return await receive(**options)

    monkeypatch.setattr(broker._work, "receive", failing)
    await broker.kick(task_message("t-1"))
    listening = broker.listen()
    message = await next_of(listening)
    await message.lease.settle(Settlement.DELETE)
    await listening.aclose()
    await broker.shutdown()
    assert caplog.messages == ["cannot receive work, trying again: down", "can receive work again after 3 tries"]


async def test_a_bucket_that_does_not_answer_is_given_up(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = urlsplit(endpoint)
    with tcp_proxy(str(url.hostname), url.port or 80) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{proxy.host}:{proxy.port}")
        bucket = PayloadBucket("never-created", REGION)
        with pytest.raises(PayloadUnavailable, match="NoSuchBucket"):
            await bucket.get("t-1")
        proxy.swallow()
        monkeypatch.setattr("dagster_taskiq.sqs.s3_payloads.WITHIN_S", 1.0)
        for request in (bucket.get("t-1"), bucket.put("t-1", "x"), bucket.delete("t-1")):
            async with asyncio.timeout(5):
                with pytest.raises(PayloadUnavailable, match="no answer within 1 s"):
                    await request
        proxy.heal()
        monkeypatch.setattr("dagster_taskiq.sqs.s3_payloads.WITHIN_S", 30.0)
        with pytest.raises(PayloadUnavailable, match="NoSuchBucket"):
            await bucket.get("t-1")
        await bucket.close()
