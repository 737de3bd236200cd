"""What a run waits for, until when, and what is to be done: from its log so far, and what is known around it."""

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.story.test_stories import replayed

from dagster_taskiq.storage.engine_events import (
    EngineEvent,
    Stage,
    threads_killed,
    waiting_for_threads,
)
from dagster_taskiq.storage.step_events import waiting_for_steps
from dagster_taskiq.story.log import Log
from dagster_taskiq.story.model import Story, Wait
from dagster_taskiq.story.surroundings import (
    Messages,
    OwnerFacts,
    PoolWait,
    QueuePlace,
    RouteFacts,
    StepOwner,
    Surroundings,
)
from dagster_taskiq.story.tell import STATUSES, tell

ROOM = {"workers_alive": 1, "slots": 4, "free_slots": 2, "step_slots": 4, "free_step_slots": 4}
ALIVE = OwnerFacts("w-1", "alive", 0.0)
DEAD = OwnerFacts("w-1", "dead", 0.0)


def at(name: str, text: str, **around: Any) -> Story:
    """The story when that has just been written. What reaches a worker may be written before CANCELING, or after."""
    facts, log = replayed(name)
    events = list(log.events)
    if text == CANCELING:
        events = [event for event in events if event.stage not in (Stage.REACHED, Stage.INTERRUPTING)]
    (place, *_) = [number for number, event in enumerate(events) if text in event.text or text == event.kind]
    events = events[: place + 1]
    status = ([STATUSES[event.kind] for event in events if event.kind in STATUSES] or ["NOT_STARTED"])[-1]
    status = "CANCELING" if any(event.stage is Stage.INTERRUPTING for event in events) else status
    now = max(event.at for event in events) + 1
    facts = replace(facts, status=status, ended=None)
    return tell(facts, replace(log, events=tuple(events)), Surroundings(now, **around))


def told(waits: tuple[Wait, ...]) -> str:
    assert all(0 < len(wait.cause) < 40 for wait in waits), "in a few words, for a list"
    return "\n".join(f"{wait.what} -> {' / '.join(wait.advice)}" for wait in waits)


STARTING, STARTED, CANCELING = "Submitted to queue", "PIPELINE_START", "PIPELINE_CANCELING"


@pytest.mark.parametrize(
    ("text", "around", "says"),
    [
        (STARTING, {}, ["no worker that takes runs is alive", "dagster-taskiq worker start"]),
        (STARTING, {**ROOM, "free_slots": 0}, ["no free slot: 4 of 4 are taken (workers: 1)", "--max-runs"]),
        (STARTING, {**ROOM, "messages": Messages(3, 1)}, ["2 of 4 slots are free", "3 messages wait, 1 are"]),
        (STARTING, {**ROOM, "messages": Messages()}, ["its message is gone", "terminate it, and launch it again"]),
        (STARTING, {**ROOM, "messages": Messages(trouble="refused")}, ["the queue did not answer: refused"]),
        (STARTING, {**ROOM, "owner": ALIVE}, ["worker w-1 starts it"]),
        ("PIPELINE_STARTING", ROOM, ["it was not sent to a queue yet"]),
        (STARTED, {**ROOM, "owner": DEAD}, ["worker w-1 is dead", "then it becomes FAILURE; ", "interrupted_steps: "]),
        (STARTED, {**ROOM, "owner": DEAD, "can_resume": True}, ["then it is resumed"]),
        (STARTED, {"owner": DEAD}, ["no worker is alive to do it"]),
        (STARTED, {**ROOM, "owner": replace(DEAD, state="silent")}, ["is silent", "if it is dead, another one"]),
        (STARTED, ROOM, ["a worker to receive it"]),
        (STARTING, {**ROOM, "hold": "held by ada"}, ["held by ada -> to let it begin: dagster-taskiq fleet release"]),
        (STARTED, {**ROOM, "hold": "held by ada", "owner": DEAD}, ["held by ada -> ", "its worker w-1 is dead"]),
        (CANCELING, {**ROOM, "owner": ALIVE}, ["the cancellation to reach worker w-1", "dagster-taskiq doctor"]),
        (CANCELING, {**ROOM, "owner": DEAD}, ["another one takes over", "looks for lost runs"]),
        (CANCELING, {}, ["nobody has the run", "no worker is alive"]),
        ("interrupting pid", {**ROOM, "owner": ALIVE}, ["has SIGTERM and is in its grace; then it is killed"]),
    ],
)  # fmt: skip
def test_what_it_waits_for(text: str, around: dict[str, Any], says: list[str]) -> None:
    waits = at("killed", text, **around).waits
    for words in says:
        assert words in told(waits), told(waits)


def test_a_hold_does_not_concern_what_is_at_work_or_is_being_stopped() -> None:
    for text in (STARTED, CANCELING):
        assert "held by ada" not in told(at("killed", text, **ROOM, owner=ALIVE, hold="held by ada").waits)
    assert len(at("killed", STARTING, **ROOM, hold="held by ada").waits) == 1, "nothing else matters"


def test_the_end_of_its_grace_is_named() -> None:
    (wait,) = at("killed", "interrupting pid", **ROOM, owner=ALIVE).waits
    assert wait.since is not None
    assert wait.until == pytest.approx(wait.since + 1), "one second, by its tag"


def test_processes_that_were_killed_and_are_not_gone() -> None:
    (wait,) = at("killed", "SIGKILL", **ROOM, owner=ALIVE).waits
    assert "its killed processes to be gone" in wait.what


def test_steps_that_have_not_stopped() -> None:
    steps = [StepOwner(f"step_{number}", "w-2", "dead" if number else "alive") for number in range(7)]
    waits = at("steps_cancelled", "forwarding the interrupt", **ROOM, owner=ALIVE, steps=steps).waits
    assert waits[-1].what.startswith("steps that have not stopped: step_0 on w-2, step_1 on w-2 (dead)")
    assert waits[-1].what.endswith(" and 2 more")
    assert waits[-1].until is not None


def test_a_cleanup_that_goes_on_names_the_attempt() -> None:
    waits = at("not_cleaned_up", 'cleanup "fails_until_mended" failed', **ROOM, owner=ALIVE).waits
    assert "cleanup on w-1: attempt 2 of 2 of fails_until_mended of cannot_be_cleaned_up, at " in told(waits)
    waits = at("not_cleaned_up", "cleaning up on worker", **ROOM, owner=ALIVE).waits
    assert "cleanup on w-1: undo of cannot_be_cleaned_up" in told(waits)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (QueuePlace(), "Dagster's daemon, which hands runs over, has never run here -> start it: dagster-daemon run"),
        (QueuePlace(limit=1, in_progress=1), "no worker that takes runs is alive"),
        (QueuePlace(limit=3, in_progress=3, limit_is_configured=True), "max_concurrent_runs is 3, and 3 runs are in"),
        (QueuePlace(ahead=7), "7 runs are taken before it (older, or of a higher priority)"),
        (QueuePlace(blocking=("the limit 1 of tag team=a",)), "the limit 1 of tag team=a"),
    ],
)
def test_what_a_run_in_dagsters_queue_waits_for(place: QueuePlace, says: str) -> None:

    facts = replace(replayed("killed")[0], status="QUEUED", ended=None)
    heard = place.daemon_heard if place == QueuePlace() else 100.0
    story = tell(facts, Log(), Surroundings(101.0, queue=replace(place, daemon_heard=heard)))
    assert says in told(story.waits)


def test_a_step_that_writes_nothing_may_hang() -> None:
    events = replayed("killed")[1].events
    places = [number for number, event in enumerate(events) if event.kind == "STEP_START"]

    facts, log = replayed("killed")
    began = events[places[0]].at
    log = replace(log, events=events[: places[0] + 1], latest={"carries_on": began})
    facts = replace(facts, status="STARTED", ended=None)
    quiet = tell(facts, log, Surroundings(began + 3_600, owner=ALIVE))
    assert "step carries_on on w-" in told(quiet.waits)
    assert "no event since" in told(quiet.waits)
    assert "py-spy dump --pid" in told(quiet.waits)
    assert "--pid PID" not in told(quiet.waits), "its process is known"
    assert f"stop it: dagster-taskiq run cancel {facts.run_id[:8]}" in told(quiet.waits)
    assert tell(facts, log, Surroundings(began + 5, owner=ALIVE)).waits == (), "it works"


def test_a_step_that_waits_for_a_pool() -> None:
    pools = [PoolWait("sleepy", "scarce", 0.0, 1, ("3e4a5f60",))]
    waits = at("cancelled", STARTED, **ROOM, owner=ALIVE, pools=pools).waits
    assert "step sleepy waits for a slot of pool scarce, limit 1, held by 3e4a5f60" in told(waits)


def test_steps_that_were_sent_and_that_no_worker_takes() -> None:

    facts, log = replayed("steps_cancelled")
    sent = [number for number, event in enumerate(log.events) if event.kind == "STEP_WORKER_STARTING"]
    log = replace(log, events=log.events[: sent[-1] + 1])
    facts = replace(facts, status="STARTED", ended=None)
    now = log.events[-1].at + 30
    assert "2 steps that were sent (step_0, step_1): no worker that takes steps is alive" in told(
        tell(facts, log, Surroundings(now, owner=ALIVE)).waits
    )


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        (("gpu", "gpu"), ["2 steps that were sent (step_0, step_1): no worker of route gpu that takes steps is alive",
                          "start one: dagster-taskiq worker start -q gpu;"]),
        (("big", "big"), ["no free slot of route big, 3 of 3 are taken", "--max-steps"]),
        (("gpu", "default"), ["1 step that was sent (step_0): no worker of route gpu", "(step_1): their"]),
        (("gpu", None), ["1 step that was sent (step_0): no worker of route gpu"]),
        ((None, None), ["2 steps that were sent (step_0, step_1): their processes are starting, or a worker is about"]),
    ],
)  # fmt: skip
def test_a_step_waits_for_a_worker_of_its_own_route(routes: tuple[str | None, ...], says: list[str]) -> None:
    facts, log = replayed("steps_cancelled")
    sent = [number for number, event in enumerate(log.events) if event.kind == "STEP_WORKER_STARTING"]
    events = list(log.events[: sent[-1] + 1])
    for number, route in zip(sent, routes, strict=True):
        events[number] = replace(events[number], facts={"route": route} if route else {})
    served = {"default": RouteFacts(1, 4, 4, 4, 4), "big": RouteFacts(1, 3, 3, 3, 0)}
    around = Surroundings(events[-1].at + 30, owner=ALIVE, routes=served).of_route("default")
    waits = tell(replace(facts, status="STARTED", ended=None), replace(log, events=tuple(events)), around).waits
    assert len(waits) == len(says) if routes[0] != routes[1] and None not in routes else len(waits) == 1, told(waits)
    for words in says:
        assert words in told(waits), told(waits)


@pytest.mark.parametrize(("after_s", "told_so"), [(30, False), (90, True)])
def test_the_messages_of_steps_that_nobody_receives_for_long_are_gone(after_s: float, told_so: bool) -> None:
    """As when somebody has deleted the queue: the run waits for them for ever."""
    facts, log = replayed("steps_cancelled")
    sent = [number for number, event in enumerate(log.events) if event.kind == "STEP_WORKER_STARTING"]
    log = replace(log, events=log.events[: sent[-1] + 1])
    served = {"default": RouteFacts(1, 4, 4, 4, 4)}
    around = Surroundings(log.events[-1].at + after_s, owner=ALIVE, routes=served).of_route("default")
    waits = tell(replace(facts, status="STARTED", ended=None), log, around).waits
    advice = f"dagster-taskiq run cancel {facts.run_id[:8]}, then dagster-taskiq run reexecute {facts.run_id[:8]}"
    assert any(advice in one for wait in waits for one in wait.advice) is told_so, told(waits)


@pytest.mark.parametrize("written", [waiting_for_threads(7, ["upload"], 60, 0), waiting_for_steps(["load"])])
def test_a_run_whose_work_is_over_and_that_is_not(written: EngineEvent) -> None:
    facts, log = replayed("succeeded")
    last = log.events[-2]
    event = replace(last, id=last.id + 1, step_key=None, kind="ENGINE_EVENT", stage=written.stage, text=written.message)
    log = replace(log, events=(*log.events[:-1], event))
    story = tell(replace(facts, status="STARTED", ended=None), log, Surroundings(last.at + 9, owner=ALIVE))
    assert [wait.what for wait in story.waits] == [written.message]


def test_threads_that_had_to_be_killed_have_ignored_no_signal() -> None:
    facts, log = replayed("succeeded")
    written, last = threads_killed(7, 60, ["upload"], 0), log.events[-2]
    event = replace(last, step_key=None, kind="ENGINE_EVENT", stage=written.stage, text=written.message)
    story = tell(facts, replace(log, events=(*log.events[:-1], event, log.events[-1])), Surroundings(last.at + 9))
    assert f"It had to be killed: {written.message}." in story.summary
    assert "SIGTERM" not in " ".join(story.summary)
