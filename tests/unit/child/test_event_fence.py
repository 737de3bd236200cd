"""What the child does where a run's events go in."""

import logging
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterExecutionInterruptedError,
    DagsterInstance,
    DagsterRunStatus,
    job,
)
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.events.log import EventLogEntry
from sqlalchemy.exc import OperationalError

from dagster_taskiq import _retry
from dagster_taskiq.child.control_channel import ControlChannel
from dagster_taskiq.child.event_fence import EventFence, RunFence


@job
def nothing() -> None: ...


RUN_ID = "8adb1c9d-e6ad-4f25-ae64-4db1fa32c38a"


def entry(
    step: str | None, at: float, kind: DagsterEventType = DagsterEventType.STEP_START, run_id: str = RUN_ID
) -> EventLogEntry:
    event = DagsterEvent(event_type_value=kind.value, job_name="job", step_key=step, message="")
    return EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None,
        level=logging.INFO,
        user_message="",
        run_id=run_id,
        timestamp=at,
        step_key=step,
        job_name="job",
        dagster_event=event,
    )


class Passing(EventFence):
    """A fence that lets everything through."""

    def _holds(self, event: Any, kind: DagsterEventType | None) -> bool:
        return False

    def _stored(self, event: Any, kind: DagsterEventType | None) -> None:
        pass


def loses(answer: bool, times: int, store: Callable[..., None]) -> Callable[..., None]:
    """A store whose connection breaks: before the commit, or (`answer`) after it."""
    left = times

    def broken(event: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if answer or left < 0:
            store(event, **options)
        if left >= 0:
            raise OperationalError("insert", {}, ConnectionResetError())

    return broken


@pytest.mark.parametrize("answer", [True, False])
def test_an_event_whose_storing_was_not_confirmed_is_there_once(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "_FIRST_PAUSE_S", 0.001)
    ours, theirs = socket.socketpair()
    now = time.time()
    with ours, theirs, DagsterInstance.ephemeral() as instance:
        monkeypatch.setattr(instance, "handle_new_event", loses(answer, 2, instance.handle_new_event))
        fence = Passing(instance, RUN_ID, ControlChannel(ours))
        fence(entry("one", now))
        fence(entry("two", now))
        fence(entry("one", now + 0.000001))
        stored = [(found.step_key, found.timestamp) for found in instance.all_logs(RUN_ID)]
    assert stored == [("one", now), ("two", now), ("one", now + 0.000001)]


@pytest.mark.parametrize("end", ["RUN_CANCELED", "RUN_FAILURE", "RUN_CANCELING"])
def test_an_end_that_comes_in_the_moment_before_run_start_wins(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the fence has looked, and before RUN_START is stored: Dagster's transitions are unguarded."""
    code = ReconstructableJob.for_file(__file__, "nothing")
    ours, theirs = socket.socketpair()
    with ours, theirs, DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(nothing, job_code_origin=code.get_python_origin())
        process: Any = SimpleNamespace(control=ControlChannel(ours), interrupted=False)
        fence = RunFence(instance, run.run_id, process)

        def store_too_late(event: Any, **options: Any) -> None:
            instance.report_dagster_event(
                DagsterEvent(DagsterEventType[end].value, "nothing", message="by force"), run.run_id
            )
            instance.handle_new_event(event, **options)

        monkeypatch.setattr(fence, "_store", store_too_late)
        with pytest.raises(DagsterExecutionInterruptedError):
            fence(entry(None, time.time(), DagsterEventType.RUN_START, run.run_id))
        after = instance.get_run_by_id(run.run_id)
        assert after is not None
        assert after.status is DagsterRunStatus[end.removeprefix("RUN_")]
        monkeypatch.undo()
        with pytest.raises(DagsterExecutionInterruptedError):
            fence(entry(None, time.time(), DagsterEventType.RUN_START, run.run_id))
        kinds = [found.dagster_event_type for found in instance.all_logs(run.run_id)]
        assert kinds.count(DagsterEventType.RUN_START) == 1, "one that is seen in time is not even written"
