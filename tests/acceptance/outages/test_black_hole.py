"""A database that accepts and never answers, and then is well again, for new connections only: a failover, a NAT."""

import os
import time

import pytest
from tests.acceptance.conftest import SNAPPY, open_platform
from tests.support.black_hole import MONITORED, at_random, every_stage, fleet
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres]

EVERY_S: float = SNAPPY["visibility_timeout_seconds"] / 6
"""The heartbeat's interval, and its bound."""
HOLE_S: float = 1.5 * SNAPPY["visibility_timeout_seconds"]
"""So long that leases would run out, and heartbeats are too old, while it lasts."""
LONGEST_S = float(os.environ.get("DAGSTER_TASKIQ_TEST_BLACK_HOLE_SECONDS", "120"))
SEEDS = [int(seed) for seed in os.environ.get("DAGSTER_TASKIQ_TEST_BLACK_HOLE_SEEDS", "1 2 3 4 5 6 7 8 9 10").split()]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_after_a_black_hole_a_worker_is_heard_and_hears_and_no_run_was_executed_twice(
    endpoint: str, postgres: str
) -> None:
    storage = {"storage": {"postgres": {"postgres_url": postgres}}}
    with (
        open_platform(endpoint, extra={**storage, **MONITORED}) as platform,
        fleet(platform, postgres, healthy=False) as those,
    ):
        every_stage(those, HOLE_S)
        healed = time.monotonic()
        wait_until(
            lambda: those.heartbeat_age("a") < EVERY_S + 1,
            "its heartbeat is fresh",
            within=3 * EVERY_S + 2,
            seen=lambda: (those.heartbeat_age("a"), those.workers["a"].log()[-4000:]),
        )
        marked = next(run_id for run_id, stage in those.stages.items() if stage.startswith("is marked"))
        wait_until(
            lambda: "interrupted" in platform.mark_counts(marked),
            "it has heard that the run is CANCELING",
            within=max(0.1, healed + 10 - time.monotonic()),
            seen=lambda: those.told(marked),
        )
        twice, wrong = those.verdict(within=60)
        assert not twice + wrong, "\n\n".join([*twice, *wrong, those.logs()])


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_black_hole_at_any_moment(endpoint: str, postgres: str, seed: int) -> None:
    """With a healthy worker beside it, which must not take anything over. Says what came of it."""
    storage = {"storage": {"postgres": {"postgres_url": postgres}}}
    with (
        open_platform(endpoint, extra={**storage, **MONITORED}) as platform,
        fleet(platform, postgres, healthy=True) as those,
    ):
        hole_s = at_random(those, seed, LONGEST_S)
        twice, wrong = those.verdict(within=240)
        print(
            f"black hole, seed {seed}: {hole_s:.0f} s, {len(those.expected)} runs,"
            f" {len(twice)} executed twice, {len(wrong)} in a wrong state"
        )
        assert not twice + wrong, "\n\n".join([*twice, *wrong, those.logs()])
