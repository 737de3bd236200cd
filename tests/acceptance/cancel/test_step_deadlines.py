"""An op that takes longer than its limit: every kind of op, under every executor, all at once; and what goes beside it.

Every commit sees the kinds of the cancel table in process, and those that differ under the others; the whole product is
for the night.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.acceptance.conftest import new_database, open_platform
from tests.support.late_kinds import ASSETS, GRAPHS
from tests.support.late_table import Case, Seen, Table
from tests.support.op_kinds import EXECUTORS
from tests.support.shown import show_at_the_end

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

BESIDES = ("sync", "asynchronous", "new_session", "to_thread", "c_call", "retried", "retried_c_call", "tagged")
"""What differs where a step has a process of its own."""
CASES = (
    *(Case(kind, "in-process") for kind in (*GRAPHS, *ASSETS) if kind != "retried_c_call"),
    *(Case(kind, executor) for executor in ("multiprocess", "taskiq") for kind in BESIDES),
)
WHOLE = tuple(Case(kind, executor) for kind in (*GRAPHS, *ASSETS) for executor in EXECUTORS)

KILLED: Mapping[str, Any] = {"finally_ran": 0, "killed": True}
AGAIN: Mapping[str, Any] = {"step": "UP_FOR_RETRY SUCCESS", "status": "SUCCESS", "again": "kept False"}
INSTEAD: Mapping[str, Mapping[str, Any]] = {
    # No line of Python runs any more, or none before the end of `with`, which waits for a thread that does not listen.
    "c_call": KILLED,
    "deaf_thread_pool": KILLED,
    "carries_on": KILLED,
    # `finally` has run; the thread is not waited for.
    "to_thread": {"killed": True},
    "shielded_generator": {"tidied": 1},
    "pipes": {"tidied": 1},
    "cli": {"tidied": 1},
    "with_anyio": {"tidied": 1},
    "retried": AGAIN,
    "retried_c_call": {**AGAIN, **KILLED},
}
"""What is different from all others."""
# The step's process is the run's: its failure is the run's, and nothing goes on.
TOGETHER: Mapping[str, Any] = {"step": "", "reason_in": "run", "status": "FAILURE", "others_ran": False, "again": ""}
SOURCE = {"visibility_timeout_seconds": 20, "cancelled_exit_patience_seconds": 1, "exit_patience_seconds": 3}
GRACE = {"c_call": 1.0, "deaf_thread_pool": 1.0, "carries_on": 1.0, "retried_c_call": 1.0}


def expected(case: Case) -> Seen:
    seen = replace(Seen(), **INSTEAD.get(case.kind, {}))
    if case.executor == "in-process" and seen.finally_ran == 0:
        seen = replace(seen, **TOGETHER)
    return seen


def fill(endpoint: str, config: pytest.Config, cases: tuple[Case, ...]) -> Table:
    """All runs at once. What was seen is in a file, which is shown at the end of the tests."""
    with new_database() as url:
        storage = {"storage": {"postgres": {"postgres_url": url}}}
        with open_platform(endpoint, extra=storage, source=SOURCE) as platform:
            table = Table(platform, cases, GRACE)
            table.fill()
    show_at_the_end(config, "\n".join(table.lines()), "deadlines")
    return table


@pytest.fixture(scope="module")
def table(endpoint: str, pytestconfig: pytest.Config) -> Table:
    return fill(endpoint, pytestconfig, CASES)


@pytest.mark.long
@pytest.mark.postgres
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("deadline table")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op_of_each_kind_that_takes_too_long_fails_with_that_reason(table: Table, case: Case) -> None:
    assert table.seen[case] == expected(case)


@pytest.mark.nightly
@pytest.mark.postgres
@pytest.mark.timeout(1200)
def test_every_kind_under_every_executor(endpoint: str, pytestconfig: pytest.Config) -> None:
    table = fill(endpoint, pytestconfig, WHOLE)
    assert table.seen == {case: expected(case) for case in WHOLE}
