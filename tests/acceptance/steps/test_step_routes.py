"""Steps on several routes, each with a fleet of its own: sent there, limited by it, and stopped there."""

import signal
from collections.abc import Iterator

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, steps_platform
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.engine_events import WORKER_KEY, Stage
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import QUEUE_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def fleets(endpoint: str) -> Iterator[Platform]:
    """One worker for each of the routes default, gpu and big."""
    with steps_platform(endpoint, source=UNHURRIED) as platform:
        for route in ("gpu", "big"):
            platform.create_route(route)
        with (
            platform.worker("-n", "d") as first,
            platform.worker("-n", "g", "-q", "gpu", ready=False) as second,
            platform.worker("-n", "b", "-q", "big", ready=False) as third,
        ):
            for worker in (first, second, third):
                worker.wait_ready()
            yield platform


def workers_of_steps(platform: Platform, run_id: str) -> dict[str, str]:
    """By step, the first letter of the worker that has picked it up: that of its route."""
    return {note["step_key"]: note[WORKER_KEY][0] for note in platform.step_notes(run_id, Stage.PICKED_UP)}


def test_each_step_goes_to_its_route_and_no_more_at_a_time_than_that_allows(fleets: Platform) -> None:
    run_id = fleets.launch("routed_steps", seconds=0.3)
    assert fleets.finished(run_id) is DagsterRunStatus.SUCCESS, fleets.story(run_id)
    assert workers_of_steps(fleets, run_id) == {
        "train_0": "g",
        "train_1": "g",
        "large": "b",
        "sleepy": "d",
        "afterwards": "d",
    }
    queue, told = queue_name(fleets.queue_url), "\n".join(fleets.story(run_id))
    for name, steps in ((f"{queue}-gpu-steps", 2), (f"{queue}-big-steps", 1), (f"{queue}-steps", 2)):
        assert told.count(f"Submitted to queue {name} as task") == steps, told
    log = [entry.dagster_event for entry in fleets.instance.all_logs(run_id)]
    about = [event for event in log if event is not None and (event.step_key or "").startswith("train_")]
    trains = [event.event_type for event in about if event.is_step_start or event.is_step_success]
    assert trains == [DagsterEventType.STEP_START, DagsterEventType.STEP_SUCCESS] * 2, "one after the other"


def test_steps_of_a_fan_out_go_to_their_route_and_the_others_with_the_run(fleets: Platform) -> None:
    run_id = fleets.launch("routed_dynamic_steps", tags={QUEUE_TAG: "big"}, seconds=0, count=2)
    assert fleets.finished(run_id) is DagsterRunStatus.SUCCESS, fleets.story(run_id)
    workers = workers_of_steps(fleets, run_id)
    assert {step_key.partition("[")[0]: worker for step_key, worker in workers.items()} == {
        "fan_out": "b",
        "mapped": "g",
        "collected": "b",
    }


def test_terminate_stops_the_steps_on_every_route(fleets: Platform) -> None:
    run_id = fleets.launch("routed_steps", seconds=300)
    fleets.wait_started(run_id, 3)
    assert fleets.launcher.terminate(run_id)
    assert fleets.finished(run_id, within=40) is DagsterRunStatus.CANCELED, fleets.story(run_id)
    fleets.assert_nothing_left(run_id)
    assert fleets.mark_counts(run_id)["cleanup-end"] == 3
    reached = {note["step_key"]: note[WORKER_KEY][0] for note in fleets.step_notes(run_id, Stage.REACHED)}
    assert reached == {"train_0": "g", "large": "b", "sleepy": "d"}
    assert fleets.stages(run_id).count(Stage.STEPS_STOPPED) == 1, "all of them have stopped, and nobody waits for more"
    assert StepClaims(fleets.instance).running(run_id) == {}


def test_the_worker_of_a_run_that_dies_stops_its_steps_on_every_route(fleets: Platform) -> None:
    run_id = fleets.launch("routed_steps", seconds=300)
    fleets.wait_started(run_id, 3)
    for pid in fleets.processes(run_id):
        fleets.kill(pid, signal.SIGKILL)
    assert fleets.finished(run_id, within=60) is DagsterRunStatus.FAILURE, fleets.story(run_id)
    cleaned = lambda: fleets.mark_counts(run_id)["cleanup-end"] == 3  # noqa: E731
    wait_until(cleaned, "its steps have stopped", seen=lambda: fleets.marks(run_id))
    fleets.assert_no_step_left(run_id)


def test_a_run_with_a_step_for_an_unknown_route_fails_before_its_first_step(endpoint: str) -> None:
    with steps_platform(endpoint) as platform, platform.worker("-n", "d"):
        platform.create_route("gpu")
        run_id = platform.launch("routed_steps", seconds=0)
        assert platform.finished(run_id) is DagsterRunStatus.FAILURE
        (failure,) = platform.instance.all_logs(run_id, of_type=DagsterEventType.RUN_FAILURE)
        assert "route 'big' does not exist; routes that exist: default, gpu; create it" in str(failure.dagster_event)
        assert platform.stages(run_id).count(Stage.SUBMITTED) == 1, "that of the run"
        assert platform.waiting("-steps") == platform.waiting("-gpu-steps") == 0
