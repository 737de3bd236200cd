"""What a worker costs that has nothing to do, with the settings that it has by default."""

import time
from typing import Any

import pytest
from tests.acceptance.conftest import SNAPPY, open_platform
from tests.support.platform import REAL_WORKER
from tests.support.proxy import sqs_proxy
from tests.support.query_counter import by_way_of, query_counter, target
from tests.support.waiting import wait_until

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.fleet import hold_fleet
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(180)]

MOST_REQUESTS = 10
MOST_QUERIES = 15
AT_ONCE_S = 2.5
"""On a busy machine; alone it is 0.6 s."""
DEFAULTS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")


def storage(url: str) -> dict[str, Any]:
    return {"storage": {"postgres": {"postgres_url": url}}}


def test_an_idle_worker_asks_for_little(endpoint: str, postgres: str) -> None:
    source = {key: getattr(DEFAULTS, key) for key in SNAPPY}
    with (
        query_counter(*target(postgres)) as database,
        sqs_proxy(endpoint) as proxy,
        open_platform(proxy.url, source=source, extra=storage(by_way_of(postgres, database))) as platform,
        platform.worker("-n", "idle", program=REAL_WORKER) as worker,
    ):
        heartbeats = Heartbeats.of_runs(platform.instance, DEFAULTS)
        first = [last.at for last in heartbeats.last()]
        wait_until(lambda: [last.at for last in heartbeats.last()] != first, "it has settled", seen=worker.log)
        database.reset()
        requests = proxy.seen.total()
        time.sleep(60)  # a minute is what is measured
        requests, queries = proxy.seen.total() - requests, list(database.queries)
        assert worker.process.poll() is None, worker.log()
        hold = hold_fleet(platform.instance, reason="migration", by="ada")
        wait_until(
            lambda: [last.facts.get("held") for last in heartbeats.last()] == [hold.since],
            "it has read of the hold with the query of its heartbeat",
            seen=worker.log,
        )
        asked_at = time.monotonic()
        assert worker.stop() == 0
        stopped_after_s = time.monotonic() - asked_at
    assert stopped_after_s < AT_ONCE_S
    assert 0 < requests <= MOST_REQUESTS, proxy.seen
    assert 0 < len(queries) <= MOST_QUERIES, queries
