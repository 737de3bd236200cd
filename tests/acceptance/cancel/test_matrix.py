"""The same promise for every kind of op, and every way to be cancelled; on every queue and storage, with run monitoring
on and off, and both ways to start a child.

Of the kinds and ways every commit sees the whole table, of the others each pair, every night all combinations.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, new_database, open_platform
from tests.support.cancel_table import TERMINATE, WAYS, WORKER_KILLED, Case, Seen, Table
from tests.support.op_kinds import ASSETS, GRAPHS
from tests.support.platform import Platform
from tests.support.shown import show_at_the_end

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

MONITORING: dict[str, Any] = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 2}}


def keeps_its_promise(platform: Platform, politely: int) -> None:
    with platform.worker("-n", "a"), platform.worker("-n", "b"):
        good = platform.launch("quick_job", seconds=0)
        polite = [platform.launch("sleepy_job") for _ in range(politely)]
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
        keeps_its_promise(platform, politely=1 if start == "spawned" else 3)  # each spawned one imports for seconds


# ------------------------------------------------------------------------------------ kinds of ops, and ways

BESIDES: Mapping[str, tuple[str, ...]] = {
    "multiprocess": ("sync", "asynchronous", "subprocesses", "to_thread"),
    "taskiq": ("sync", "asynchronous", "subprocesses", "to_thread", "dynamic"),
}
CASES = (
    *(Case(kind, "in-process", way) for way in WAYS for kind in (*GRAPHS, *ASSETS)),
    *(Case(kind, executor, TERMINATE) for executor, kinds in BESIDES.items() for kind in kinds),
)
INSTEAD: Mapping[str, Mapping[str, Any]] = {
    # No line of Python runs any more, or none before the end of `with`, which waits for a thread that does not listen.
    "c_call": {"finally_ran": 0, "killed": True},
    "deaf_thread_pool": {"finally_ran": 0, "killed": True},
    # `finally` has run; the thread is not waited for, or under the multiprocess executor until the grace is over.
    "to_thread": {"killed": True},
    "shielded_generator": {"tidied": 1},
    "pipes": {"tidied": 1},
    "cli": {"tidied": 1},
    "with_anyio": {"tidied": 1},
}
"""What is different from all others."""
TABLE = {"visibility_timeout_seconds": 20, "cancelled_exit_patience_seconds": 1}
table_tests = [
    pytest.mark.long,
    pytest.mark.postgres,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("cancel table"),
    pytest.mark.filterwarnings("ignore:Property .OpDefinition.version:DeprecationWarning"),
]


def marked(test: Any) -> Any:
    for mark in table_tests:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def table(endpoint: str, pytestconfig: pytest.Config) -> Table:
    """All runs at once. What was seen is in a file, which is shown at the end of the tests."""
    with new_database() as url:
        storage = {"storage": {"postgres": {"postgres_url": url}}}
        with open_platform(endpoint, extra=storage, source=TABLE) as platform:
            table = Table(platform, CASES, short_grace={"c_call": 1.0, "deaf_thread_pool": 1.0, "to_thread": 5.0})
            table.fill()
    show_at_the_end(pytestconfig, "\n".join(table.lines()))
    return table


@marked
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op_of_each_kind_is_cancelled_in_each_way(table: Table, case: Case) -> None:
    expected = replace(Seen(), **INSTEAD.get(case.kind, {}))
    if case.way == WORKER_KILLED:
        expected = replace(expected, killed=None)
    assert table.seen[case] == expected
