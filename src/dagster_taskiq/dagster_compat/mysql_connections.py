"""The connections to Dagster's MySQL or MariaDB: waits for the server have a bound, and its outages have one name.

Knows SQLAlchemy and MySQL's own driver, with which dagster-mysql connects; connections by another driver are left as
they are. Dagster opens a connection for each call, so what a connection is told when it begins holds for that call.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeGuard
from weakref import WeakSet

from dagster_taskiq._time_limit import limited_until

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

__all__ = [
    "CONNECT_TIMEOUTS",
    "bound_mysql",
    "bounded_while_opening",
    "is_bounded_mysql",
    "is_mysql",
    "mysql_can_be_bounded",
]

CONNECT_TIMEOUTS: Final = ("connect_timeout", "connection_timeout")
"""The names that the driver has for it, in seconds. Without it, connecting may wait for ever."""
_DRIVER: Final = "mysqlconnector"
_CONNECT_S: Final = 10
_KNOWS_TIMEOUTS: Final = (9, 2)
"""The first release of the driver that can be told how long to wait for an answer."""
_LOST: Final = frozenset(
    {
        1053,  # server shutdown in progress
        1927,  # MariaDB: the connection was killed
        2002,
        2003,
        2006,
        2013,
        2055,  # the connection cannot be had, or is lost
        3024,  # in the driver: no answer in time; on MySQL also: max_execution_time
        4031,  # MySQL: the server has closed an idle connection
    }
)
"""Errors after which a connection is of no use: nobody waits for the answer to a ROLLBACK on it."""
_TRY_AGAIN: Final = frozenset(
    {
        1040,  # too many connections
        1205,  # waited too long for a lock
        1213,  # deadlock: the other one may go on
        1317,  # the query was killed
        1969,  # MariaDB: max_statement_time
    }
)
"""Further ones after which the same may work. The driver raises most of both as errors of no kind."""
_bounded: "WeakSet[Engine]" = WeakSet()


def is_mysql(engine: "Engine | None") -> "TypeGuard[Engine]":
    """Whether that engine connects to MySQL or MariaDB with MySQL's own driver."""
    return engine is not None and engine.dialect.name in {"mysql", "mariadb"} and engine.driver == _DRIVER


def is_bounded_mysql(engine: object) -> bool:
    """Whether `bound_mysql` has seen that engine."""
    return engine in _bounded


def mysql_can_be_bounded(engine: "Engine") -> bool:
    """Whether its driver can be told how long to wait for an answer: mysql-connector-python 9.2 and newer."""
    return _knows_timeouts(engine.dialect)


def bound_mysql(engine: "Engine", statement_s: float) -> None:
    """From now on waits for answers end, and an outage is an `OperationalError`. Does nothing the second time.

    `statement_s`: how long a statement may take where the thread has no `time_limit`.
    """
    from sqlalchemy import event
    from sqlalchemy.pool import NullPool

    if engine in _bounded:
        return
    _bounded.add(engine)
    event.listen(engine, "handle_error", _name_outage, retval=True)
    event.listen(engine, "before_cursor_execute", lambda *_: _left(statement_s))
    if isinstance(engine.pool, NullPool):  # or else the limit of one call would be that of later ones
        event.listen(engine, "do_connect", lambda dialect, _, __, given: _bound(dialect, given, statement_s))


@contextmanager
def bounded_while_opening(statement_s: float) -> Iterator[None]:
    """While Dagster opens an instance, which already asks the server: the same for the connections of all threads."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def bound(dialect: Any, _record: object, _cargs: object, parameters: dict[str, Any]) -> None:
        if dialect.driver == _DRIVER:
            _bound(dialect, parameters, statement_s)

    def name(context: Any) -> Any:
        return _name_outage(context) if context.dialect.driver == _DRIVER else None

    event.listen(Engine, "do_connect", bound)
    event.listen(Engine, "handle_error", name, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "do_connect", bound)
        event.remove(Engine, "handle_error", name)


def _knows_timeouts(dialect: Any) -> bool:
    return bool(dialect.loaded_dbapi.__version_info__[:2] >= _KNOWS_TIMEOUTS)


def _bound(dialect: Any, parameters: dict[str, Any], statement_s: float) -> None:
    left = max(1, math.ceil(_left(statement_s)))
    name = next((name for name in CONNECT_TIMEOUTS if name in parameters), CONNECT_TIMEOUTS[0])
    parameters[name] = min(parameters.get(name) or _CONNECT_S, left)
    if _knows_timeouts(dialect):
        parameters.setdefault("read_timeout", left)
        parameters.setdefault("write_timeout", left)


def _left(statement_s: float) -> float:
    """Seconds for the statement that begins now. Raises `TimeoutError` when the thread has none left."""
    limit = limited_until()
    left = math.inf if limit is None else limit - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for the calls to the database is over")
    return min(left, statement_s)


def _name_outage(context: Any) -> Any:
    from sqlalchemy.exc import OperationalError

    error = context.original_exception
    number = getattr(error, "errno", None)
    if number in _LOST:
        context.is_disconnect = True
    elif number not in _TRY_AGAIN:
        return None
    return OperationalError(context.statement, context.parameters, error)
