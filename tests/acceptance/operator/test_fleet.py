"""`fleet hold` and `worker stop`: workers that begin nothing new, or end, because somebody asks for it from afar."""

import json
import re
import shlex
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from tests.acceptance.conftest import open_platform, steps_platform
from tests.acceptance.operator.test_cli import Desk, assert_one_line
from tests.acceptance.operator.test_coordinator import COORDINATOR, Daemon, submit
from tests.support.moto import create_queues
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.runs import cancel_run
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.fleet import hold_fleet, release_fleet
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

REASON = "migration of the warehouse"
MONITORING = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 1}}


@pytest.fixture
def desk(tmp_path: Path, endpoint: str) -> Desk:
    return Desk(tmp_path, endpoint, create_queues(endpoint, f"tasks-{uuid.uuid4()}"))


def heartbeats(platform: Platform) -> list[float]:
    return [last.at for last in Heartbeats.of_runs(platform.instance, platform.launcher.settings).last()]


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
        assert "workers: 1, 1 of them know of it\nat work: 1 run, 2 steps; runs that wait: 0\n" in held.stdout

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


def test_everybody_who_wonders_is_told(desk: Desk) -> None:
    desk.launcher({"visibility_timeout_seconds": 300})  # or else the worker may be dead before all have asked
    held = desk.ask("fleet", "hold", "--reason", "migration", "--requested-by", "ada", "--json")
    assert (held.code, json.loads(held.out)["hold"]["by"], json.loads(held.out)["workers"]) == (0, "ada", [])
    since = json.loads(held.out)["hold"]["since"]
    assert desk.ask("fleet", "hold", "--reason", "still migrating").code == 0
    with DagsterInstance.from_config(str(desk.home)) as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTING, tags={TASK_ID_TAG: "t"})
        Heartbeats(instance, 30, 10).beat("w-12345678", {"slots": [1, 0], "queue": queue_name(desk.queue_url)})
    now = json.loads(desk.ask("fleet", "status", "--json").out)
    assert (now["hold"]["reason"], now["hold"]["since"], now["not_heard"]) == ("still migrating", since, ["w-12345678"])
    until = ": still migrating; no run begins until: dagster-taskiq fleet release\n"
    unheard = "not heard yet, and may begin runs: w-12345678; "
    for command, says in (
        (
            ("fleet", "status"),
            f"{until}workers: 1, 0 of them know of it\n{unheard}",
        ),
        (("queue", "status"), f"{until}1 run waits, for "),
        (("worker", "list"), f"{until}1 run waits, for "),
        (("run", "explain", run.run_id), "to let it begin: dagster-taskiq fleet release"),
        (("doctor",), "warning  fleet: the fleet is held by "),
    ):
        assert says in desk.ask(*command).out, command
    work = json.loads(desk.ask("queue", "status", "--json").out)[0]
    assert work["hold"]["reason"] == "still migrating"
    assert work["runs_waiting"]["why"].endswith(": still migrating")
    assert desk.ask("fleet", "release").code == 0
    assert json.loads(desk.ask("queue", "status", "--json").out)[0]["hold"] is None


def test_without_its_database_a_command_says_so_in_one_line(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"postgresql+psycopg2://nobody@127.0.0.1:{closed.getsockname()[1]}/dagster"
    desk.launcher()
    configured = yaml.safe_load((desk.home / "dagster.yaml").read_text())
    desk.write("dagster.yaml", configured | {"storage": {"postgres": {"postgres_url": url}}})
    for command in (("fleet", "hold", "--reason", "x"), ("fleet", "release"), ("worker", "stop", "--all")):
        assert_one_line(desk.ask(*command), "Dagster's database does not answer")


def of_the_page() -> dict[str, tuple[str, ...]]:
    """The commands of docs/fleet.md, by their first words, without the name of the program."""
    page = (Path(__file__).parents[3] / "docs" / "fleet.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert {line[0] for line in lines} == {"dagster-taskiq"}
    return {" ".join(line[1:4]).split(" --reason")[0]: tuple(line[1:]) for line in lines}


def test_the_commands_of_the_page(endpoint: str) -> None:
    commands = of_the_page()
    assert list(commands) == [
        "fleet hold",
        "fleet status",
        "fleet release",
        "worker stop loader-1",
        "worker stop --all",
    ]
    with (
        open_platform(endpoint, source={"drain_seconds": 0.5}) as platform,
        platform.worker("-n", "loader-1", "--steps-only") as loader,
        platform.worker("-n", "w") as worker,
    ):

        def at_work() -> str:
            run_id = platform.launch("sleepy_job", seconds=3)
            platform.marked(run_id, "started")
            return run_id

        def give(name: str) -> str:
            done = platform.command(*commands[name])
            assert done.returncode == 0, done
            return done.stdout

        first = at_work()
        assert "at work: 0 runs, 0 steps; runs that wait: 0\n" in give("fleet hold")
        assert platform.status(first) is DagsterRunStatus.SUCCESS, "it has waited for that"
        assert "workers: 2, 2 of them know of it\n" in give("fleet status")
        assert give("fleet release").startswith("released; the fleet was held by ")
        assert platform.command("fleet", "release").stdout == "the fleet is not held\n"

        assert give("worker stop loader-1").endswith(": has ended\n")
        assert loader.process.wait(5) == 0
        again = platform.command("worker", "stop", "loader-1")
        assert (again.returncode, again.stdout) == (1, "")
        assert "has ended already" in again.stderr

        second = at_work()
        assert give("worker stop --all").endswith(": ends after its work; at work: 1\n")
        shown = platform.command("worker", "list").stdout
        assert " draining " in shown
        assert "; what runs is finished\n" in shown
        assert worker.process.wait(30) == 0
        assert platform.status(second) is DagsterRunStatus.SUCCESS, platform.story(second)


def test_a_run_of_a_worker_that_is_stopped_from_afar_goes_on_with_the_next_of_that_name(endpoint: str) -> None:
    """And that one is not stopped; but as long as the fleet is held it does not go on with the run."""
    with open_platform(endpoint, source={"drain_seconds": 0.5}, extra=MONITORING) as platform:
        with platform.worker("-n", "w") as first:
            run_id = platform.launch("sleepy_job", seconds=5)
            platform.marked(run_id, "started")
            assert platform.command("worker", "stop", "w", "--reason", "a larger machine").returncode == 0
            assert first.process.wait(30) == 0
            assert "asked to stop by " in first.log()
            assert ": a larger machine" in first.log()
        assert platform.status(run_id) is DagsterRunStatus.STARTED
        hold_fleet(platform.instance, reason=REASON, by="ada")
        with platform.worker("-n", "w") as second:
            assert "the fleet is held by ada since" in second.log()
            for _ in range(2):  # it would have received the run's message by then
                known = heartbeats(platform)
                wait_until(lambda known=known: heartbeats(platform) != known, "its next heartbeat")  # type: ignore[misc]
            assert platform.mark_counts(run_id)["started"] == 1
            release_fleet(platform.instance)
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, platform.story(run_id)


@pytest.mark.nightly
def test_a_run_whose_worker_has_died_is_cancelled_all_the_same_while_the_fleet_is_held(endpoint: str) -> None:
    """Nobody receives its message then: the worker that looks for lost runs finishes it."""
    with open_platform(endpoint, extra=MONITORING) as platform:
        with platform.worker("-n", "dies") as first:
            run_id = platform.launch("sleepy_job")
            platform.marked(run_id, "started")
            hold_fleet(platform.instance, reason=REASON, by="ada")
            first.process.kill()
        with platform.worker("-n", "second"):
            assert cancel_run(run_id, reason="wrong input", instance=platform.instance)
            assert platform.finished(run_id, within=120) is DagsterRunStatus.CANCELED, platform.story(run_id)
            assert platform.waiting() == 1, "its message"
