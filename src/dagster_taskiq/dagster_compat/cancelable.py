"""Which runs Dagster lets people terminate."""

from dagster import DagsterRunStatus
from dagster._core.storage.dagster_run import CANCELABLE_RUN_STATUSES


def let_starting_runs_be_terminated() -> None:
    """Have this process's webserver and backfill daemon terminate runs that are STARTING, too.

    Dagster refuses them, because most of its launchers can do nothing about such a run; ours can. Its GraphQL, its
    cancellation of backfills and `DagsterRun.is_cancelable` all read this one list. What they show, `canTerminate` of a
    run, is a function of its own: see docs/decisions/011.
    """
    if DagsterRunStatus.STARTING not in CANCELABLE_RUN_STATUSES:
        CANCELABLE_RUN_STATUSES.append(DagsterRunStatus.STARTING)
