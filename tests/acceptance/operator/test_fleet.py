"""`fleet hold` and `worker stop`: workers that begin nothing new, or end, because somebody asks for it from afar."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.conftest import open_platform, steps_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, Daemon, submit
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.runs import cancel_run
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.fleet import hold_fleet, release_fleet

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

REASON = "migration of the warehouse"
MONITORING = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 1}}


def told(platform: Platform, run_id: str) -> list[str]:
    return [line for line in platform.story(run_id) if REASON in line]


class Queue(Daemon):
    """Dagster's daemon, that takes runs from its queue until something is so."""

    def takes_until(self, look: Callable[[], object], description: str) -> None:
        def take_and_look() -> object:
            self.take()
            return look()

        wait_until(take_and_look, description, seen=self.iterate)


def test_a_fleet_that_is_held_begins_nothing_and_goes_on_with_what_runs(endpoint: str) -> None:
    with steps_platform(endpoint, extra={"run_coordinator": COORDINATOR}) as platform, platform.worker("-n", "w"):
        daemon = Queue(platform.instance)
        at_work = submit(platform, job="two_steps", seconds=6)
        daemon.takes_until(lambda: platform.status(at_work) is DagsterRunStatus.STARTED, "it is at work")
        platform.wait_started(at_work, 2)

        held = platform.command("fleet", "hold", "--reason", REASON)
        assert held.returncode == 0, held
        assert f": {REASON}; no run begins until: dagster-taskiq fleet release" in held.stdout
        assert "workers: 1, 1 of them know of it\nat work: 1 runs, 2 steps; runs that wait: 0\n" in held.stdout

        waiting, unwanted = submit(platform, job="two_steps", seconds=0), submit(platform, job="two_steps")
        past_the_queue = platform.launch("two_steps", seconds=0)  # as another run coordinator would
        assert told(platform, past_the_queue)
        daemon.takes_until(lambda: told(platform, waiting), "its log says why")
        assert cancel_run(unwanted, reason="wrong input", instance=platform.instance)
        assert platform.status(unwanted) is DagsterRunStatus.CANCELED
        assert platform.finished(at_work) is DagsterRunStatus.SUCCESS, "also the step that began during the hold"
        assert platform.status(waiting) is DagsterRunStatus.QUEUED
        assert platform.status(past_the_queue) is DagsterRunStatus.STARTING
        assert Stage.PICKED_UP not in platform.stages(past_the_queue)
        state = json.loads(platform.command("fleet", "status", "--json").stdout)
        assert (state["hold"]["reason"], state["runs_waiting"], state["handed_over"]) == (REASON, 2, 1)

        assert platform.command("fleet", "release").stdout.startswith("released; the fleet was held by ")
        daemon.takes_until(lambda: platform.status(waiting) is not DagsterRunStatus.QUEUED, "it is launched")
        for run_id in (waiting, past_the_queue):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
        assert [len(told(platform, run_id)) for run_id in (at_work, waiting)] == [0, 1]


@contextmanager
def at_work(endpoint: str, **options: object) -> Iterator[tuple[Platform, str]]:
    """A platform with a run that goes on for seconds, on a worker called w."""
    with open_platform(endpoint, **options) as platform, platform.worker("-n", "w"):  # type: ignore[arg-type]
        run_id = platform.launch("sleepy_job", seconds=5)
        platform.marked(run_id, "started")
        yield platform, run_id


def test_a_worker_that_is_stopped_from_afar_hands_its_run_to_the_next_of_that_name(endpoint: str) -> None:
    """And that one is not stopped; but as long as the fleet is held it does not go on with the run."""
    with at_work(endpoint, source={"drain_seconds": 0.5}, extra=MONITORING) as (platform, run_id):
        stopped = platform.command("worker", "stop", "w", "--reason", "a larger machine", "--wait")
        assert stopped.returncode == 0, stopped
        assert stopped.stdout.endswith(": has ended\n")
        assert platform.status(run_id) is DagsterRunStatus.STARTED
        again = platform.command("worker", "stop", "w")
        assert (again.returncode, again.stdout) == (1, "")
        assert "has ended already" in again.stderr
        hold_fleet(platform.instance, reason=REASON, by="ada")
        with platform.worker("-n", "w") as second:
            assert "the fleet is held by ada since" in second.log()
            assert "ready" in platform.command("worker", "health", "--pid", str(second.pid)).stdout
            assert "cleanup-end" in platform.marks(run_id)
            assert platform.mark_counts(run_id)["started"] == 1
            release_fleet(platform.instance)
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)


def test_a_worker_that_is_to_finish_interrupts_nothing(endpoint: str) -> None:
    with at_work(endpoint, source={"drain_seconds": 0.5}) as (platform, run_id):
        asked = platform.command("worker", "stop", "--all", "--finish", "--reason", "a larger machine")
        assert asked.stdout.endswith(": ends after its work; at work: 1\n"), asked
        shown = platform.command("worker", "list").stdout
        assert " draining " in shown
        assert ": a larger machine; what runs is finished\n" in shown
        assert platform.command("worker", "stop", "--all", "--finish", "--wait").returncode == 0
        assert platform.status(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)
