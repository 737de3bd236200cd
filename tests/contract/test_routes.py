"""The queues of routes at an SQS endpoint: which ones are there, and sending to several of them."""

from collections.abc import Iterator
from functools import partial

import pytest
from taskiq import BrokerMessage
from tests.support.eventually import eventually
from tests.support.moto import create_queues, sqs_client, with_siblings
from tests.support.workers import Outside, broker_for

from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.errors import QueueMissing
from dagster_taskiq.queue_names import is_fifo, queue_name, route_queue_url
from dagster_taskiq.tasks.producer import Producer, result_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def routes(queue_url: str, endpoint: str) -> Iterator[list[str]]:
    """Besides the unnamed route there are gpu and big_2; of half there is only one queue."""
    client, fifo, base = sqs_client(endpoint), is_fifo(queue_url), queue_name(queue_url).removesuffix(".fifo")
    made = [create_queues(endpoint, f"{base}-{route}", fifo) for route in ("gpu", "big_2")]
    half = queue_name(route_queue_url(queue_url, "half"))
    attributes = {"FifoQueue": "true"} if fifo else {}
    left = [client.create_queue(QueueName=half, Attributes=attributes)["QueueUrl"]]
    yield ["default", "big_2", "gpu"]
    for url in [*left, *(sibling for one in made for sibling in with_siblings(one))]:
        client.delete_queue(QueueUrl=url)


async def test_the_routes_are_those_that_have_all_of_their_queues(
    queue_url: str, endpoint: str, routes: list[str]
) -> None:
    broker = broker_for(queue_url, endpoint)
    try:
        assert list(await broker.list_routes(queue_url)) == routes
        for sibling in with_siblings(queue_url):
            sqs_client(endpoint).delete_queue(QueueUrl=sibling)
        assert list(await broker.list_routes(queue_url)) == routes[1:]
    finally:
        await broker.shutdown()


@pytest.mark.usefixtures("routes")
def test_a_producer_sends_to_each_route_over_a_broker_of_its_own(queue_url: str, endpoint: str) -> None:
    made: list[str] = []

    def broker_of(route: str) -> CancellableSQSBroker:
        made.append(route)
        return broker_for(route_queue_url(queue_url, route), endpoint)

    async def send(broker: CancellableSQSBroker, task_id: str) -> None:
        await broker.kick(BrokerMessage(task_id=task_id, task_name="work", message=b"data", labels={}))
        await broker.cancel_task(task_id)

    producer = Producer(broker_of, name="producer")
    try:
        for number, route in enumerate(["default", "gpu", "gpu", "big_2"]):
            result_of(producer.submit(partial(send, task_id=f"t-{number}"), route=route))
        with pytest.raises(QueueMissing):
            result_of(producer.submit(partial(send, task_id="t-9"), route="nowhere"))
    finally:
        producer.close()
    assert made == ["default", "gpu", "big_2", "nowhere"]
    seen = {route: Outside(route_queue_url(queue_url, route), endpoint) for route in ("default", "gpu", "big_2")}
    assert {route: one.work()[0] for route, one in seen.items()} == {"default": 1, "gpu": 2, "big_2": 1}
    assert {route: one.cancels()[0] for route, one in seen.items()} == {"default": 1, "gpu": 2, "big_2": 1}


async def test_a_producer_keeps_a_limited_number_of_clients(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of routes come from tags: there may be any number of them."""
    monkeypatch.setattr("dagster_taskiq.tasks.producer._MOST_BROKERS", 1)
    monkeypatch.setattr("dagster_taskiq.tasks.producer.REQUEST_TIMEOUT_S", 2.0)
    made: list[CancellableSQSBroker] = []

    def broker_of(route: str) -> CancellableSQSBroker:
        made.append(broker_for(route_queue_url(standard_url, route), endpoint))
        return made[-1]

    def is_open(number: int) -> bool:
        return made[number]._connection is not None

    producer = Producer(broker_of, name="producer")
    try:
        for route in ("default", "nowhere", "default"):
            listed = producer.submit(lambda broker: broker.list_routes(standard_url), route=route)
            assert result_of(listed) == ("default",)
        assert len(made) == 3
        await eventually(lambda: not is_open(0) and not is_open(1), "who is not used is closed, when it may have ended")
        assert is_open(2)
    finally:
        producer.close()
    assert not any(is_open(number) for number in range(3))
