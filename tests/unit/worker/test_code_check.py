"""Can this worker load the code of a run, and who else may be able to?"""

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, job
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from tests.support.eventually import eventually

from dagster_taskiq.dagster_compat.key_values import read_values
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.cleanup_events import cleanup_handlers
from dagster_taskiq.storage.code_locations import ASK_KEY, ask_for, asked_for, code_of, told
from dagster_taskiq.storage.code_waits import waits_until
from dagster_taskiq.storage.engine_events import UNTIL_KEY, Stage
from dagster_taskiq.storage.event_log import StepRef, append_event, read_engine_events
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import QUEUE_TTL_TAG, TASK_ID_TAG
from dagster_taskiq.worker.admission import Action, Candidate, Decision, WorkKind, admit_run, admit_step
from dagster_taskiq.worker.code_check import CodeCheck, CodeMissing, Turns, hand_on_after_s

SETTINGS = Settings(queue_url="https://sqs.us-east-1.amazonaws.com/123456789012/q", region_name="us-east-1")
NOT_HERE = "no module named 'elsewhere_only'"
STARTING, START, CANCELING = (
    DagsterEventType.RUN_STARTING,
    DagsterEventType.RUN_START,
    DagsterEventType.RUN_CANCELING,
)


@job
def nothing() -> None: ...


class World:
    def __init__(self, instance: DagsterInstance) -> None:
        self.instance = instance
        self.heartbeats = Heartbeats.of_runs(instance, SETTINGS)
        self.news = 0
        self.check = CodeCheck(instance, SETTINGS, "me-1", self._count)

    def _count(self) -> None:
        self.news += 1

    def run(self, module: str = "elsewhere_only", *events: DagsterEventType) -> DagsterRun:
        origin = JobPythonOrigin("nothing", RepositoryPythonOrigin("python", ModuleCodePointer(module, "defs")))
        run = self.instance.create_run_for_job(nothing, job_code_origin=origin, tags={TASK_ID_TAG: "task-1"})
        for event in events or (STARTING,):
            self.instance.report_dagster_event(DagsterEvent(event.value, "nothing", message=""), run.run_id)
        found = self.instance.get_run_by_id(run.run_id)
        assert found is not None
        return found

    def admit(self, run: DagsterRun, kind: WorkKind = "execute_run") -> Decision:
        candidate = Candidate(kind, run.run_id, "task-1", "me-1", "here")
        return admit_run(self.instance, Claims(self.instance, self.heartbeats), candidate, find_code=self.check.missing)

    def is_claimed(self, run: DagsterRun) -> bool:
        return bool(Claims(self.instance, self.heartbeats).read([run.run_id]))


@pytest.fixture
def world() -> Iterator[World]:
    with DagsterInstance.ephemeral() as instance:
        yield World(instance)


def test_what_is_here_costs_no_look_at_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run("json")
    monkeypatch.setattr(Heartbeats, "living", None)
    assert world.check.missing(run, "default", "runs") is None
    assert world.check.missing(DagsterRun(job_name="nothing"), "default", "runs") is None
    assert list(world.check.known().values()) == [""]


def test_others_may_have_it_until_each_has_said_that_it_has_not(world: World) -> None:
    run = world.run()
    code = code_of(run)
    assert code is not None
    world.heartbeats.beat("new-1", {"slots": [1, 1], "queue": "q"})
    found = world.check.missing(run, "default", "runs")
    assert found == CodeMissing(f"{NOT_HERE}; worker new-1 may have the code", others=True)
    assert world.check.told() == [[code.location, code.mark, NOT_HERE]]
    world.heartbeats.beat("new-1", {"slots": [1, 1], "queue": "q", "code": told({code: "no file"})})
    found = world.check.missing(run, "default", "runs")
    assert found is not None
    assert not found.others
    assert f"me-1: {NOT_HERE}; new-1: no file; " in found.why
    assert world.news == 1, "others are told what is new, once"


def test_who_has_not_said_it_yet_is_asked_and_says_it(world: World) -> None:
    """Or it would say so only when it happens to receive the message itself."""
    run, other = world.run(), CodeCheck(world.instance, SETTINGS, "new-1", lambda: None)
    world.heartbeats.beat("new-1")
    assert world.check.missing(run, "default", "runs")
    values = read_values(world.instance, [ASK_KEY])
    assert values

    async def answer() -> None:
        looking = asyncio.create_task(other.run())
        await eventually(other.known, "it has looked at recent runs")
        fresh = world.run("nowhere_either")
        ask_for(world.instance, fresh, "default")
        other.hear(read_values(world.instance, [ASK_KEY]))
        await eventually(lambda: len(other.known()) == 2, "it has looked at the one that was asked for")
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking

    asyncio.run(answer())


def test_a_question_that_comes_while_another_one_is_looked_at_is_looked_at_as_well(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = world.run("nowhere"), world.run("nowhere_either")
    other, get_run = CodeCheck(world.instance, SETTINGS, "new-1", lambda: None), world.instance.get_run_by_id

    def get_run_and_be_asked(run_id: str) -> DagsterRun | None:
        if run_id == first.run_id:
            other.hear({ASK_KEY: f'{{"run_id": "{second.run_id}", "route": "default"}}'})
        return get_run(run_id)

    monkeypatch.setattr(world.instance, "get_run_by_id", get_run_and_be_asked)
    monkeypatch.setattr(other, "_look_at_recent_runs", lambda: None)

    async def answer() -> None:
        looking = asyncio.create_task(other.run())
        other.hear({ASK_KEY: f'{{"run_id": "{first.run_id}", "route": "default"}}'})
        await eventually(lambda: len(other.known()) == 2, "it has looked at both", within=5)
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking

    asyncio.run(answer())


@pytest.mark.parametrize("text", ["x", "[]", "{}", '{"run_id": 5, "route": "gpu"}', '{"run_id": "x y", "route": "-"}'])
def test_a_question_that_cannot_be_read_is_none(world: World, text: str) -> None:
    world.check.hear({ASK_KEY: text})
    world.check.hear({})
    assert asked_for(text) is None


def test_workers_of_other_routes_do_not_count(world: World) -> None:
    world.heartbeats.beat("gpu-1", {"slots": [1, 1], "queue": "q", "routes": ["gpu"]})
    run = world.run()
    found = world.check.missing(run, "default", "runs")
    assert found is not None
    assert not found.others
    found = world.check.missing(run, "gpu", "runs")
    assert found is not None
    assert found.others


def test_a_run_whose_code_may_be_elsewhere_is_not_claimed(world: World) -> None:
    world.heartbeats.beat("new-1")
    fresh, resumed = world.run(), world.run("elsewhere_only", STARTING, START)
    assert world.admit(fresh).action is Action.HAND_ON
    assert world.admit(resumed, "resume_run").action is Action.HAND_ON
    assert not world.is_claimed(fresh)
    assert not world.is_claimed(resumed)


def test_a_run_whose_code_is_nowhere_waits_and_is_then_claimed_to_be_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run, kind in ((world.run(), "execute_run"), (world.run("elsewhere_only", STARTING, START), "resume_run")):
        for _ in range(3):
            decision = world.admit(run, kind)  # type: ignore[arg-type]
            assert decision.action is Action.WAIT_FOR_CODE
            assert not world.is_claimed(run)
        notes = read_engine_events(world.instance, run.run_id)
        (until,) = [facts[UNTIL_KEY] for stage, facts in notes if stage is Stage.WAITING_FOR_CODE]
        with monkeypatch.context() as clock:
            at_its_end = SimpleNamespace(time=partial(float, until))
            clock.setattr("dagster_taskiq.storage.code_waits.time", at_its_end)
            decision = world.admit(run, kind)  # type: ignore[arg-type]
        assert decision.action is Action.NO_CODE
        assert decision.why.startswith("no living worker can load code location 'elsewhere_only': me-1: ")
        assert world.is_claimed(run)


def test_a_run_that_is_resumed_waits_anew(world: World) -> None:
    run = world.run()
    assert world.admit(run).action is Action.WAIT_FOR_CODE
    assert waits_until(world.instance, run.run_id, "task-1") is not None
    assert waits_until(world.instance, run.run_id, "task-2") is None


def test_who_has_come_at_the_last_moment_has_the_code_and_gets_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes until that worker receives it."""
    run = world.run()
    code = code_of(run)
    assert code is not None
    assert world.admit(run).action is Action.WAIT_FOR_CODE
    world.heartbeats.beat("new-1", {"slots": [1, 1], "queue": "q", "code": told({code: ""})})
    monkeypatch.setattr("dagster_taskiq.storage.code_waits.time", SimpleNamespace(time=lambda: float("inf")))
    assert world.admit(run).action is Action.HAND_ON
    world.heartbeats.gone("new-1")
    assert world.admit(run).action is Action.NO_CODE


def test_a_run_that_has_waited_longer_than_it_may_does_not_wait_for_its_code(world: World) -> None:
    run = world.run()
    assert world.admit(run).action is Action.WAIT_FOR_CODE
    world.instance.add_run_tags(run.run_id, {QUEUE_TTL_TAG: "0.001"})
    assert world.admit(run).action is Action.EXPIRE


@pytest.mark.parametrize("has_handlers", [False, True])
def test_a_cancelled_run_is_finished_by_anybody_unless_it_has_handlers(world: World, *, has_handlers: bool) -> None:
    """With handlers by one that has the code; when there is none, it is finished here, and says that they failed."""
    run = world.run("elsewhere_only", STARTING, START, CANCELING)
    if has_handlers:
        append_event(world.instance, run, cleanup_handlers(["drop the table"]))
    world.heartbeats.beat("new-1")
    expected = Action.HAND_ON if has_handlers else Action.FINISH_CANCELLATION
    assert world.admit(run).action is expected
    world.heartbeats.gone("new-1")
    assert world.admit(run).action is Action.FINISH_CANCELLATION


def test_what_only_has_to_be_failed_needs_no_code(world: World) -> None:
    """Its worker is gone, and nobody resumes it."""
    world.heartbeats.beat("new-1")
    assert world.admit(world.run("elsewhere_only", STARTING, START)).action is Action.FAIL


def test_steps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run("elsewhere_only", STARTING, START)
    claims, step = StepClaims(world.instance), StepRef("work", "step-1")
    candidate = Candidate("execute_step", run.run_id, "step-1", "me-1", "here")
    world.heartbeats.beat("runs-only", {"slots": [1, 0], "queue": "q"})
    world.heartbeats.beat("new-1")
    assert admit_step(world.instance, claims, step, candidate, world.check.missing).action is Action.HAND_ON
    assert claims.find(run.run_id, step) is None
    world.heartbeats.gone("new-1")
    for _ in range(2):
        decision = admit_step(world.instance, claims, step, candidate, world.check.missing)
        assert decision.action is Action.WAIT_FOR_CODE
        assert claims.find(run.run_id, step) is None
    notes = [stage for stage, _ in read_engine_events(world.instance, run.run_id, step)]
    assert notes == [Stage.WAITING_FOR_CODE]
    monkeypatch.setattr("dagster_taskiq.storage.code_waits.time", SimpleNamespace(time=lambda: float("inf")))
    decision = admit_step(world.instance, claims, step, candidate, world.check.missing)
    assert decision.action is Action.NO_CODE
    assert decision.run is not None
    assert claims.find(run.run_id, step) is not None


def test_it_is_handed_on_the_more_slowly_the_more_often() -> None:
    delays = [hand_on_after_s(count) for count in range(200)]
    assert delays == sorted(delays)
    assert (delays[0], delays[1], delays[-1]) == (1, 1, 30)


def test_the_more_waits_for_its_code_the_less_often_each_is_looked_at() -> None:
    now = 0.0
    turns = Turns(clock=lambda: now)
    assert turns.after_s("task-0", 100, waits=True) == 5, "however often it was received"
    delays = [turns.after_s(f"task-{number}", 1, waits=True) for number in range(50)]
    assert (delays[9], delays[-1]) == (5, 25)
    assert turns.after_s("task-49", 2, waits=True) == 25, "it counts once"
    assert turns.after_s("another", 8, waits=False) == hand_on_after_s(8)
    assert max(turns.after_s(f"task-{number}", 1, waits=True) for number in range(1_000)) == 30
    now = 100.0
    assert turns.after_s("task-0", 100, waits=True) == 5, "the others wait no more"


def test_a_worker_looks_for_the_code_of_recent_runs_and_says_what_it_has(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mounted.py").write_text("raise AssertionError\n")
    monkeypatch.setattr("dagster_taskiq.worker.code_check._LOOK_AGAIN_EVERY_S", 0.01)
    monkeypatch.setattr("dagster_taskiq.worker.code_check._IS_MISSING_FOR_S", 0.0)
    for module in ("json", "mounted", "elsewhere_only"):
        world.run(module)
    check = CodeCheck(world.instance, SETTINGS, "me-1", world._count)

    async def look() -> None:
        looking = asyncio.create_task(check.run())
        await eventually(lambda: len(check.known()) == 3, "it has looked for all of them")
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        await eventually(lambda: [*filter(None, check.known().values())] == [NOT_HERE], "what is mounted is found")
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking

    with caplog.at_level(logging.INFO, "dagster_taskiq.worker.code_check"):
        asyncio.run(look())
    assert "has the code of these code locations of recent runs: json" in caplog.text
    assert f"elsewhere_only: {NOT_HERE}; mounted: no module named 'mounted'" in caplog.text


def test_a_database_that_does_not_answer_keeps_no_worker_from_looking_later(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no database")

    monkeypatch.setattr(world.instance, "get_runs", fail)

    async def look() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await world.check.run()

    asyncio.run(look())
    assert "cannot look for the code of runs: no database" in caplog.text
