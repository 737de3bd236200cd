"""The same promise on every queue and storage, with run monitoring on and off, and both ways to start a child.

Every commit sees each pair of these once, every night all combinations.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support.platform import Platform

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

MONITORING: dict[str, Any] = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 2}}


def keeps_its_promise(platform: Platform) -> None:
    with platform.worker("-n", "a"), platform.worker("-n", "b"):
        good = platform.launch("quick_job", seconds=0)
        polite = [platform.launch("sleepy_job") for _ in range(3)]
        stubborn = platform.launch("carries_on_job", grace=0.5)
        for run_id in (*polite, stubborn):
            platform.marked(run_id, "started", within=60)
            assert platform.launcher.terminate(run_id), platform.story(run_id)
        for run_id in (*polite, stubborn):
            assert platform.finished(run_id, within=60) is DagsterRunStatus.CANCELED, platform.story(run_id)
            platform.assert_nothing_left(run_id)
            assert Counter(platform.events(run_id))[DagsterEventType.RUN_CANCELED] == 1
        for run_id in polite:
            assert Counter(platform.marks(run_id))["cleanup-end"] == 1
            assert Stage.KILLED not in platform.stages(run_id)
        assert Stage.KILLED in platform.stages(stubborn)
        assert platform.finished(good, within=60) is DagsterRunStatus.SUCCESS


FACTORS: Mapping[str, tuple[str, ...]] = {
    "queue": ("standard", "fifo", "fair"),
    "storage": ("sqlite", "postgres"),
    "monitoring": ("monitored", "unmonitored"),
    "start": ("forked", "spawned"),
}
PAIRWISE = (
    ("standard", "sqlite", "monitored", "forked"),
    ("standard", "postgres", "unmonitored", "spawned"),
    ("fifo", "sqlite", "unmonitored", "spawned"),
    ("fifo", "postgres", "monitored", "forked"),
    ("fair", "sqlite", "monitored", "spawned"),
    ("fair", "postgres", "unmonitored", "forked"),
)
"""Every value beside every value of every other factor; the whole product is for the night."""


def combinations() -> Iterator[Any]:
    for row in itertools.product(*FACTORS.values()):
        marks = [pytest.mark.postgres] if "postgres" in row else []
        if row not in PAIRWISE:
            marks.append(pytest.mark.nightly)
        yield pytest.param(*row, marks=marks, id="-".join(row))


def pairs(rows: Iterable[tuple[str, ...]]) -> set[tuple[str, str]]:
    return {pair for row in rows for pair in itertools.combinations(row, 2)}


def test_every_pair_is_among_those_of_every_commit() -> None:
    assert pairs(PAIRWISE) == pairs(itertools.product(*FACTORS.values()))


@pytest.mark.long
@pytest.mark.parametrize(("queue", "storage", "monitoring", "start"), list(combinations()))
def test_the_promise_is_kept(
    endpoint: str, request: pytest.FixtureRequest, queue: str, storage: str, monitoring: str, start: str
) -> None:
    extra = dict(MONITORING) if monitoring == "monitored" else {}
    if storage == "postgres":
        extra["storage"] = {"postgres": {"postgres_url": request.getfixturevalue("postgres")}}
    source = {**UNHURRIED, "is_fair_queue": queue == "fair"}
    if start == "spawned":
        source["start_method"] = "spawn"
    with open_platform(endpoint, fifo=queue == "fifo", extra=extra, source=source) as platform:
        keeps_its_promise(platform)
