"""Who has which code, as workers say it in their heartbeats."""

from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.storage.tags import REPOSITORY_LABEL_TAG

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.code_locations import (
    Code,
    code_of,
    heard,
    nobody_can,
    recent_code,
    told,
    who_has_it,
    who_serves,
    why_it_waits,
    without_a_worker,
)
from dagster_taskiq.storage.heartbeats import Heartbeat, Heartbeats
from dagster_taskiq.storage.tags import ROUTE_TAG

SETTINGS = Settings(queue_url="https://sqs.us-east-1.amazonaws.com/123456789012/q", region_name="us-east-1")
NO_ML = "no module named 'ml'"


def run_of(location: str | None, module: str = "ml", route: str | None = None) -> DagsterRun:
    tags = {REPOSITORY_LABEL_TAG: f"__repository__@{location}"} if location else {}
    tags |= {ROUTE_TAG: route} if route else {}
    pointer = ModuleCodePointer(module, "defs")
    origin = JobPythonOrigin("train", RepositoryPythonOrigin("python", pointer))
    return DagsterRun(job_name="train", tags=tags, job_code_origin=origin, status=DagsterRunStatus.STARTING)


def test_the_code_of_a_run() -> None:
    named, unnamed = code_of(run_of("shop")), code_of(run_of(None))
    assert named is not None
    assert unnamed is not None
    assert (named.location, unnamed.location) == ("shop", "ml"), "its location, or its module"
    assert named == code_of(run_of("shop"))
    assert named != code_of(run_of("shop", "ml2")), "the location is loaded from elsewhere now"
    assert code_of(DagsterRun(job_name="train")) is None


def test_what_is_told_is_heard_and_bounded() -> None:
    known = {Code(f"location {number}", str(number)): "x" * 1_000 for number in range(100)}
    said = told(known)
    assert len(str(said)) < 10_000
    assert [code.location for code in heard({"code": said})] == [f"location {number}" for number in range(80, 100)]
    assert heard({}) == {}


@pytest.mark.parametrize("damaged", ["x", [["a", "b"]], [["a", "b", 3]], [None], {}, 5])
def test_what_is_damaged_is_not_heard(damaged: Any) -> None:
    with DagsterInstance.ephemeral() as instance:
        heartbeats = Heartbeats.of_runs(instance, SETTINGS)
        heartbeats.beat("w", {"code": damaged, "slots": [1, 1]})
        (beat,) = heartbeats.living()
    assert heard(beat.facts) == {}
    assert beat.facts["slots"] == [1, 1]


@pytest.mark.parametrize(
    ("facts", "runs", "steps"),
    [
        ({}, True, True),
        ({"slots": [1, 0]}, True, False),
        ({"slots": [0, 2]}, False, True),
        ({"slots": [1, 1], "stopping": {"at": 1.0}}, False, False),
        ({"slots": [1, 1], "queue": "another"}, False, False),
        ({"slots": [1, 1], "queue": "q", "routes": ["gpu"]}, False, False),
        ({"slots": [1, 1], "queue": "q", "routes": ["gpu", "default"]}, True, True),
    ],
)
def test_who_takes_work_of_the_unnamed_route(facts: dict[str, Any], *, runs: bool, steps: bool) -> None:
    beats = [Heartbeat("w", 0.0, gone=False, facts=facts)]
    assert bool(who_serves(beats, "q", "default", "runs")) is runs
    assert bool(who_serves(beats, "q", "default", "steps")) is steps
    assert who_serves(beats, "q", "default", "runs", but="w") == []


def test_the_error_names_each_worker_and_the_next_step() -> None:
    code = Code("ml", "1")
    assert nobody_can(code, "gpu", {"w1": NO_ML, "w2": "no file /x.py"}) == (
        f"no living worker of route 'gpu' can load code location 'ml': w1: {NO_ML}; w2: no file /x.py; a worker must"
        " have the code of what it serves: install it there, or give the location its own route"
    )
    assert nobody_can(code, "default", {"w1": NO_ML}).startswith("no living worker can load code location 'ml': w1: ")
    many = nobody_can(code, "default", {f"w{number}": NO_ML for number in range(50)})
    assert "; and 45 more; a worker must" in many


def test_who_has_it_in_lines() -> None:
    known = {"w1": {"shop": "", "ml": NO_ML, "old": "no file /o.py"}, "w2": {"shop": "", "ml": ""}, "new": {}}
    assert who_has_it(known) == [
        "code locations that the workers have: shop",
        f"code location ml: on w2, not on w1 ({NO_ML})",
        "code location old: on no worker: w1 (no file /o.py)",
    ]
    assert who_has_it({}) == []


def test_code_of_recent_runs_that_nobody_can_load() -> None:
    with DagsterInstance.ephemeral() as instance:
        for location, route in (("shop", None), ("ml", None), ("ml", "gpu"), ("ml", "empty")):
            instance.add_run(run_of(location, location, route))
        assert {(code.location, route) for code, route in recent_code(instance)} == {
            ("shop", "default"),
            ("ml", "default"),
            ("ml", "gpu"),
            ("ml", "empty"),
        }
        assert {code.location for code, _ in recent_code(instance, ["gpu"])} == {"ml"}
        ml, shop = code_of(run_of("ml", "ml")), code_of(run_of("shop", "shop"))
        assert ml is not None
        assert shop is not None
        heartbeats = Heartbeats.of_runs(instance, SETTINGS)
        heartbeats.beat("w1", {"code": told({ml: NO_ML, shop: ""}), "routes": ["default", "gpu"]})
        assert [line.partition(":")[0] for line in without_a_worker(instance, SETTINGS)] == [
            "no living worker can load code location 'ml'",
            "no living worker of route 'gpu' can load code location 'ml'",
        ]
        assert why_it_waits(instance, SETTINGS, run_of("ml", "ml", "gpu")) == (
            f"a worker that has the code of ml; not w1 ({NO_ML})"
        )
        assert why_it_waits(instance, SETTINGS, run_of("shop", "shop")) is None
        heartbeats.beat("w2", {"routes": ["gpu"]})  # it has not looked yet
        assert len(without_a_worker(instance, SETTINGS)) == 1
