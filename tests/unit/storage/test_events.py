"""What a person reads in a run's log, and what a program finds there."""

from dataclasses import replace

import pytest
from dagster import DagsterInstance, job

from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.storage import engine_events, step_events
from dagster_taskiq.storage.engine_events import BY_KEY, GRACE_KEY, REASON_KEY, TOOK_KEY, EngineEvent, Stage
from dagster_taskiq.storage.event_log import append_event, read_engine_events


@job
def nothing() -> None: ...


REQUESTED = Cancellation(
    CancelKind.REQUESTED, "wrong input file", "ada", requested_at=100.0, channel=CancelChannel.CANCEL_QUEUE
)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (
            engine_events.requested("t", "wrong input file", "ada"),
            "Requested Taskiq task cancellation. By ada: wrong input file",
        ),
        (engine_events.requested("t", None, "ada"), "Requested Taskiq task cancellation. By ada"),
        (
            engine_events.reached("w-1", Cancellation(CancelKind.REQUESTED, "why", "ada")),
            "cancellation reached worker w-1 (by worker), by ada: why",
        ),
        (
            engine_events.reached("w-1", Cancellation(CancelKind.SHUTDOWN, cause="the worker stops")),
            "shutdown reached worker w-1 (by worker), the worker stops",
        ),
        (engine_events.tree_gone(0.3181266784667969, (), 1.0), "process tree gone after 318 ms"),
        (engine_events.killed(7, 75.2, None, 1.0), "pid 7 did not end within 75 s: SIGKILL to its whole process tree"),
        (step_events.steps_stopped(1, 0.02), "1 step stopped after 20 ms"),
        (step_events.steps_stopped(40, 2.345), "40 steps stopped after 2.3 s"),
    ],
)
def test_the_message_says_who_why_and_how_long(event: EngineEvent, said: str) -> None:
    assert event.message == said


def test_how_long_it_took_to_arrive() -> None:
    assert engine_events.reached("w-1", replace(REQUESTED, received_at=100.0123)).message == (
        "cancellation reached worker w-1 after 12 ms (attempt 1), by ada: wrong input file"
    )


def test_numbers_are_in_whole_milliseconds_and_what_is_for_people_comes_first() -> None:
    with DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(nothing)
        append_event(instance, run, engine_events.reached("w-1", REQUESTED))
        append_event(instance, run, engine_events.interrupting(7, 30.0, 1.0))
        append_event(instance, run, engine_events.tree_gone(0.3181266784667969, ("sleep 5",), 1.0, ended=True))
        (_, reached), (_, interrupting), (stage, gone) = read_engine_events(instance, run.run_id)
    assert list(reached) == ["kind", REASON_KEY, BY_KEY, "dagster-taskiq/worker", "dagster-taskiq/stage"]
    assert interrupting[GRACE_KEY] == 30.0
    assert stage is Stage.TREE_GONE
    assert gone[TOOK_KEY] == 0.318
