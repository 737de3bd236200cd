"""What is asked about a run costs the same, however long its log is. Counted are statements and rows, never time."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, job
from dagster._core.storage.event_log import SqlEventLogStorage, SqlEventLogStorageTable
from sqlalchemy.engine import cursor as sqlalchemy_cursor

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cleanup.record import cleanup_record
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import picked_up
from dagster_taskiq.storage.event_log import StepRef, append_event, run_will_resume
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.step_state import forget_old_states, state_of
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.worker.admission import Candidate, admit_run
from dagster_taskiq.worker.finalization import examine

SHORT, LONG = 10, 5_000
TASK, STEP = "task-1", StepRef("step", "task-of-the-step")


@job
def nothing() -> None: ...


@contextmanager
def counting(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls that fetch rows, and rows, of everything that goes through SQLAlchemy."""
    counted: Counter[str] = Counter()
    strategy = sqlalchemy_cursor.CursorFetchStrategy
    with patch.context() as patched:
        for name in ("fetchall", "fetchmany", "fetchone"):
            fetch = getattr(strategy, name)

            def count(*args: Any, _fetch: Callable[..., Any] = fetch, _name: str = name, **kwargs: Any) -> Any:
                found = _fetch(*args, **kwargs)
                counted["fetches"] += 1
                counted["rows"] += len(found) if _name != "fetchone" else int(found is not None)
                return found

            patched.setattr(strategy, name, count)
        yield counted


def make_run(instance: DagsterInstance, events: int) -> DagsterRun:
    """At work, on a worker that is alive, with that many events of its step in its log."""
    run = instance.create_run_for_job(nothing, tags={TASK_ID_TAG: TASK}, status=DagsterRunStatus.STARTED)
    append_event(instance, run, picked_up("other", STEP.task_id, "there"), STEP.step_key)
    instance.report_dagster_event(DagsterEvent(DagsterEventType.RUN_START.value, "nothing", message=""), run.run_id)
    storage, table = instance.event_log_storage, SqlEventLogStorageTable
    assert isinstance(storage, SqlEventLogStorage)
    with storage.run_connection(run.run_id) as connection:
        rows = connection.execute(table.select().where(table.c.run_id == run.run_id)).mappings().fetchall()
        step = next(dict(row) for row in rows if row["step_key"] == STEP.step_key)
        connection.execute(table.insert(), [{**step, "id": None} | {"id": 1_000_000 + n} for n in range(events)])
    claims = Claims(instance, Heartbeats(instance, 60, 5))
    assert claims.take(run, "other", TASK, "there", None)
    StepClaims(instance).claim(run, STEP, "other", "there")
    claims.heartbeats.beat("other")
    return run


def admit(instance: DagsterInstance, run: DagsterRun) -> None:
    admit_run(
        instance,
        Claims(instance, Heartbeats(instance, 60, 5)),
        Candidate("execute_run", run.run_id, TASK, "me", "here"),
    )


def take_over(instance: DagsterInstance, run: DagsterRun) -> None:
    Heartbeats(instance, 60, 5).gone("other")
    admit(instance, run)


def check_health(instance: DagsterInstance, run: DagsterRun) -> None:
    launcher = TaskiqRunLauncher("http://127.0.0.1/1/q", "us-east-1")
    launcher.register_instance(instance)
    launcher.check_run_worker_health(run)


def end(kind: CancelKind) -> Callable[[DagsterInstance, DagsterRun], None]:
    def look(instance: DagsterInstance, run: DagsterRun) -> None:
        examine(instance, run.run_id, None, Cancellation(kind, "why", received_at=time.time() - 60), "me")

    return look


QUESTIONS: dict[str, Callable[[DagsterInstance, DagsterRun], object]] = {
    "may this message be started, beside a live worker": admit,
    "may this message be started, after a dead worker": take_over,
    "is its worker alive": check_health,
    "how does it end after a cancel": end(CancelKind.REQUESTED),
    "how does it end after a shutdown": end(CancelKind.SHUTDOWN),
    "which of its steps are running": lambda instance, run: StepClaims(instance).running(run.run_id),
    "does it have to be cleaned up": lambda instance, run: cleanup_record(instance, run.run_id),
    "will it be resumed": lambda instance, run: run_will_resume(instance, run.run_id),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_it_costs_the_same_with_a_long_log(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    for events in (SHORT, LONG):
        with DagsterInstance.ephemeral() as instance, monkeypatch.context() as patch:
            run = make_run(instance, events)
            patch.setattr(DagsterInstance, "run_monitoring_enabled", property(lambda _: True))
            patch.setattr(DagsterInstance, "run_monitoring_max_resume_run_attempts", property(lambda _: 3))
            with counting(monkeypatch) as counted:
                QUESTIONS[question](instance, run)
            costs.append(dict(counted))
    assert costs[0] == costs[1]
    assert costs[1]["rows"] < LONG / 10, costs


def test_to_forget_the_states_of_many_runs_costs_as_much_as_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    with DagsterInstance.ephemeral() as instance:
        costs = []
        for number in (3, 60):
            for _ in range(number):
                run = instance.create_run_for_job(nothing, status=DagsterRunStatus.STARTED)
                state_of(instance, run.run_id, "one")["key"] = 1
            with counting(monkeypatch) as counted:
                forget_old_states(instance)
            costs.append(counted["fetches"])
    assert costs[0] == costs[1]
