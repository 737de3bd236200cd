"""What waits, waits by route: the daemon's own iteration, on real storage, queues and heartbeats."""

import json
import uuid
from collections import Counter
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from tests.acceptance.operator.test_coordinator import Daemon, queued, submit
from tests.support.many_runs import insert_runs
from tests.support.platform import Platform

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.routing import route_of_run
from dagster_taskiq.storage.tags import QUEUE_TAG, ROUTE_TAG, RUN_ID_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]
MANY = 1_000
LIVING: Any = {"visibility_timeout_seconds": 1_200}
"""A heartbeat stays young for ten minutes."""


def beat(platform: Platform, worker: str, runs: int, *routes: str) -> None:
    Heartbeats(platform.instance, 6, 4).beat(worker, {"slots": [runs, 4], "routes": list(routes)})


def by_route(instance: DagsterInstance, *statuses: DagsterRunStatus) -> dict[str, int]:
    return dict(Counter(route_of_run(run) for run in instance.get_runs(RunsFilter(statuses=list(statuses)))))


def put_many(platform: Platform, like: str) -> None:
    """A thousand runs in Dagster's queue: copies of that one, older than what is submitted later."""
    model = platform.run(like)
    ids = [str(uuid.uuid4()) for _ in range(MANY)]
    runs = [
        model._replace(run_id=run_id, status=DagsterRunStatus.QUEUED, tags={**model.tags, RUN_ID_TAG: run_id})
        for run_id in ids
    ]
    insert_runs(platform.instance, runs)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def storage(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return {}
    return {"storage": {"postgres": {"postgres_url": request.getfixturevalue("postgres")}}}


def test_each_route_has_its_own_slots_and_none_waits_for_another(endpoint: str, storage: dict[str, Any]) -> None:
    with queued(endpoint, 0, source=LIVING, extra=storage, max_concurrent_runs_by_route={"big": 2}) as platform:
        for route in ("gpu", "big", "cold"):
            platform.create_route(route)
        beat(platform, "d", 2, "default")
        beat(platform, "g", 1, "gpu")
        beat(platform, "b", 8, "big")
        for route in ("gpu", "big", "cold"):
            for _ in range(4):
                submit(platform, {QUEUE_TAG: route})
        for _ in range(4):
            submit(platform)
        expected = {"default": 3, "gpu": 2, "big": 2, "cold": 1}  # slots and one more; configured; no worker at all
        for _ in range(2):
            Daemon(platform.instance).take()
            assert by_route(platform.instance, DagsterRunStatus.STARTING) == expected
        assert {route: platform.waiting(f"-{route}") for route in ("gpu", "big", "cold")} == {
            "gpu": 2,
            "big": 2,
            "cold": 1,
        }


def test_a_thousand_runs_of_a_full_route_do_not_keep_back_one_of_another(
    endpoint: str, storage: dict[str, Any]
) -> None:
    """And the priority of a run lets it overtake a thousand that wait."""
    with queued(endpoint, 0, source=LIVING, extra=storage) as platform:
        platform.create_route("gpu")
        beat(platform, "g", 1, "gpu")
        beat(platform, "d", 1, "default")
        first = submit(platform, {QUEUE_TAG: "gpu"})
        put_many(platform, first)
        daemon = Daemon(platform.instance)
        daemon.take()
        assert by_route(platform.instance, DagsterRunStatus.STARTING) == {"gpu": 2}, "full"
        plain = submit(platform)
        daemon.take()
        assert platform.status(plain) is DagsterRunStatus.STARTING, "behind 999 others, at the first look"
        urgent = submit(platform, {QUEUE_TAG: "gpu", "dagster/priority": "10"})
        daemon.take()
        assert platform.status(urgent) is DagsterRunStatus.QUEUED, "no slot of gpu is free"
        assert platform.launcher.terminate(first)
        daemon.take()
        assert platform.status(urgent) is DagsterRunStatus.STARTING, "the first of the 1,000 that wait"
        assert by_route(platform.instance, DagsterRunStatus.QUEUED) == {"gpu": MANY - 1}


def test_runs_of_dead_workers_take_no_room_from_another_route(endpoint: str) -> None:
    with queued(endpoint, 0, source=LIVING) as platform:
        platform.create_route("gpu")
        beat(platform, "g", 5, "gpu")
        beat(platform, "d", 1, "default")
        for _ in range(6):
            submit(platform, {QUEUE_TAG: "gpu"})
        Daemon(platform.instance).take()
        assert by_route(platform.instance, DagsterRunStatus.STARTING) == {"gpu": 6}
        Heartbeats(platform.instance, 6, 4).gone("g")
        plain = submit(platform)
        with DagsterInstance.from_config(str(platform.home)) as instance:
            Daemon(instance).take()
        assert platform.status(plain) is DagsterRunStatus.STARTING


def test_what_waited_before_routes_were_in_use_is_of_the_unnamed_route(endpoint: str) -> None:
    with queued(endpoint, 5, source=LIVING) as platform:
        beat(platform, "d", 1, "default")
        Daemon(platform.instance).take()
        assert all(ROUTE_TAG not in run.tags for run in platform.instance.get_runs()), "nothing new, as ever"
        platform.create_route("gpu")
        beat(platform, "g", 3, "gpu")
        with DagsterInstance.from_config(str(platform.home)) as instance:
            Daemon(instance).take()
            tags = Counter(
                run.tags.get(ROUTE_TAG) for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.QUEUED]))
            )
            assert tags == {"default": 3}
        assert by_route(platform.instance, DagsterRunStatus.STARTING) == {"default": 2}, "gpu has slots, for others"


def test_limits_of_tags_in_the_settings_of_concurrency_count_as_well(endpoint: str) -> None:
    """Dagster takes them instead of all that a run coordinator says."""
    own = {"concurrency": {"runs": {"tag_concurrency_limits": [{"key": "team", "value": "a", "limit": 1}]}}}
    with queued(endpoint, 0, source=LIVING, extra=own) as platform:
        platform.create_route("gpu")
        beat(platform, "g", 1, "gpu")
        beat(platform, "d", 4, "default")
        for _ in range(3):
            submit(platform, {QUEUE_TAG: "gpu"})
            submit(platform, {"team": "a"})
        daemon = Daemon(platform.instance)
        for _ in range(2):
            daemon.take()
            assert by_route(platform.instance, DagsterRunStatus.STARTING) == {"gpu": 2, "default": 1}


def test_what_is_no_route_is_refused_where_the_run_is_launched(endpoint: str) -> None:
    with queued(endpoint, 0) as platform:
        with pytest.raises(SettingsError, match="'G P U' is not the name of a route"):
            submit(platform, {QUEUE_TAG: "G P U"})
        with pytest.raises(SettingsError, match="a limit must be at least 0"):
            type(platform.instance.run_coordinator)(max_concurrent_runs_by_route={"gpu": -1})  # type: ignore[call-arg]


def test_each_fleet_grows_by_what_waits_in_its_own_queue(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with queued(endpoint, 2, source={**LIVING, "metrics": "emf"}) as platform:
        platform.create_route("gpu")
        beat(platform, "g", 3, "gpu")
        beat(platform, "d", 1, "default")
        for _ in range(5):
            submit(platform, {QUEUE_TAG: "gpu"})
        Daemon(platform.instance).take()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if "RunsWaiting" in line]
        name = platform.queue_url.rpartition("/")[2]
        found = {line["Queue"]: (line["RunsWaiting"], line["RunSlots"], line["RunsHeld"]) for line in lines}
        assert found == {name: (2, 1, 0), f"{name}-gpu": (5, 3, 0)}
