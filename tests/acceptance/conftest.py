"""Fixtures with real processes: an emulator, Dagster homes, workers."""

import os
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from dagster import DagsterInstance
from tests.support.moto import CREDENTIALS, create_queues
from tests.support.platform import STEP_JOBS, Platform, write_home
from tests.support.waiting import wait_until
from tests.support.warm import Warm, warm_processes

from dagster_taskiq.dagster_compat.storage import read_migration_scripts_once

MYSQL_VARIABLE = "DAGSTER_TASKIQ_TEST_MYSQL_URL"
POSTGRES_VARIABLE = "DAGSTER_TASKIQ_TEST_POSTGRES_URL"
REQUIRE_ALL_VARIABLE = "DAGSTER_TASKIQ_TEST_REQUIRE_ALL"
DEFAULT_MYSQL = "mysql+mysqlconnector://root@127.0.0.1:3306"
DEFAULT_POSTGRES = "postgresql://postgres@127.0.0.1:5432/postgres"

SNAPPY: Mapping[str, Any] = {
    "wait_time_seconds": 1,
    "visibility_timeout_seconds": 12,
    "grace_seconds": 10,
    "status_poll_seconds": 1,
    "drain_seconds": 3,
    "stop_timeout_seconds": 15,
    "max_concurrent_runs": 8,
}
"""Settings that make the tests quick: moto wakes its waiting pollers once a second, so long polls are short."""
UNHURRIED: Mapping[str, Any] = {"visibility_timeout_seconds": 30}
"""For tests that put dozens of processes on a busy machine and lose none of them: a worker is taken for a hanging one
when its event loop stands still for a quarter of this."""

PlatformFactory = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def credentials() -> Iterator[None]:
    """The emulator's credentials, for this process and the ones it starts."""
    before = dict(os.environ)
    os.environ.update(CREDENTIALS)
    os.environ.pop("DAGSTER_HOME", None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def warm(credentials: None) -> Iterator[Warm]:
    """Workers are forked from one warm interpreter; what starts real ones says so."""
    read_migration_scripts_once()
    with warm_processes() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_process_is_left(warm: Warm) -> Iterator[None]:
    """What a test starts, it ends. Workers that tests share are older than it."""
    began = time.time()
    yield

    def left() -> dict[int, str]:
        children = children_of(os.getpid(), warm.pid)
        return {pid: command for pid, command in children.items() if pid != warm.pid and age_at(pid, began) < 0}

    wait_until(lambda: not left(), "every process that the test has started is gone", within=10, seen=left)


def age_at(pid: int, moment: float) -> float:
    """How old a process was at that moment, in seconds; negative when it was started later; 0 when it is gone."""
    try:
        return moment - psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def children_of(*pids: int) -> dict[int, str]:
    """Living children of any thread of these processes, with their command; not Python's own helper."""
    found = {}
    for listed in [one for pid in pids for one in Path(f"/proc/{pid}/task").glob("*/children")]:
        with suppress(OSError):  # the thread is gone
            for child in listed.read_text().split():
                with suppress(OSError):
                    command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command and "resource_tracker" not in command:  # a zombie has no command
                        found[int(child)] = command
    return found


@pytest.fixture(scope="session")
def endpoint(moto: str) -> str:
    return moto


@contextmanager
def open_platform(
    endpoint: str,
    *,
    fifo: bool = False,
    source: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Iterator[Platform]:
    """A new home and new queues; everything is gone afterwards."""
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="dagster-taskiq-"))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        queue_url = create_queues(endpoint, f"q-{uuid.uuid4().hex[:8]}", fifo)
        write_home(home, queue_url, endpoint, source={**SNAPPY, **(source or {})}, extra=extra or {})
        instance = stack.enter_context(DagsterInstance.from_config(str(home)))
        yield Platform(home, queue_url, endpoint, instance)


@contextmanager
def steps_platform(endpoint: str, **options: Any) -> Iterator[Platform]:
    """A platform whose jobs' steps are tasks of their own."""
    with open_platform(endpoint, **options) as platform:
        platform.jobs = STEP_JOBS
        yield platform


@pytest.fixture(scope="session")
def working_steps(endpoint: str) -> Iterator[Platform]:
    """One of those, with two workers that serve both queues. Shared: what uses it leaves the workers alone."""
    with steps_platform(endpoint, source=UNHURRIED) as platform, platform.worker("-n", "a"), platform.worker("-n", "b"):
        yield platform


@pytest.fixture(scope="module")
def platform(endpoint: str) -> Iterator[Platform]:
    """Standard queues, SQLite, no worker."""
    with open_platform(endpoint) as platform:
        yield platform


@pytest.fixture(scope="session")
def working(endpoint: str) -> Iterator[Platform]:
    """One worker. Shared: what uses it leaves the worker alone, and waits for the end of its runs."""
    with open_platform(endpoint, source=UNHURRIED) as platform, platform.worker("-n", "w"):
        yield platform


def missing(what: str) -> None:
    """Skip, unless everything is required."""
    if os.environ.get(REQUIRE_ALL_VARIABLE):
        pytest.fail(f"{what}, and {REQUIRE_ALL_VARIABLE} is set", pytrace=False)
    pytest.skip(what)


def chromium_program() -> str:
    """Where it is; without it, the test is skipped."""
    program = shutil.which("chromium")
    if program is None:
        missing("no Chromium (apt-get install chromium)")
    return str(program)


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a new, empty database."""
    with new_database() as url:
        yield url


@contextmanager
def new_database() -> Iterator[str]:
    """The same for a fixture that several tests share."""
    import psycopg2  # type: ignore[import-untyped]
    import psycopg2.extensions  # type: ignore[import-untyped]

    base = os.environ.get(POSTGRES_VARIABLE, DEFAULT_POSTGRES)
    name = f"dagster_taskiq_test_{uuid.uuid4().hex[:12]}"
    try:
        connection = psycopg2.connect(base, connect_timeout=3)
    except psycopg2.OperationalError as error:
        missing(f"no PostgreSQL server at {base} ({str(error).splitlines()[0]}); set {POSTGRES_VARIABLE}")
    connection.set_isolation_level(psycopg2.extensions.ISOLATION_LEVEL_AUTOCOMMIT)
    cursor = connection.cursor()
    cursor.execute(f"CREATE DATABASE {name}")
    # With the driver's name: without it SQLAlchemy 2.1 looks for psycopg 3, and dagster-postgres brings psycopg2.
    yield urllib.parse.urlsplit(base)._replace(scheme="postgresql+psycopg2", path=f"/{name}").geturl()
    cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    connection.close()


@contextmanager
def new_mysql_database() -> Iterator[str]:
    """The same on MySQL or MariaDB. Skips without a server, also where everything is required."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    pytest.importorskip("dagster_mysql")
    base = os.environ.get(MYSQL_VARIABLE, DEFAULT_MYSQL)
    name = f"dagster_taskiq_test_{uuid.uuid4().hex[:12]}"
    engine = sqlalchemy.create_engine(f"{base}/?connect_timeout=3", isolation_level="AUTOCOMMIT")
    try:
        connection = engine.connect()
    except sqlalchemy.exc.DBAPIError as error:
        pytest.skip(f"no MySQL or MariaDB server at {base} ({error.orig}); set {MYSQL_VARIABLE}")
    with connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield f"{base}/{name}"
    with engine.connect() as connection:  # the first one may have been idle for too long
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    engine.dispose()
