"""The queues of routes at an SQS endpoint: which ones are there, and sending to several of them."""

import gc
import threading
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


def test_a_producer_has_one_client_and_a_limited_number_of_brokers(
    standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of routes come from tags: there may be any number of them."""
    monkeypatch.setattr("dagster_taskiq.tasks.producer._MOST_BROKERS", 1)
    made: list[CancellableSQSBroker] = []

    def broker_of(route: str) -> CancellableSQSBroker:
        made.append(broker_for(route_queue_url(standard_url, route), endpoint))
        return made[-1]

    producer = Producer(broker_of, name="producer")
    for _ in range(2):
        for route in ("default", "nowhere", "default"):
            listed = producer.submit(lambda broker: broker.list_routes(standard_url), route=route)
            assert result_of(listed) == ("default",)
        assert [broker._connection is not None for broker in made] == [True, False, False]
        producer.close()
        assert [broker._connection is not None for broker in made] == [False, False, False]
        made.clear()


async def test_a_producer_that_is_dropped_ends_although_its_owner_makes_the_brokers(
    standard_url: str, endpoint: str
) -> None:
    class Owner:
        def __init__(self) -> None:
            self.producer = Producer(self.make_broker, name="dropped producer")

        def make_broker(self, route: str) -> CancellableSQSBroker:
            return broker_for(route_queue_url(standard_url, route), endpoint)

    def is_there() -> bool:
        return any(thread.name == "dropped producer" for thread in threading.enumerate())

    owner = Owner()
    for route in ("default", "nowhere"):
        result_of(owner.producer.submit(lambda broker: broker.list_routes(standard_url), route=route))
    assert is_there()
    del owner
    gc.collect()
    await eventually(lambda: not is_there(), "its thread has ended")
