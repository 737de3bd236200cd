"""`run list`: where each run is and what it waits for, over a real SQLite instance, and in how many queries."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.storage.runs import SqlRunStorage
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.types import DaemonHeartbeat
from sqlalchemy import Engine, event
from tests.support.terminal import CLI, on_terminal

from dagster_taskiq.cli import main
from dagster_taskiq.dagster_compat.run_queue import DAEMON_OF_THE_QUEUE
from dagster_taskiq.run_query import UNFINISHED, RunQuery
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.fleet import hold_fleet
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import ROUTE_TAG, TASK_ID_TAG
from dagster_taskiq.storage.waiting import waiting_runs
from dagster_taskiq.story.run_list import ListedRun, list_runs

SETTINGS = Settings(queue_url="http://127.0.0.1:1/1/tasks", region_name="us-east-1")
EVERYTHING = RunQuery(statuses=tuple(DagsterRunStatus))
GOES_ON = RunQuery(statuses=UNFINISHED)


class World:
    """An instance with a run coordinator of ours, one slot and a limit for a tag."""

    def __init__(self, home: Path) -> None:
        config = {"queue_url": SETTINGS.queue_url, "region_name": SETTINGS.region_name}
        launcher = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher", "config": config}
        limits = {"tag_concurrency_limits": [{"key": "team", "limit": 1}]}
        coordinator = {"module": "dagster_taskiq.coordinator", "class": "TaskiqRunCoordinator", "config": limits}
        document = {"run_launcher": launcher, "run_coordinator": coordinator, "telemetry": {"enabled": False}}
        (home / "dagster.yaml").write_text(yaml.safe_dump(document))
        self.home = home
        self.instance = DagsterInstance.from_config(str(home))
        self.instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), DAEMON_OF_THE_QUEUE, "d", []))

    def run(self, status: DagsterRunStatus, job: str = "load", **tags: str) -> DagsterRun:
        run: DagsterRun = create_run_for_test(self.instance, status=status, job_name=job, tags=tags)
        return run

    def queued(self, **tags: str) -> DagsterRun:
        """As Dagster's coordinator makes it."""
        run = self.run(DagsterRunStatus.NOT_STARTED, **tags)
        self.instance.delete_run(run.run_id)
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__")
        origin = RemoteJobOrigin(repository, run.job_name)
        return self.instance.add_run(run._replace(status=DagsterRunStatus.QUEUED, remote_job_origin=origin))

    def beat(self, worker: str, *work: DagsterRun, slots: int = 1, ago: float = 0.0) -> None:
        """Of a worker that has claimed those runs."""
        at = time.time() - ago
        heartbeats = Heartbeats(self.instance, 30, 10, clock=lambda: at)
        for run in work:
            assert Claims(self.instance, heartbeats).take(run, worker, "a task", "", None) is not None
        facts = {"slots": [slots, 4], "work": [[run.run_id, None, at] for run in work], "queue": "tasks"}
        heartbeats.beat(worker, facts)

    def listed(self, query: RunQuery = GOES_ON, limit: int = 100) -> list[ListedRun]:
        return list(list_runs(self.instance, SETTINGS, query, limit).runs)

    def ask(self, *arguments: str) -> Result:
        """Into a pipe."""
        return CliRunner().invoke(main, ["run", "list", *arguments], env={"DAGSTER_HOME": str(self.home)})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    with made.instance:
        yield made


def by_id(rows: list[ListedRun]) -> Mapping[str, ListedRun]:
    return {row.run_id: row for row in rows}


def test_first_what_is_stopped_then_what_works_then_the_queue_in_its_order(world: World) -> None:
    queued = [world.queued(**({"dagster/priority": "5"} if number == 1 else {})) for number in range(3)]
    starting, started = world.run(DagsterRunStatus.STARTING), world.run(DagsterRunStatus.STARTED)
    canceling = world.run(DagsterRunStatus.CANCELING)
    finished = [world.run(DagsterRunStatus.SUCCESS) for _ in range(2)]
    going_on = [canceling, started, starting, queued[1], queued[0], queued[2]]
    assert [row.run_id for row in world.listed()] == [run.run_id for run in going_on]
    found = list_runs(world.instance, SETTINGS, EVERYTHING, 7)
    assert [row.run_id for row in found.runs] == [run.run_id for run in (*going_on, finished[1])], "the newest first"
    assert (found.more, found.counts["QUEUED"], found.counts["SUCCESS"], found.in_queue) == (1, 3, 2, 3)
    assert [(row.position, row.status) for row in found.runs[3:6]] == [(1, "QUEUED"), (2, "QUEUED"), (3, "QUEUED")]


def test_what_each_run_waits_for(world: World) -> None:
    working, lost = (world.run(DagsterRunStatus.STARTED, team="a") for _ in range(2))
    sent = world.run(DagsterRunStatus.STARTING, **{TASK_ID_TAG: "a task"})
    limited, next_one, orphan = world.queued(team="b"), world.queued(), world.run(DagsterRunStatus.CANCELING)
    world.beat("w", working)
    world.beat("dead", lost, ago=4_000)
    rows = by_id(world.listed())
    said = {name: (rows[run.run_id].worker, rows[run.run_id].queue, rows[run.run_id].waits_for) for name, run in
            {"working": working, "lost": lost, "sent": sent, "limited": limited, "next": next_one,
             "orphan": orphan}.items()}  # fmt: skip
    assert said == {
        "working": ("w", None, ""),
        "lost": ("dead", None, "its worker is dead"),
        "sent": (None, "tasks", "no free slot"),
        "limited": (None, None, "limit 1 of tag team"),
        "next": (None, None, "no free slot"),
        "orphan": (None, None, "a worker to finish it"),
    }
    assert rows[lost.run_id].worker_state == "dead"
    assert rows[next_one.run_id].why.startswith("no free slot: 1 of 1 are taken (workers: 1)")


def test_without_a_worker_everything_waits_for_one(world: World) -> None:
    runs = [world.queued(), world.run(DagsterRunStatus.STARTING, **{TASK_ID_TAG: "a"})]
    runs += [world.run(DagsterRunStatus.STARTING, **{TASK_ID_TAG: "b"}), world.run(DagsterRunStatus.CANCELING)]
    assert {row.waits_for for row in world.listed()} == {"no worker"}, len(runs)


def test_while_the_fleet_is_held_what_waits_waits_for_that(world: World) -> None:
    working, waits = world.run(DagsterRunStatus.STARTED), world.queued()
    world.beat("w", working)
    hold_fleet(world.instance, by="ada", reason="a migration")
    rows = by_id(world.listed())
    assert (rows[waits.run_id].waits_for, rows[working.run_id].waits_for) == ("the fleet is held", "")


def test_a_step_that_waits_for_a_pool_is_named(world: World) -> None:
    storage = world.instance.event_log_storage
    storage.set_concurrency_slots("scarce", 1)
    holder, waiter = (world.run(DagsterRunStatus.STARTED) for _ in range(2))
    world.beat("w", holder, waiter, slots=2)
    for run in (holder, waiter):
        storage.claim_concurrency_slot("scarce", run.run_id, "load")
    rows = by_id(world.listed())
    assert (rows[holder.run_id].waits_for, rows[waiter.run_id].waits_for) == ("", "pool scarce")


@pytest.mark.parametrize(
    "query",
    [{"job": "report"}, {"tags": (("team", "b"),)}, {"tags": (("team", None),)}, {"where": "job == 'report'"}],
    ids=str,
)  # fmt: skip
def test_the_filters_are_those_of_run_cancel(world: World, query: dict[str, Any]) -> None:
    wanted = [world.run(status, "report", team="b") for status in (DagsterRunStatus.STARTED, DagsterRunStatus.SUCCESS)]
    for status in (DagsterRunStatus.STARTED, DagsterRunStatus.SUCCESS):
        world.run(status)
    assert [row.run_id for row in world.listed(RunQuery(**query, statuses=UNFINISHED))] == [wanted[0].run_id]
    everything = RunQuery(**query, statuses=tuple(DagsterRunStatus))
    assert [row.run_id for row in world.listed(everything)] == [run.run_id for run in wanted]


@contextmanager
def statements() -> Iterator[list[str]]:
    """Those that are sent to any database meanwhile."""
    sent: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def test_more_runs_take_no_more_queries_and_those_find_tags_by_their_run(world: World) -> None:
    def fill(count: int) -> None:
        for _ in range(count):
            world.queued(team="a")
            world.beat("w", world.run(DagsterRunStatus.STARTED, **{TASK_ID_TAG: "a"}), slots=100)

    world.listed()  # what is looked up once
    waiting_runs(world.instance)
    looks = []
    for count in (2, 20):
        fill(count)
        with statements() as sent:
            assert len(world.listed()) >= 2 * count
            waiting_runs(world.instance)
        looks.append(len(sent))
    assert looks[1] <= looks[0]
    storage = world.instance.run_storage
    assert isinstance(storage, SqlRunStorage)
    with storage.connect() as connection:
        for statement in sent:
            if "run_tags" in statement and "coalesce" in statement:
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", tuple("x" * statement.count("?")))
                assert "idx_run_tags_run_idx" in str(plan.fetchall()), "by its key, each run would read all of them"


def test_runs_of_a_cancelled_backfill_do_not_count_as_waiting_among_thousands(world: World) -> None:
    world.instance.add_backfill(PartitionBackfill("b", BulkActionStatus.CANCELING, False, {}, 0.0))
    for tags in ({"dagster/backfill": "b"}, {}):
        world.queued(**tags)
    found = waiting_runs(world.instance)
    assert (found.count, found.of_cancelled_backfills) == (1, 1)


def test_a_pipe_gets_whole_ids_and_a_terminal_what_fits(world: World) -> None:
    runs = [world.queued(**{"dagster/partition": "2026-11-29"}) for _ in range(3)]
    world.beat("w", *(world.run(DagsterRunStatus.STARTED, "a_job_with_a_long_name_" * 6) for _ in range(2)))
    piped = world.ask()
    assert piped.exit_code == 0
    for run in runs:
        (line,) = [line for line in piped.stdout.splitlines() if run.run_id in line]
        assert "2026-11-29" in line
        assert "no free slot" in line
    assert "a_job_with_a_long_name_" * 6 in piped.stdout
    environ = {**os.environ, "DAGSTER_HOME": str(world.home), "NO_COLOR": "1"}
    for columns in (60, 80):
        with on_terminal((*CLI, "run", "list", "--limit", "3"), environ, columns=columns) as terminal:
            assert terminal.ended() == 0
        assert max(map(len, terminal.lines)) <= columns
        assert f"{runs[0].run_id[:8]} load 2026-11-29" in terminal.lines
        assert "5 runs: 2 STARTED, 3 QUEUED; 3 shown (--limit)" in terminal.lines


def test_for_programs(world: World) -> None:
    run = world.queued()
    (row,) = json.loads(world.ask("--json").stdout)
    assert (row["run_id"], row["status"], row["position"], row["waits_for"]) == (run.run_id, "QUEUED", 1, "its turn")
    page = (Path(__file__).parents[3] / "docs" / "runs.md").read_text()
    assert [key for key in row if f"`{key}`" not in page] == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 0, "nothing runs and nothing waits; finished runs: --all, or --status failure"),
        (["--job", "load"], 0, "no run that matches runs or waits; finished runs: --all, or --status failure"),
        (["--all"], 0, "there is no run at all"),
        (["--all", "--status", "failure"], 0, "no run matches"),
        (["--watch"], 2, "--watch draws on a terminal"),
    ],
)
def test_what_is_not_there(world: World, arguments: list[str], code: int, says: str) -> None:
    ended = world.ask(*arguments)
    assert (ended.exit_code, ended.stdout) == (code, "")
    assert says in ended.stderr


def test_what_is_left_out_of_a_pipe_is_said(world: World) -> None:
    for _ in range(3):
        world.run(DagsterRunStatus.STARTED)
    ended = world.ask("--limit", "2")
    assert ended.stdout.count("STARTED") == 2
    assert ended.stderr == "1 more run; --limit shows more\n"


def test_each_run_has_its_place_and_its_slots_by_its_route(world: World) -> None:
    """The one worker serves the unnamed route; nobody serves gpu."""
    first, gpu = world.queued(), world.queued(**{ROUTE_TAG: "gpu"})
    busy = world.run(DagsterRunStatus.STARTED)
    sent = world.run(DagsterRunStatus.STARTING, **{TASK_ID_TAG: "a task", ROUTE_TAG: "gpu"})
    world.beat("w", busy)
    rows = by_id(world.listed())
    assert (rows[first.run_id].route, rows[first.run_id].position, rows[first.run_id].waits_for) == (
        "default",
        1,
        "its turn",
    ), "slots and one more"
    assert (rows[gpu.run_id].route, rows[gpu.run_id].position) == ("gpu", 1), "of those of gpu"
    assert (rows[sent.run_id].waits_for, rows[sent.run_id].queue) == ("no worker of gpu", "tasks-gpu")
    assert rows[gpu.run_id].why == "no worker of route gpu that takes runs is alive"
    shown = world.ask().stdout
    assert "route" in shown
    assert "queue of gpu, 1" in " ".join(shown.split())
