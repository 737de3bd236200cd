"""The connections to Dagster's PostgreSQL: every wait for an answer has a bound, and our own processes share them.

Dagster opens a connection for every call, and waits for ever. Here, for the engines of one instance:

* connecting has a timeout, and TCP notices when the other side is gone (libpq's parameters, where the URL sets none);
* a statement that is not answered in time has its connection closed under it, by a thread that looks after all
  statements of this process: `time_limit`, or else a little more than the `statement_timeout` that the server was told.
  Whoever waits gets an error, also where something in between (a load balancer, a proxy) keeps the connection open;
* in our own processes a connection is used again, and closed when nobody has used it for some seconds: many idle
  children must not use up the server's connections, and what was idle may be dead without anybody having been told.

`mysql_connections` sees to those to MySQL. Other databases are left as they are. SQLAlchemy is imported where it is
used, as in `storage`.
"""

import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet, ref

from dagster import DagsterInstance

from dagster_taskiq._time_limit import limited_until, time_limit
from dagster_taskiq.dagster_compat.mysql_connections import bound_mysql, is_bounded_mysql, is_mysql

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

__all__ = [
    "CONNECT_PARAMETERS",
    "READ_S",
    "STATEMENT_TIMEOUT_S",
    "bound_connections",
    "bounded_calls",
    "configured_connection",
    "is_bounded",
]

STATEMENT_TIMEOUT_S: Final = 60
"""What the server allows a statement in our own processes; Dagster's webserver allows 15 s by default."""
CONNECT_PARAMETERS: Final[Mapping[str, int]] = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""libpq's, in seconds, `tcp_user_timeout` in ms: a peer that is gone is noticed after 20 s, whoever waits for whom.

https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
"""
_ON_THE_WAY_S: Final = 5.0
READ_S: Final = STATEMENT_TIMEOUT_S + _ON_THE_WAY_S
"""Then the server would have answered a statement, or ended it."""
_SHORTEST_CONNECT_S: Final = 2  # libpq knows no shorter one
_LOOK_EVERY_S: Final = 0.5
_IDLE_S: Final = 5.0
_POOL_SIZE: Final = 5
_DRIVERS: Final = {"psycopg2", "psycopg"}


def bound_connections(instance: DagsterInstance, *, ours: bool) -> None:
    """Give all connections of that instance to PostgreSQL or MySQL a bound. Does nothing the second time.

    `ours`: this is a process of ours, a worker or a child. Then connections are shared, the server gets a
    `statement_timeout`, and a statement without a `time_limit` is bounded as well. Elsewhere they are Dagster's.
    """
    storages = [instance.run_storage, instance.event_log_storage, instance.schedule_storage]
    shared: dict[Any, Engine] = {}
    for storage in storages:
        engine = getattr(storage, "_engine", None)
        if is_mysql(engine):
            if storage is instance.run_storage and not is_bounded(storage):
                _look_once_for_columns(storage)
            bound_mysql(engine, READ_S)
        if engine is None or engine.dialect.name != "postgresql" or engine.driver not in _DRIVERS:
            continue
        if ours and engine not in _bounded:
            key = (engine.url, getattr(storage, "_token_provider", None))
            if key not in shared:
                shared[key] = _pooled(storage)
            storage._engine = engine = shared[key]  # type: ignore[union-attr]  # noqa: SLF001
        if engine not in _bounded:
            if storage is instance.run_storage:
                _look_once_for_columns(storage)
            _Bound(engine, ours=ours).install(engine)


@contextmanager
def bounded_calls(instance: DagsterInstance, within_s: float) -> Iterator[None]:
    """Calls to the database in a process of Dagster's, by this thread: they have so many seconds together.

    Raises `TimeoutError`, see `time_limit`.
    """
    bound_connections(instance, ours=False)
    with time_limit(within_s):
        yield


@dataclass(frozen=True, slots=True)
class ConfiguredConnection:
    """How `dagster.yaml` says that PostgreSQL is connected to: libpq's parameters, and if it is by a URL."""

    parameters: Mapping[str, str]
    as_url: bool


def configured_connection(instance: DagsterInstance) -> ConfiguredConnection | None:
    """What the configuration says about connections of the run storage. None for another database, or driver."""
    engine = getattr(instance.run_storage, "_engine", None)
    if engine is None or engine.dialect.name != "postgresql" or engine.driver not in _DRIVERS:
        return None
    reference = instance.get_ref()
    described = reference.storage_data or reference.run_storage_data
    as_url = described is None or "postgres_db:" not in described.config_yaml
    return ConfiguredConnection({name: str(value) for name, value in engine.url.query.items()}, as_url)


def is_bounded(storage: object) -> bool:
    """Whether that storage is on a server whose connections have been bounded."""
    engine = getattr(storage, "_engine", None)
    return engine in _bounded or is_bounded_mysql(engine)


def _look_once_for_columns(run_storage: Any) -> None:
    """Dagster asks the server before every reading of runs, and every change of their status, if a column is there."""
    look, known = run_storage.has_run_stats_index_cols, False

    def has_run_stats_index_cols() -> bool:
        nonlocal known
        known = known or look()  # once it is there, it stays
        return known

    run_storage.has_run_stats_index_cols = has_run_stats_index_cols


def _pooled(storage: Any) -> "Engine":
    from dagster_postgres.utils import create_pg_engine

    # As `optimize_for_webserver` does it for the webserver.
    return create_pg_engine(
        storage.postgres_url,
        storage._token_provider,  # noqa: SLF001
        isolation_level="AUTOCOMMIT",
        pool_size=_POOL_SIZE,
        max_overflow=-1,
        pool_use_lifo=True,
    )


class _Bound:
    """What is listened to on one engine."""

    def __init__(self, engine: "Engine", *, ours: bool) -> None:
        self._engine = ref(engine)  # which holds its listeners
        self._ours = ours
        self._takes_options = ours

    def install(self, engine: "Engine") -> None:
        from sqlalchemy import event

        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "checkout", lambda *_: _watch.answered())
        event.listen(engine, "before_cursor_execute", self._before)
        event.listen(engine, "after_cursor_execute", lambda *_: _watch.answered())
        event.listen(engine, "handle_error", lambda _: _watch.answered())
        event.listen(engine, "checkin", self._checked_in)
        _bounded.add(engine)

    def _until(self) -> float:
        """When the statement that begins now is late. Raises `TimeoutError` when that is over."""
        now, limit = time.monotonic(), limited_until()
        if limit is not None and limit <= now:
            raise TimeoutError("the time for the calls to the database is over")
        without = now + READ_S if self._ours else math.inf
        return min(without, math.inf if limit is None else limit)

    def _connect(self, dialect: Any, _: object, cargs: list[Any], cparams: dict[str, Any]) -> Any:
        until = self._until()
        parameters: dict[str, Any] = {**CONNECT_PARAMETERS, **cparams}
        if until < math.inf:
            left = max(_SHORTEST_CONNECT_S, math.ceil(until - time.monotonic()))
            parameters["connect_timeout"] = min(int(parameters["connect_timeout"]) or left, left)
        connection = self._connected(dialect, cargs, parameters)
        _watch.wait(connection, until)  # SQLAlchemy's first questions, until the connection is handed out
        return connection

    def _connected(self, dialect: Any, cargs: list[Any], parameters: dict[str, Any]) -> Any:
        options = parameters.get("options") or ""
        if self._takes_options and "statement_timeout" not in options:
            ours = f"{options} -c statement_timeout={STATEMENT_TIMEOUT_S * 1_000}".strip()
            try:
                return dialect.connect(*cargs, **parameters | {"options": ours})
            except dialect.loaded_dbapi.OperationalError as error:
                # PgBouncer: "unsupported startup parameter"; RDS Proxy: "doesn't support command-line options".
                if not any(word in str(error) for word in ("startup parameter", "options")):
                    raise
                self._takes_options = False
        return dialect.connect(*cargs, **parameters)

    def _before(self, connection: Any, *_: object) -> None:
        _watch.wait(connection.connection.dbapi_connection, self._until())

    def _checked_in(self, *_: object) -> None:
        _watch.answered()
        if self._ours and (engine := self._engine()) is not None:
            _watch.used(engine)


class _Watch:
    """The thread that closes connections under statements that are late, and those that nobody uses."""

    def __init__(self) -> None:
        self._waits: dict[int, tuple[Any, float]] = {}
        """By thread: the connection on which it waits for an answer, and until when."""
        self._used: dict[Engine, float] = {}
        """Since when nobody has used the connections that the pool of an engine holds."""
        # The collector of garbage may close a connection in the thread that has it, which then comes here.
        self._lock = threading.RLock()
        self._is_needed = threading.Event()
        self._runs = False

    def wait(self, connection: Any, until: float) -> None:
        if until == math.inf:
            self.answered()
            return
        self._waits[threading.get_ident()] = (connection, until)
        if not self._is_needed.is_set():
            self._is_needed.set()
        if not self._runs:
            self._runs = True
            threading.Thread(target=self._run, name="dagster-taskiq connections", daemon=True).start()

    def answered(self) -> None:
        # With the lock: a connection must not be closed, and its number given to another one, while it is cut.
        with self._lock:
            self._waits.pop(threading.get_ident(), None)

    def used(self, engine: "Engine") -> None:
        self._used[engine] = time.monotonic()

    def _run(self) -> None:
        while True:
            self._is_needed.wait()
            time.sleep(_LOOK_EVERY_S)
            self._cut_what_is_late()
            self._close_what_is_idle()
            self._is_needed.clear()
            if self._waits or self._used:
                self._is_needed.set()

    def _cut_what_is_late(self) -> None:
        now = time.monotonic()
        with self._lock:
            for thread, (connection, until) in [*self._waits.items()]:
                if until <= now:
                    del self._waits[thread]
                    _cut(connection)

    def _close_what_is_idle(self) -> None:
        now = time.monotonic()
        for engine, used in [*self._used.items()]:
            if used + _IDLE_S <= now and not engine.pool.checkedout():  # type: ignore[attr-defined]
                del self._used[engine]
                engine.dispose()


def _cut(connection: Any) -> None:
    """Close the connection's socket, both ways: whoever waits for it gets an error. The rest is the driver's."""
    # It may be closed already.
    with suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def _forget() -> None:
    """In a fork: connections and threads are the parent's."""
    global _watch
    _watch = _Watch()
    for engine in [*_bounded]:
        engine.dispose(close=False)


_watch = _Watch()
_bounded: "WeakSet[Engine]" = WeakSet()
"""The engines that have been seen to."""
os.register_at_fork(after_in_child=_forget)
