"""`run cancel` with filters: it shows, asks, stops what it has shown and nothing else, and says what came of it."""

import json
import signal
from collections.abc import Iterator

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.cancel.test_cancel_sources import add, is_running
from tests.acceptance.cancel.test_truth_table import started
from tests.acceptance.conftest import open_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, submit
from tests.support.platform import Platform
from tests.support.terminal import CLI, on_terminal
from tests.support.waiting import wait_until
from tests.support.warm import Lines, start_command

from dagster_taskiq.dagster_compat.sources import InstigatorType
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

STATUS = DagsterRunStatus


@pytest.fixture(scope="module")
def queued(endpoint: str) -> Iterator[Platform]:
    """Dagster's queue, and no worker."""
    with open_platform(endpoint, extra={"run_coordinator": COORDINATOR}) as platform:
        yield platform


def test_it_shows_asks_and_stops_what_was_shown(queued: Platform) -> None:
    wanted = [submit(queued, {"team": "ask", "dagster/partition": f"2026-11-0{day}"}) for day in (1, 2)]
    other = submit(queued, {"team": "other"})
    environ = queued.environ({"NO_COLOR": "1"})
    command = ("run", "cancel", "--tag", "team=ask", "--reason", "wrong file", "--requested-by", "ada")
    with on_terminal((*CLI, *command), environ, columns=60) as terminal:
        terminal.shows("[y/N]: ")
        late = submit(queued, {"team": "ask"})
        terminal.types("y\n")
        assert terminal.ended() == 0, terminal.lines
    lines = terminal.lines
    assert "2 wait and are withdrawn before they start" in lines
    for run_id, partition in zip(wanted, ("2026-11-01", "2026-11-02"), strict=True):
        (row,) = [line.split() for line in lines if line.strip().startswith(run_id[:8])]
        assert row[1:4] == ["sleepy_job", partition, "QUEUED"]
    assert "Cancel these 2 runs? [y/N]: y" in lines
    assert "2 cancelled while waiting" in lines
    assert max(map(len, lines)) <= 60, lines
    assert [queued.status(run_id) for run_id in wanted] == [STATUS.CANCELED] * 2
    tags = queued.run(wanted[0]).tags
    assert (tags[CANCEL_REASON_TAG], tags[CANCELLED_BY_TAG]) == ("wrong file", "ada")
    assert [queued.status(run_id) for run_id in (late, other)] == [STATUS.QUEUED] * 2


def test_without_a_terminal_it_wants_to_be_sure(queued: Platform) -> None:
    run_ids = [submit(queued, {"team": "sure"}) for _ in range(2)]
    query = ("run", "cancel", "--tag", "team=sure")
    ended = queued.command(*query)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1] == (
        "Error: there is no terminal to ask on: look with --dry-run, then add --yes"
    )
    shown = queued.command(*query, "--dry-run")
    assert shown.returncode == 0
    assert shown.stdout.startswith("2 wait and are withdrawn before they start\n")
    listed = json.loads(queued.command(*query, "--dry-run", "--json").stdout)
    assert [run["run_id"] for run in listed["runs"]] == run_ids
    assert {queued.status(run_id) for run_id in run_ids} == {STATUS.QUEUED}, "so far nothing was done"
    ended = queued.command(*query, "--yes", "--json")
    assert ended.returncode == 0
    assert sorted(json.loads(ended.stdout)["cancelled_while_waiting"]) == sorted(run_ids)
    again = queued.command(*query, "--yes")
    assert (again.returncode, again.stdout) == (0, "no run matches\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing says which runs: give ids, or filters like --job and --tag, or --all"),
        (["--all", "--job", "load"], "--all means every run that is not finished; leave it out, or the filters"),
        (["12345678", "--job", "load"], "ids and filters exclude each other: give either"),
        (["--status", "success"], "runs with this --status are finished: nothing can be cancelled"),
        (["--job", "load", "--stop"], "--stop needs --schedule, --sensor or --backfill: what is it to stop?"),
        (["--all", "--timeout", "5m"], "--timeout goes with --wait"),
        (["--where", "nope == 1"], "--where, character 1 ('nope == 1'): there is no nope; there are run_id, job, "),
    ],
)
def test_what_is_not_clear_is_refused_in_one_line(queued: Platform, arguments: list[str], said: str) -> None:
    ended = queued.command("run", "cancel", "--yes", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = [line for line in ended.stderr.splitlines() if "Error: " in line]
    assert said in line


def test_what_launches_them_is_stopped_first(queued: Platform) -> None:
    state = add(queued, InstigatorType.SCHEDULE, "hourly")
    its, other = submit(queued, {"dagster/schedule_name": "hourly"}), submit(queued, {"dagster/schedule_name": "daily"})
    query = ("run", "cancel", "--schedule", "hourly")
    unknown = queued.command("run", "cancel", "--schedule", "nope", "--stop", "--yes")
    assert unknown.returncode == 1
    assert "knows no schedule nope" in unknown.stderr
    ended = queued.command(*query, "--stop", "--yes")
    assert ended.returncode == 0, ended
    assert ended.stdout.splitlines()[-2:] == ["schedule hourly is stopped", "1 cancelled while waiting"]
    assert not is_running(queued, state)
    assert (queued.status(its), queued.status(other)) == (STATUS.CANCELED, STATUS.QUEUED)


def test_ctrl_c_in_the_middle(platform: Platform) -> None:
    run_ids = [started(platform) for _ in range(6)]
    out, error = Lines(), Lines()
    arguments = ("run", "cancel", "--job", "quick_job", "--yes", "--rate", "1/s", "--json")
    process = start_command(arguments, platform.environ(), out.writer, error.writer)
    out.close_writer()
    error.close_writer()
    wait_until(lambda: STATUS.CANCELING in map(platform.status, run_ids), "one is told", seen=lambda: error.lines)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    out.join()
    error.join()
    report = json.loads("".join(out.lines))
    told, left = report["told_while_running"], report["not_reached"]
    assert sorted(told + left) == sorted(run_ids)
    assert left, "it has stopped before the end"
    statuses = {run_id: platform.status(run_id) for run_id in run_ids}
    assert statuses == dict.fromkeys(told, STATUS.CANCELING) | dict.fromkeys(left, STATUS.STARTED)
    said = f"stopped by Ctrl-C after {len(told)} runs; {len(left)} are left, the same command goes on with them\n"
    assert said in error.lines
    waited = platform.command("run", "cancel", left[0], "--wait", "--timeout", "0.1s")
    assert waited.returncode == 4, "no worker ends it"
    assert f"not ended: {left[0]}; `dagster-taskiq run explain {left[0][:8]}` says" in waited.stderr


def test_it_waits_for_their_ends(working: Platform) -> None:
    tags = {"wave": "one"}
    run_ids = [working.launch("sleepy_job", tags=tags) for _ in range(2)]
    for run_id in run_ids:
        working.marked(run_id, "started")
    ended = working.command("run", "cancel", "--tag", "wave=one", "--yes", "--wait")
    assert ended.returncode == 0, ended
    assert ended.stdout.splitlines()[-2:] == ["2 told to stop while running", "ended: 2 CANCELED"]
    assert {working.status(run_id) for run_id in run_ids} == {STATUS.CANCELED}
