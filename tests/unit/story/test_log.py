"""Reading a log of any size has a bound, and finds why a run has failed."""

from datetime import UTC, datetime
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRunStatus, EventLogEntry
from dagster._core.events import EngineEventData, JobFailureData
from dagster._core.storage.event_log import SqlEventLogStorageTable
from dagster._core.test_utils import create_run_for_test
from dagster_shared.error import SerializableErrorInfo

from dagster_taskiq.dagster_compat.api import serialize_value
from dagster_taskiq.errors import UnknownRoute
from dagster_taskiq.storage.engine_events import INTERRUPTED_KEY, WHY_KEY, Stage
from dagster_taskiq.storage.step_events import step_submitted
from dagster_taskiq.story.log import Logged, read_log
from dagster_taskiq.story.model import BarKind, Outcome
from dagster_taskiq.story.steps import StepBars, most_important
from dagster_taskiq.story.surroundings import Surroundings
from dagster_taskiq.story.tell import RunFacts, tell

Kind = DagsterEventType
OF_A_STEP = (Kind.STEP_WORKER_STARTING, Kind.STEP_START, Kind.ENGINE_EVENT, Kind.HANDLED_OUTPUT, Kind.STEP_SUCCESS)
STEPS = 10_000
BEGAN = 1_700_000_000.0


def fill(instance: DagsterInstance, run_id: str) -> None:
    """Ten thousand steps; one has failed, one goes on. As rows, because to report them one by one takes a minute."""
    rows = []
    for number in range(STEPS):
        key = f"step_{number}"
        for place, kind in enumerate(OF_A_STEP):
            if number == 7_777 and kind is Kind.STEP_SUCCESS:
                continue
            kind = Kind.STEP_FAILURE if number == 5_555 and kind is Kind.STEP_SUCCESS else kind
            at = BEGAN + number * 0.01 + place * 0.002
            event = DagsterEvent(Kind.STEP_START.value, "big", step_key=key, message="")
            entry = EventLogEntry(None, "info", "", run_id, at, key, "big", event)  # type: ignore[no-untyped-call]
            time = datetime.fromtimestamp(at, UTC).replace(tzinfo=None)
            body = serialize_value(entry) if number in (5_555, 7_777) else "not to be read"
            rows.append(
                {"run_id": run_id, "event": body, "dagster_event_type": kind.value, "timestamp": time, "step_key": key}
            )
    storage: Any = instance.event_log_storage
    with storage.run_connection(run_id) as connection:
        connection.execute(SqlEventLogStorageTable.insert(), rows)


def test_of_fifty_thousand_events_few_are_read_in_full() -> None:
    with DagsterInstance.ephemeral() as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
        fill(instance, run.run_id)
        log = read_log(instance, run.run_id, lambda events: most_important(events, 2))
    assert log.count == STEPS * len(OF_A_STEP) - 1
    assert not log.incomplete
    story = tell(RunFacts(run.run_id, "big", "STARTED", BEGAN), log, Surroundings(BEGAN + 200))
    steps = {bar.label: bar.outcome.value for bar in story.bars if bar.kind is BarKind.STEP}
    assert len(steps) == 200
    assert (steps["step_5555"], steps["step_7777"]) == ("failed", "going on")
    assert story.hidden_steps == {"succeeded": STEPS - 200}


def test_a_story_of_a_part_of_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_taskiq.story.log._FIRST", 2)
    monkeypatch.setattr("dagster_taskiq.story.log._LAST", 2)
    said = []
    with DagsterInstance.ephemeral() as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
        for _ in range(5):
            log = read_log(instance, run.run_id, lambda events: most_important(events, 2))
            story = tell(RunFacts(run.run_id, "big", "STARTED", BEGAN), log, Surroundings(BEGAN + 200))
            said.append([sentence for sentence in story.summary if "longer than what was read" in sentence])
            instance.report_engine_event("hello", run)
        log = read_log(instance, run.run_id, lambda events: most_important(events, 2))
    story = tell(RunFacts(run.run_id, "big", "STARTED", BEGAN), log, Surroundings(BEGAN + 200))
    assert said == [[]] * 5
    assert story.summary[-1] == "Its log is longer than what was read of it, so that this is not all that happened."


def test_where_a_step_was_sent_is_read() -> None:
    event = step_submitted("task", "tasks-gpu-steps", "gpu")
    with DagsterInstance.ephemeral() as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
        sent = DagsterEvent(
            Kind.STEP_WORKER_STARTING.value,
            run.job_name,
            step_key="train",
            event_specific_data=EngineEventData(metadata=dict(event.facts)),
            message=event.message,
        )
        instance.report_dagster_event(sent, run.run_id)
        log = read_log(instance, run.run_id, lambda events: most_important(events, 2))
    steps = StepBars()
    for logged in log.events:
        steps.take(logged)
    assert [(bar.label, bar.route) for bar in steps.bars(0.0, None, Outcome.LOST)] == [("train", "gpu")]


@pytest.mark.parametrize(
    ("launched", "said"),
    [(False, "route 'gup' does not exist"), (True, "ValueError: as it should")],
    ids=["not_launched", "launched"],
)
def test_the_reason_of_a_failure_is_ours_where_we_said_one(launched: bool, said: str) -> None:
    """Not the error of SQS below it, nor Dagster's word that somebody has marked the run."""
    below = SerializableErrorInfo("botocore.QueueDoesNotExist: no such queue\n", [], "QueueDoesNotExist")
    ours = f"{UnknownRoute.__module__}.UnknownRoute: route 'gup' does not exist\n"
    refused = SerializableErrorInfo(ours, [], "UnknownRoute", below)
    failed = SerializableErrorInfo("ValueError: as it should\n", [], "ValueError")
    with DagsterInstance.ephemeral() as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
        instance.report_engine_event("It cannot be launched", run, EngineEventData.engine_error(refused))
        if launched:
            data = JobFailureData(failed, None, None)
            kind = Kind.RUN_FAILURE.value
            ended = DagsterEvent(kind, run.job_name, message="failed", event_specific_data=data)
            instance.report_dagster_event(ended, run.run_id)
        else:
            instance.report_run_failed(run)
        log = read_log(instance, run.run_id, lambda events: most_important(events, 2))
    story = tell(RunFacts(run.run_id, "job", "FAILURE", log.events[0].at), log, Surroundings(log.events[-1].at))
    assert story.summary[-1] == f"Failed: {said}"


@pytest.mark.parametrize(("stage", "ends"), [(Stage.TIMED_OUT, "failed"), (None, "interrupted")], ids=["late", "not"])
def test_a_step_that_took_too_long_has_failed_and_was_not_interrupted_by_its_worker(
    stage: Stage | None, ends: str
) -> None:
    steps = StepBars()
    steps.take(Logged(1, BEGAN, Kind.STEP_START.value, "load"))
    if stage is not None:
        steps.take(Logged(2, BEGAN + 3, Kind.ENGINE_EVENT.value, "load", stage=stage))
    steps.take(Logged(3, BEGAN + 4, Kind.STEP_FAILURE.value, "load", error="stopped", interrupted=True))
    assert [bar.outcome.value for bar in steps.bars(BEGAN + 5, None, Outcome.LOST)] == [ends]


@pytest.mark.parametrize(
    ("kind", "ends"),
    [(Kind.STEP_FAILURE, "interrupted"), (Kind.STEP_UP_FOR_RETRY, "tried again"), (None, "interrupted")],
)
def test_what_its_run_says_of_a_lost_step_is_about_the_same_attempt(kind: Kind | None, ends: str) -> None:
    """Its worker says that it is lost; its run, that it has failed because of that, or is tried again."""
    steps = StepBars()
    steps.take(Logged(1, BEGAN, Kind.STEP_START.value, "load"))
    facts = {INTERRUPTED_KEY: True, WHY_KEY: "the worker stops"}
    steps.take(Logged(2, BEGAN + 3, Kind.ENGINE_EVENT.value, "load", stage=Stage.STEP_LOST, facts=facts))
    if kind is not None:
        steps.take(Logged(3, BEGAN + 4, kind.value, "load", error="it was interrupted 3 times", interrupted=False))
    steps.take(Logged(4, BEGAN + 5, Kind.STEP_WORKER_STARTING.value, "load"))
    steps.take(Logged(5, BEGAN + 6, Kind.STEP_RESTARTED.value, "load"))
    told = [(bar.attempt, bar.began, bar.ended, bar.outcome.value) for bar in steps.bars(BEGAN + 7, None, Outcome.LOST)]
    assert told == [(1, BEGAN, BEGAN + 3, ends), (2, BEGAN + 6, None, "going on")]


@pytest.mark.parametrize(
    ("why", "advice"),
    [
        ("stopped: the worker stops, asked by root@vm: a deployment", "interrupted_steps: retry"),
        ("worker small-1, which had step load, is gone", "interrupted_steps: retry"),
        ("the worker stops; it was interrupted 3 times, and max_interruptions is 2", "max_interruptions"),
    ],
)
def test_who_lost_a_step_to_the_end_of_a_worker_is_told_how_it_would_begin_again(why: str, advice: str) -> None:
    with DagsterInstance.ephemeral() as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
        failed = JobFailureData(SerializableErrorInfo(f"{why}\n", [], "Failure"), None, None)
        ended = DagsterEvent(Kind.RUN_FAILURE.value, run.job_name, message="failed", event_specific_data=failed)
        instance.report_dagster_event(ended, run.run_id)
        log = read_log(instance, run.run_id, lambda events: most_important(events, 2))
    story = tell(RunFacts(run.run_id, "job", "FAILURE", log.events[0].at), log, Surroundings(log.events[-1].at))
    assert any(advice in one for one in story.advice), story.advice
