"""What a worker costs that has nothing to do, with the settings that it has by default."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2  # type: ignore[import-untyped]
import pytest
from tests.acceptance.conftest import SNAPPY, open_platform
from tests.support.platform import REAL_WORKER
from tests.support.proxy import sqs_proxy
from tests.support.waiting import wait_until

from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(180)]

MOST_REQUESTS = 10
MOST_QUERIES = 15
_TOLD_AFTER_S = 11
"""PostgreSQL counts what an open session did within ten seconds: so what the start took is counted before."""
AT_ONCE_S = 2.5
"""On a busy machine; alone it is 0.6 s."""
DEFAULTS = Settings(queue_url="http://127.0.0.1/1/q", region_name="us-east-1")


class Database:
    """Looked at from another database of the same server, so that the looking does not count."""

    def __init__(self, connection: Any, name: str) -> None:
        self._connection = connection
        self._name = name

    def queries(self) -> int:
        """So far. A session has one transaction more than it asks for: that in which it is set up."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                "SELECT xact_commit + xact_rollback - sessions FROM pg_stat_database WHERE datname = %s", (self._name,)
            )
            return int(cursor.fetchone()[0])


@contextmanager
def watching(postgres: str) -> Iterator[Database]:
    server, _, name = postgres.replace("+psycopg2", "").rpartition("/")
    connection = psycopg2.connect(f"{server}/postgres")
    connection.autocommit = True
    try:
        yield Database(connection, name)
    finally:
        connection.close()


def test_an_idle_worker_asks_for_little(endpoint: str, postgres: str) -> None:
    storage = {"storage": {"postgres": {"postgres_url": postgres}}}
    source = {key: getattr(DEFAULTS, key) for key in SNAPPY}
    with (
        watching(postgres) as database,
        sqs_proxy(endpoint) as proxy,
        open_platform(proxy.url, source=source, extra=storage) as platform,
        platform.worker("-n", "idle", program=REAL_WORKER) as worker,
    ):
        heartbeats = Heartbeats.of_runs(platform.instance, DEFAULTS)
        first = [last.at for last in heartbeats.last()]
        wait_until(lambda: [last.at for last in heartbeats.last()] != first, "it has settled", seen=worker.log)
        time.sleep(_TOLD_AFTER_S)
        requests, queries = proxy.seen.total(), database.queries()
        time.sleep(60)  # a minute is what is measured
        requests, queries = proxy.seen.total() - requests, database.queries() - queries
        assert worker.process.poll() is None, worker.log()
        asked_at = time.monotonic()
        assert worker.stop() == 0
        stopped_after_s = time.monotonic() - asked_at
    assert stopped_after_s < AT_ONCE_S
    assert 0 < requests <= MOST_REQUESTS, proxy.seen
    assert 0 < queries <= MOST_QUERIES
