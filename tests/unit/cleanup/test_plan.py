"""Which ops were cut short, as the event log tells it."""

import time
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun
from dagster._core.definitions.dependency import NodeHandle
from dagster._core.execution.plan.objects import ErrorSource, StepFailureData, StepSuccessData

from dagster_taskiq import CleanupContext, on_cancel
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cleanup.plan import PendingHandler, handler_names, read_history
from dagster_taskiq.storage import cleanup_events, engine_events
from dagster_taskiq.storage.event_log import append_event


def undo(context: CleanupContext) -> None:
    """Nothing."""


@dg.op
@on_cancel(undo)
def upload() -> None:
    """Nothing."""


@dg.job
@on_cancel(undo)
def job() -> None:
    upload()


class Log:
    """The log of one run, written line by line."""

    def __init__(self, instance: DagsterInstance) -> None:
        self.instance = instance
        self.run: DagsterRun = instance.create_run_for_job(job)

    def event(self, kind: DagsterEventType, step_key: str | None = "upload") -> None:
        data: Any = None
        if kind is DagsterEventType.STEP_FAILURE:
            data = StepFailureData(error=None, user_failure_data=None, error_source=ErrorSource.USER_CODE_ERROR)  # type: ignore[no-untyped-call]
        if kind is DagsterEventType.STEP_SUCCESS:
            data = StepSuccessData(duration_ms=1.0)  # type: ignore[no-untyped-call]
        handle = NodeHandle(step_key or "upload", None)
        event = DagsterEvent(kind.value, "job", node_handle=handle, step_key=step_key, event_specific_data=data)
        self.instance.report_dagster_event(event, self.run.run_id)

    def starts(self) -> None:
        self.event(DagsterEventType.RUN_START, None)
        self.event(DagsterEventType.STEP_START)

    def interrupted(self, kind: CancelKind) -> None:
        append_event(self.instance, self.run, engine_events.reached("w", Cancellation(kind, "why")))
        append_event(self.instance, self.run, engine_events.interrupting(1, 30, time.time()))

    def outstanding(self) -> list[str]:
        return [duty.name for duty in read_history(self.instance, self.run).outstanding(job, self.run)]


def fails(log: Log) -> None:
    log.event(DagsterEventType.STEP_FAILURE)


def succeeds(log: Log) -> None:
    log.event(DagsterEventType.STEP_SUCCESS)


def person(log: Log) -> None:
    log.interrupted(CancelKind.REQUESTED)


def deadline(log: Log) -> None:
    log.interrupted(CancelKind.DEADLINE)


def shutdown(log: Log) -> None:
    log.interrupted(CancelKind.SHUTDOWN)


def canceling(log: Log) -> None:
    log.instance.report_run_canceling(log.run)


@pytest.mark.parametrize(
    ("story", "cut_short"),
    [
        ([], True),
        ([succeeds], False),
        ([fails], False),
        ([fails, person], False),
        ([succeeds, person, canceling], False),
        ([person, fails], True),
        ([deadline, fails], True),
        ([fails, deadline], False),
        ([canceling, fails], True),
        ([shutdown, fails], False),
    ],
    ids=lambda value: "-".join(step.__name__ for step in value) if isinstance(value, list) else "",
)
def test_which_ops_were_cut_short(story: list[Callable[[Log], None]], cut_short: bool) -> None:
    with DagsterInstance.ephemeral() as instance:
        log = Log(instance)
        log.starts()
        for happens in story:
            happens(log)
        assert log.outstanding() == [*(["undo of upload"] if cut_short else []), "undo"]


def test_of_a_run_that_never_started_nothing_is() -> None:
    with DagsterInstance.ephemeral() as instance:
        assert Log(instance).outstanding() == []


def test_what_was_done_is_not_done_again() -> None:
    with DagsterInstance.ephemeral() as instance:
        log = Log(instance)
        log.starts()
        of_op, of_job = (
            pending.handler.identity for pending in read_history(instance, log.run).outstanding(job, log.run)
        )
        assert of_op != of_job
        succeeded = cleanup_events.cleanup("undo", of_op, 1, 0.1, None)
        done = engine_events.with_facts(succeeded, {engine_events.OF_KEY: "upload"})
        append_event(instance, log.run, done, "upload")
        assert log.outstanding() == ["undo"]
        broke = cleanup_events.cleanup("undo", of_job, 1, 0.1, "it broke")
        append_event(instance, log.run, engine_events.with_facts(broke, {engine_events.OF_KEY: ""}))
        (left,) = read_history(instance, log.run).outstanding(job, log.run)
        assert (left.failed, left.exhausted) == (["it broke"], True)


@on_cancel(undo)
@dg.graph
def twice() -> None:
    upload()
    upload.alias("again")()


def test_handlers_of_one_name_are_told_apart_by_where_they_were_declared() -> None:
    """One function on an op that is in the graph twice, on the graph, on its job, and there twice: five handlers."""
    whole = on_cancel(undo)(on_cancel(undo)(twice.to_job(name="job")))
    with DagsterInstance.ephemeral() as instance:
        log = Log(instance)
        log.starts()
        log.event(DagsterEventType.STEP_START, "again")

        def left() -> list[PendingHandler]:
            return list(read_history(instance, log.run).outstanding(whole, log.run))

        names = ["undo of again", "undo of upload", "undo", "undo-2", "undo-3"]
        assert [pending.name for pending in left()] == names
        assert len({pending.key for pending in left()}) == len(names)
        while todo := left():
            assert [pending.name for pending in todo] == names
            event = cleanup_events.cleanup(todo[0].handler.name, todo[0].handler.identity, 1, 0.1, None)
            append_event(
                instance, log.run, engine_events.with_facts(event, {engine_events.OF_KEY: todo[0].step_key or ""})
            )
            del names[0]
        assert not names


def test_their_names() -> None:
    assert handler_names(job) == ["undo", "undo of upload"]
