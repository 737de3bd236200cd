"""What is different on MySQL and MariaDB: who decides, which errors are outages, and what ends a wait."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dagster import DagsterInstance, DagsterRunStatus
from tests.acceptance.conftest import new_mysql_database, open_platform
from tests.support.platform import STEP_JOBS, Platform
from tests.support.query_counter import by_way_of, target
from tests.support.receivers import count_starts
from tests.support.tcp_proxy import tcp_proxy

from dagster_taskiq._time_limit import time_limit
from dagster_taskiq.dagster_compat.connections import bound_connections
from dagster_taskiq.dagster_compat.instance import open_instance
from dagster_taskiq.dagster_compat.key_values import insert_value, replace_value
from dagster_taskiq.dagster_compat.storage import outages
from dagster_taskiq.doctor.database_checks import connection_bounds

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.slow,
    pytest.mark.mysql,
    pytest.mark.timeout(120),
    pytest.mark.xdist_group("mysql"),  # the tables are made once
]

BOUND_S = 1.0
LATEST_S = BOUND_S + 2


@pytest.fixture(scope="module")
def platform(endpoint: str) -> Iterator[Platform]:
    with (
        new_mysql_database() as url,
        open_platform(endpoint, extra={"storage": {"mysql": {"mysql_url": url}}}) as platform,
    ):
        yield platform


@pytest.fixture
def url(platform: Platform) -> str:
    return str(yaml.safe_load((platform.home / "dagster.yaml").read_text())["storage"]["mysql"]["mysql_url"])


def written(home: Path, url: str) -> str:
    (home / "dagster.yaml").write_text(yaml.safe_dump({"storage": {"mysql": {"mysql_url": url}}}))
    return str(home)


@pytest.fixture
def instance(url: str, tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.from_config(written(tmp_path, url)) as instance:
        bound_connections(instance, ours=True)
        yield instance


def asked(instance: DagsterInstance, query: str) -> object:
    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        return connection.exec_driver_sql(query).scalar()


def change(instance: DagsterInstance, *statements: str) -> None:
    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize("what", ["run", "step"])
def test_exactly_one_receiver_starts_it(platform: Platform, what: str) -> None:
    started = count_starts(platform, what, rounds=3)
    assert set(started) == {1}, started


def test_a_key_is_inserted_once_and_replaced_by_whoever_knows_it(instance: DagsterInstance) -> None:
    assert insert_value(instance, "key", "first")
    assert not insert_value(instance, "key", "again")
    assert replace_value(instance, "key", "first", "second")
    assert not replace_value(instance, "key", "first", "third")


def test_runs_and_steps_work_and_stop(platform: Platform) -> None:
    steps = replace(platform, jobs=STEP_JOBS)
    with platform.worker("-n", "w"):
        polite, stubborn = platform.launch("sleepy_job"), platform.launch("carries_on_job", grace=1)
        in_steps = steps.launch("sleepy_steps")
        assert platform.finished(platform.launch("quick_job", seconds=0)) is DagsterRunStatus.SUCCESS
        platform.marked(polite, "started"), platform.marked(stubborn, "started")
        steps.wait_started(in_steps, 1)
        for run_id in (polite, stubborn, in_steps):
            assert platform.launcher.terminate(run_id)
        for run_id in (polite, stubborn, in_steps):
            assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
            platform.assert_nothing_left(run_id)


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(0.3, call)
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize("kill", ["CONNECTION", "QUERY"])
def test_a_call_that_the_server_has_killed_is_an_outage(
    platform: Platform, instance: DagsterInstance, url: str, kill: str
) -> None:
    name = url.rpartition("_")[2]
    sleeps = f"select sleep(20) as `{name}`"

    def killed() -> None:
        found = f"select id from information_schema.processlist where info like 'select sleep%%{name}%%'"  # noqa: S608
        change(platform.instance, f"KILL {kill} {asked(platform.instance, found)}")

    with meanwhile(killed), pytest.raises(outages()):
        asked(instance, sleeps)


def test_a_row_that_others_keep_locked_is_an_outage(platform: Platform, instance: DagsterInstance) -> None:
    insert_value(instance, "locked", "first")
    locks = "update kvs set value = 'second' where `key` = 'locked'"
    with platform.instance.run_storage.connect() as other:  # type: ignore[attr-defined]
        other.exec_driver_sql(locks)
        with pytest.raises(outages(), match="Lock wait timeout"):
            change(instance, "set innodb_lock_wait_timeout = 1", locks)


def test_a_call_that_nobody_answers_ends_in_time_and_the_next_one_gets_through(url: str, tmp_path: Path) -> None:
    """Whether it waits for an answer, connects, or opens the instance."""
    with tcp_proxy(*target(url)) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", written(tmp_path, by_way_of(url, proxy)))

        def never(call: Callable[[], object]) -> None:
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="no answer within"), time_limit(BOUND_S):
                call()
            assert time.monotonic() - began < LATEST_S

        with open_instance() as instance:
            bound_connections(instance, ours=True)
            with meanwhile(proxy.swallow):
                never(lambda: asked(instance, "select sleep(60)"))
            never(lambda: asked(instance, "select 1"))
            never(open_instance)
            proxy.heal()
            assert asked(instance, "select 1") == 1


def test_doctor_says_what_the_url_lacks(url: str, tmp_path: Path) -> None:
    for query, verdict in (("", "warning"), ("?connect_timeout=10", "ok")):
        with DagsterInstance.from_config(written(tmp_path, url + query)) as instance:
            found = connection_bounds(instance)
            assert found is not None
            assert found.verdict == verdict, found
