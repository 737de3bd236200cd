"""The error of a step that was interrupted."""

import asyncio
from collections.abc import Callable

import pytest
from dagster import DagsterExecutionInterruptedError
from dagster._core.execution.plan import execute_plan
from dagster._core.executor import multiprocess
from dagster._utils.error import USER_FACING_ERROR_ID_ATTR_NAME

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.words import THE_RUN, UNKNOWN_AUTHOR, why_stopped
from dagster_taskiq.dagster_compat.interrupts import raise_interrupts_as
from dagster_taskiq.dagster_compat.step_failures import interrupt_info

WHAT = "stopped: run terminated by ada"


def interrupted() -> None:
    try:
        open_the_file()
    except ValueError as error:
        interrupt = DagsterExecutionInterruptedError()
        interrupt.__context__ = error  # as a signal would do it
        raise interrupt  # noqa: B904


def open_the_file() -> None:
    raise ValueError("the user's own")


def caught(function: Callable[[], object]) -> BaseException:
    with pytest.raises((DagsterExecutionInterruptedError, asyncio.CancelledError)) as caught:
        function()
    return caught.value


@pytest.mark.parametrize(
    ("cancellation", "said"),
    [
        (Cancellation(CancelKind.REQUESTED, "wrong file", "ada"), "stopped: run terminated by ada: wrong file"),
        (Cancellation(CancelKind.REQUESTED, None, "ada"), "stopped: run terminated by ada"),
        (
            Cancellation(CancelKind.REQUESTED, None, UNKNOWN_AUTHOR),
            "stopped: run terminated from Dagster's UI or API",
        ),
        (Cancellation(CancelKind.REQUESTED, "wrong file"), "stopped: run terminated: wrong file"),
        (Cancellation(CancelKind.REQUESTED), "stopped: run terminated"),
        (Cancellation(CancelKind.REQUESTED, cause="the run was deleted"), "stopped: the run was deleted"),
        (Cancellation(CancelKind.REQUESTED, None, THE_RUN), "stopped: its run was stopped"),
        (Cancellation(CancelKind.SHUTDOWN, cause="the worker stops"), "stopped: the worker stops"),
        (Cancellation(CancelKind.SHUTDOWN), "stopped: shutdown"),
        (Cancellation(CancelKind.DEADLINE, "run timed out: why", THE_RUN), "stopped: run timed out: why"),
        (None, "stopped: it was interrupted"),
    ],
)
def test_it_begins_with_what_has_happened(cancellation: Cancellation | None, said: str) -> None:
    assert why_stopped(cancellation, "run terminated") == said


def test_an_interrupt_while_an_error_was_handled_keeps_that_error() -> None:
    told = interrupt_info(caught(interrupted), WHAT)
    assert told.message == f"{WHAT}\n"
    assert told.cls_name == "DagsterExecutionInterruptedError"
    assert "in open_the_file" in told.to_string()
    assert "ValueError: the user's own" in told.to_string()


def test_what_the_user_has_suppressed_stays_so() -> None:
    def handled() -> None:
        try:
            open_the_file()
        except ValueError:
            raise DagsterExecutionInterruptedError from None

    assert "ValueError" not in interrupt_info(caught(handled), WHAT).to_string()


def test_frames_of_dagster_before_and_after_the_users_are_left_out() -> None:
    def body() -> None:
        with raise_interrupts_as(DagsterExecutionInterruptedError):
            raise DagsterExecutionInterruptedError

    told = interrupt_info(caught(body), WHAT)
    assert [line.split(", in ")[1].split("\n")[0] for line in told.stack][-1] == "body"
    assert not [line for line in told.stack if "/dagster/" in line]


def test_of_a_coroutine_it_is_where_that_was() -> None:
    async def waits() -> None:
        await asyncio.sleep(60)

    async def cancels() -> None:
        task = asyncio.ensure_future(waits())
        await asyncio.sleep(0)
        task.cancel()
        await task

    # As our loop over the outputs of an op raises it: without a frame of the user's.
    interrupt = DagsterExecutionInterruptedError()
    interrupt.__context__, interrupt.__suppress_context__ = caught(lambda: asyncio.run(cancels())), True
    told = interrupt_info(interrupt, WHAT)
    assert "in waits" in told.to_string(), told.to_string()
    assert told.context is None


def test_where_dagster_is_set_to_hide_errors_nothing_but_what_happened_is_told() -> None:
    error = caught(interrupted)
    setattr(error, USER_FACING_ERROR_ID_ATTR_NAME, "an id")
    assert interrupt_info(error, WHAT).to_string() == f"{WHAT}\n"


def test_dagster_makes_the_failures_and_the_processes_of_steps_as_we_expect() -> None:
    names = execute_plan.dagster_event_sequence_for_step.__code__.co_names
    original = getattr(execute_plan.dagster_event_sequence_for_step, "__wrapped__", None)
    names = original.__code__.co_names if original is not None else names
    assert {"step_failure_event_from_exc_info", "serializable_error_info_from_exc_info"} <= set(names)
    assert "MultiprocessExecutorChildProcessCommand" in multiprocess.execute_step_out_of_process.__code__.co_names
