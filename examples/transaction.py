"""A PostgreSQL transaction that is rolled back when the work is cancelled, although the statement blocks.

No signal reaches Python while it waits for the answer to a statement, and a server goes on with a statement whose
client is gone. So a callback cancels the statement as soon as the work is cancelled; and should the process have been
killed, the cleanup handler ends its session in the server, by the number that was noted in the token's state.

    DATABASE_URL=postgresql://… dagster-taskiq dev -f examples/transaction.py
"""

import contextlib
import os

import dagster as dg
import psycopg2

from dagster_taskiq import CleanupContext, cancellation_token, on_cancel


class Import(dg.Config):
    table: str = "imported"
    seconds: float = 600


def end_session(context: CleanupContext) -> None:
    """May be called twice: a session that is over is not ended again."""
    if "session" not in context.state:
        return
    with contextlib.closing(psycopg2.connect(os.environ["DATABASE_URL"])) as connection, connection.cursor() as cursor:
        # By its beginning, too: the number alone may be another session's by now.
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND backend_start::text = %s",
            context.state["session"],
        )


@dg.op
@on_cancel(end_session)
def import_rows(config: Import) -> None:
    """Insert, take long over it, and commit."""
    token = cancellation_token()
    with contextlib.closing(psycopg2.connect(os.environ["DATABASE_URL"])) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        token.state["session"] = list(cursor.fetchone())
        token.on_cancelled(connection.cancel)
        cursor.execute(f"INSERT INTO {config.table} SELECT generate_series(1, 1000)")
        cursor.execute("SELECT pg_sleep(%s)", [config.seconds])
        connection.commit()


@dg.job(executor_def=dg.in_process_executor)
def import_everything() -> None:
    """One import."""
    import_rows()


defs = dg.Definitions(jobs=[import_everything])
