"""What `doctor` says of routes: which are in use, who serves them, and for which of them something waits in vain."""

from collections.abc import Iterator

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test

from dagster_taskiq.doctor.finding import Finding
from dagster_taskiq.doctor.route_checks import known_routes, look_at_workers
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.probe import QueueFacts
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import ROUTE_TAG
from dagster_taskiq.storage.workers import list_workers

SETTINGS = Settings.from_config(
    {
        "queue_url": "http://127.0.0.1/1/tasks",
        "region_name": "us-east-1",
        "config_source": {"routes": [{"route": "ruled", "job": "x"}], "serves": ["served"]},
    }
)
PLAIN = Settings(queue_url="http://127.0.0.1/1/tasks", region_name="us-east-1")


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


def beat(instance: DagsterInstance, worker: str, routes: list[str], slots: tuple[int, int] = (1, 4)) -> None:
    facts = {"slots": list(slots), "work": [], "queue": "tasks", "routes": routes}
    Heartbeats(instance, 30, 10).beat(worker, facts)


def run(instance: DagsterInstance, route: str | None) -> None:
    tags = {ROUTE_TAG: route} if route else {}
    create_run_for_test(instance, status=DagsterRunStatus.STARTING, tags=tags)


def found(instance: DagsterInstance, settings: Settings = PLAIN, **messages: int) -> list[Finding]:
    """`messages` that wait: `gpu_steps=3`."""
    queues = {}
    for queue, many in messages.items():
        route, _, role = queue.partition("_")
        queues[route, role] = QueueFacts(attributes={"ApproximateNumberOfMessages": str(many)})
    routes = known_routes(instance, settings)
    return list(look_at_workers(instance, settings, routes, list_workers(instance, settings, everybody=True), queues))


def test_the_routes_that_are_known(instance: DagsterInstance) -> None:
    assert known_routes(instance, PLAIN) == ("default",)
    beat(instance, "w-1", ["lives", "default"])
    beat(instance, "w-2", ["dead"])
    Heartbeats(instance, 30, 10).gone("w-2")
    run(instance, "wanted")
    run(instance, "NO ROUTE")
    assert known_routes(instance, SETTINGS) == ("default", "lives", "ruled", "served", "wanted")


def test_without_named_routes_nothing_is_said_of_them(instance: DagsterInstance) -> None:
    beat(instance, "w-1", ["default"])
    run(instance, None)
    assert found(instance) == [Finding("workers", "ok", "1 alive")]


def test_living_workers_by_route(instance: DagsterInstance) -> None:
    beat(instance, "w-1", ["gpu", "default"])
    beat(instance, "w-2", ["gpu"])
    assert [(one.check, one.verdict, one.reason) for one in found(instance, SETTINGS)] == [
        ("workers", "ok", "2 alive; by route: default 1, gpu 2, ruled none, served none")
    ], "nothing waits, so nothing is wrong"


def test_what_waits_for_a_route_that_nobody_serves(instance: DagsterInstance) -> None:
    beat(instance, "w-1", ["default"])
    beat(instance, "w-2", ["big"], (2, 0))
    run(instance, "gpu")
    run(instance, "gpu")
    run(instance, "big")
    said = found(instance, gpu_work=1, gpu_steps=3, big_steps=4, default_work=5)[1:]
    assert said == [
        Finding(
            "workers of route big",
            "warning",
            "4 steps wait for route big, and no living worker of it takes any",
            "dagster-taskiq worker start -q big",
        ),
        Finding(
            "workers of route gpu",
            "warning",
            "2 runs wait for route gpu, and no living worker of it takes any",
            "dagster-taskiq worker start -q gpu",
        ),
        Finding(
            "workers of route gpu",
            "warning",
            "3 steps wait for route gpu, and no living worker of it takes any",
            "dagster-taskiq worker start -q gpu",
        ),
    ]


def test_workers_of_other_routes_do_not_serve_the_unnamed_one(instance: DagsterInstance) -> None:
    beat(instance, "w-1", ["gpu"])
    assert [one.verdict for one in found(instance)] == ["ok"]
    run(instance, None)
    (_, wrong) = found(instance)
    assert (wrong.check, wrong.verdict, wrong.reason) == (
        "workers",
        "error",
        "1 run waits, and no worker takes any",
    )


def test_no_worker_at_all_is_said_once(instance: DagsterInstance) -> None:
    run(instance, None)
    assert [(one.check, one.verdict) for one in found(instance)] == [("workers", "error")]
