"""What connections to PostgreSQL are like: bounded, shared in our own processes, not kept for long."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.instance import InstanceRef
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import serialize_value
from tests.acceptance.conftest import open_platform
from tests.support.platform import Platform
from tests.support.query_counter import QueryCounter, by_way_of, query_counter, target
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import wait_until

from dagster_taskiq import coordinator, launcher
from dagster_taskiq._time_limit import time_limit
from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.dagster_compat import connections
from dagster_taskiq.dagster_compat.child_instance import open_in_child
from dagster_taskiq.dagster_compat.connections import CONNECT_PARAMETERS, bound_connections

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(120)]

BOUND_S = 1.0
LATEST_S = BOUND_S + 3
"""A connect has two seconds at least, and the watch looks twice a second."""

LONGER_THAN_DAGSTER_TRIES_S = 9


@contextmanager
def opened(home: Path, url: str, **parts: Any) -> Iterator[DagsterInstance]:
    (home / "dagster.yaml").write_text(yaml.safe_dump({"storage": {"postgres": {"postgres_url": url}}, **parts}))
    with DagsterInstance.from_config(str(home)) as instance:
        yield instance


def asked(instance: DagsterInstance, query: str) -> str:
    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        return str(connection.exec_driver_sql(query).scalar())


def read(instance: DagsterInstance) -> object:
    return instance.get_run_by_id("nobody")


def tcp_options(instance: DagsterInstance) -> tuple[int, ...]:
    """Keepalives: on or not, idle, interval, count; the user timeout."""
    level, names = socket.IPPROTO_TCP, (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    with (
        instance.run_storage.connect() as connection,  # type: ignore[attr-defined]
        closing(socket.socket(fileno=os.dup(connection.connection.dbapi_connection.fileno()))) as ours,
    ):
        found = [ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
        return (*found, *[ours.getsockopt(level, name) for name in (*names, socket.TCP_USER_TIMEOUT)])


TOLD = tuple(value for name, value in CONNECT_PARAMETERS.items() if name != "connect_timeout")


@pytest.mark.parametrize("ours", [True, False])
def test_tcp_is_told_to_look_after_connections_and_the_server_after_our_statements(
    postgres: str, tmp_path: Path, ours: bool
) -> None:
    with opened(tmp_path, postgres) as instance:
        before = asked(instance, "show statement_timeout")
        bound_connections(instance, ours=ours)
        assert tcp_options(instance) == TOLD
        assert asked(instance, "show statement_timeout") == ("1min" if ours else before)
        if not ours:  # what the webserver does for itself counts, and its new engine is found
            instance.optimize_for_webserver(statement_timeout=7_000, pool_recycle=60, max_overflow=1)
            bound_connections(instance, ours=False)
            assert tcp_options(instance) == TOLD
            assert asked(instance, "show statement_timeout") == "7s"


def test_what_the_url_says_counts(postgres: str, tmp_path: Path) -> None:
    query = "keepalives_idle=77&options=-c%20statement_timeout%3D5000%20-c%20search_path%3Dpublic"
    with opened(tmp_path, f"{postgres}?{query}") as instance:
        bound_connections(instance, ours=True)
        assert tcp_options(instance) == (TOLD[0], 77, *TOLD[2:])
        assert asked(instance, "show statement_timeout") == "5s"
        assert asked(instance, "show search_path") == "public"


def test_options_are_left_out_where_something_in_between_refuses_them(postgres: str, tmp_path: Path) -> None:
    with query_counter(*target(postgres)) as pooler, opened(tmp_path, by_way_of(postgres, pooler)) as instance:
        pooler.takes_options = False
        bound_connections(instance, ours=True)
        assert asked(instance, "show statement_timeout") == "0"
        assert tcp_options(instance) == TOLD


def timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


@pytest.mark.parametrize("ours", [True, False])
def test_a_call_that_nobody_answers_ends_in_time_and_the_next_one_gets_through(
    postgres: str, tmp_path: Path, ours: bool
) -> None:
    """Wherever it was when the network went: waiting for an answer, connecting, or idle in the pool."""
    with tcp_proxy(*target(postgres)) as proxy, opened(tmp_path, by_way_of(postgres, proxy)) as instance:
        bound_connections(instance, ours=ours)
        read(instance)

        def never() -> None:
            with pytest.raises(TimeoutError, match="no answer within"), time_limit(BOUND_S):
                asked(instance, "select pg_sleep(60)")

        threading.Timer(BOUND_S / 2, proxy.swallow).start()
        assert BOUND_S * 0.9 < timed(never) < LATEST_S
        assert timed(never) < LATEST_S
        proxy.heal()
        assert timed(lambda: read(instance)) < LATEST_S


def test_a_statement_of_ours_has_a_bound_also_where_nobody_set_one(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "READ_S", BOUND_S)
    with tcp_proxy(*target(postgres)) as proxy, opened(tmp_path, by_way_of(postgres, proxy)) as instance:
        bound_connections(instance, ours=True)
        read(instance)
        proxy.swallow()
        with pytest.raises(Exception, match="closed the connection"):
            instance.run_storage.get_runs()
        proxy.heal()
        read(instance)


OURS = {
    "run_launcher": {
        "module": "dagster_taskiq.launcher",
        "class": "TaskiqRunLauncher",
        "config": {"queue_url": "http://127.0.0.1:9/1/q", "region_name": "us-east-1"},
    },
    "run_coordinator": {"module": "dagster_taskiq.coordinator", "class": "TaskiqRunCoordinator"},
}


def test_launcher_and_coordinator_wait_for_nobody_for_ever(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Dagster's webserver and daemon, with the connections that Dagster opens there."""
    monkeypatch.setattr(launcher, "_DATABASE_S", BOUND_S)
    monkeypatch.setattr(coordinator, "CALL_S", BOUND_S)
    with tcp_proxy(*target(postgres)) as proxy, opened(tmp_path, by_way_of(postgres, proxy), **OURS) as instance:
        instance.optimize_for_webserver(statement_timeout=60_000, pool_recycle=60, max_overflow=1)
        queue, ours = instance.run_coordinator, instance.run_launcher
        assert isinstance(queue, TaskiqRunCoordinator)
        assert queue.dequeue_interval_seconds
        run = DagsterRun("a_job", run_id="4a4a8a1c-2ff6-4a0c-9a52-7a4a5a6a7a8a", status=DagsterRunStatus.STARTED)
        read(instance)
        proxy.swallow()

        def health() -> None:
            assert "cannot tell" in str(ours.check_run_worker_health(run).msg)

        def terminate() -> None:
            with pytest.raises(TimeoutError):
                ours.terminate(run.run_id)

        for call in (health, terminate, queue.get_run_queue_config):
            assert timed(call) < LATEST_S
        proxy.heal()
        assert not ours.terminate(run.run_id)
        assert queue.get_run_queue_config().max_concurrent_runs == queue.look_ahead


def test_a_child_reads_again_while_the_database_is_away(postgres: str, tmp_path: Path) -> None:
    """Dagster would have the run fail: it tries to connect for some seconds only."""
    with (
        tcp_proxy(*target(postgres)) as proxy,
        opened(tmp_path, by_way_of(postgres, proxy)) as worker,
        open_in_child(worker.get_ref()) as instance,
    ):
        proxy.away()
        threading.Timer(LONGER_THAN_DAGSTER_TRIES_S, proxy.back).start()
        assert read(instance) is None


def test_a_connection_is_used_again_and_closed_when_nobody_needs_it(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_IDLE_S", BOUND_S)
    with query_counter(*target(postgres)) as counter, opened(tmp_path, by_way_of(postgres, counter)) as instance:
        bound_connections(instance, ours=True)
        counter.reset()
        for _ in range(20):
            read(instance)
            instance.all_logs("nobody")
            instance.all_instigator_state()
        assert counter.connections == 1, counter.queries
        wait_until(lambda: counter.open == 0, "the idle connection is closed", within=10)
        read(instance)
        assert counter.connections == 2
        # A fork of ours, by a user's op, uses none of its parent's.
        if (pid := os.fork()) == 0:
            try:
                read(instance)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - nothing may be raised in the fork of a test
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert counter.connections == 3
        read(instance)
        assert counter.connections == 3


@contextmanager
def counted(endpoint: str, postgres: str) -> Iterator[tuple[Platform, QueryCounter]]:
    """A platform whose own connections are not counted: only those of its processes."""
    with ExitStack() as stack:
        counter = stack.enter_context(query_counter(*target(postgres)))
        extra = {"storage": {"postgres": {"postgres_url": postgres}}}
        # The heartbeat is for all runs of a worker.
        platform = stack.enter_context(open_platform(endpoint, source={"visibility_timeout_seconds": 300}, extra=extra))
        described = platform.home / "dagster.yaml"
        described.write_text(described.read_text().replace(postgres, by_way_of(postgres, counter)))
        yield platform, counter


def test_a_run_costs_no_more_queries_than_with_dagster_alone_and_few_connections(endpoint: str, postgres: str) -> None:
    with counted(endpoint, postgres) as (platform, counter):
        run = platform.create("quick_job", seconds=0)
        origin = run.job_code_origin
        assert origin is not None
        arguments = ExecuteRunArgs(origin, run.run_id, InstanceRef.from_dir(str(platform.home)))
        command = [sys.executable, "-m", "dagster", "api", "execute_run", serialize_value(arguments)]
        subprocess.run(command, env=platform.environ(), check=True, capture_output=True)
        assert platform.status(run.run_id) is DagsterRunStatus.SUCCESS
        alone = len(counter.queries)
        with platform.worker("-n", "w"):
            assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
            wait_until(lambda: platform.waiting() == 0, "the first run is over", within=20)
            counter.reset()
            assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
            wait_until(lambda: platform.waiting() == 0, "the run is over", within=20)
            queries, opened_for_it = counter.queries, counter.connections
    assert len(queries) <= 1.2 * alone, queries
    assert opened_for_it <= 10, queries
