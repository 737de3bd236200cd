"""Which queues a worker has, by its settings."""

from typing import Any

import pytest

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.tasks.cancel_listener import CancelListener
from dagster_taskiq.tasks.running_tasks import RunningTasks
from dagster_taskiq.worker.routes import CancelListeners, Served


def served(**values: Any) -> Served:
    base = {"queue_url": "https://sqs.us-east-1.amazonaws.com/1/q.fifo", "region_name": "us-east-1"}
    return Served.of(Settings(**{**base, **values}))


async def is_over(_: str) -> bool:
    return False


@pytest.mark.parametrize(
    ("values", "queues"),
    [
        ({}, ["q.fifo", "q-steps.fifo"]),
        ({"serves": ("gpu",)}, ["q-gpu.fifo", "q-gpu-steps.fifo"]),
        ({"serves": ("gpu", "default")}, ["q-gpu.fifo", "q.fifo", "q-gpu-steps.fifo", "q-steps.fifo"]),
        ({"serves": ("gpu", "default"), "max_concurrent_runs": 0}, ["q-gpu-steps.fifo", "q-steps.fifo"]),
        ({"serves": ("default", "gpu"), "max_concurrent_steps": 0}, ["q.fifo", "q-gpu.fifo"]),
    ],
)
def test_there_is_a_queue_for_each_route_and_kind_in_order_of_preference(
    values: dict[str, Any], queues: list[str]
) -> None:
    assert [queue_name(broker.queue_url) for broker in served(**values).brokers] == queues


@pytest.mark.parametrize(
    ("routes", "cancels"),
    [(("default",), {"q-cancels.fifo"}), (("gpu", "default"), {"q-gpu-cancels.fifo", "q-cancels.fifo"})],
)
def test_there_is_one_listener_for_the_cancel_queue_of_each_route(routes: tuple[str, ...], cancels: set[str]) -> None:
    one = served(serves=routes)
    assert {queue_name(broker.cancel_queue_url) for broker in one.brokers} == cancels
    listener = one.listener(RunningTasks(), is_over)
    assert isinstance(listener, CancelListener if len(cancels) == 1 else CancelListeners)
    assert served(serves=routes, enable_cancellation=False).listener(RunningTasks(), is_over) is None


def test_a_step_is_of_the_route_on_whose_queue_it_came() -> None:
    one = served(serves=("gpu", "default"))
    assert one.steps is not None
    urls = [one.steps.queue_url, *(broker.queue_url for broker in one.steps.others), ""]
    assert [one.route_of_steps_queue(url) for url in urls] == ["gpu", "default", "default"]
