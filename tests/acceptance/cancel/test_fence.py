"""`run cancel --until`: what is launched while the fence stands never starts, and afterwards runs start as before."""

import json
import signal
import time
from threading import Event

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, dequeuing, submit
from tests.support.platform import Platform
from tests.support.waiting import wait_until
from tests.support.warm import Lines, start_command

from dagster_taskiq.cancel_fence import FenceProgress, cancel_behind_fence
from dagster_taskiq.errors import QueryError
from dagster_taskiq.run_fence import Fence, fence_for, put_up
from dagster_taskiq.run_query import RunQuery
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(240)]

STATUS = DagsterRunStatus


def test_a_launch_that_races_with_it_sends_nothing(platform: Platform) -> None:
    """Nobody looks here but the launcher."""
    put_up(platform.instance, Fence(RunQuery(tags=(("team", "race"),)), time.time() + 600, "wrong file", "ada"))
    before = platform.waiting()
    caught, other = platform.launch("quick_job", tags={"team": "race"}), platform.launch("quick_job")
    assert (platform.status(caught), platform.status(other)) == (STATUS.CANCELED, STATUS.STARTING)
    assert platform.waiting() == before + 1
    tags = platform.run(caught).tags
    assert (tags[CANCEL_REASON_TAG], tags[CANCELLED_BY_TAG]) == ("wrong file", "ada")
    assert platform.events(caught).count(DagsterEventType.RUN_CANCELED) == 1
    said = "Canceled before it was launched, at a fence. By ada: wrong file"
    assert any(said in line for line in platform.story(caught)), platform.story(caught)


def test_a_run_of_which_it_cannot_be_told_whether_it_is_meant(platform: Platform) -> None:
    """It is launched, which its log and whoever has put up the fence are told; the fence stands for the others."""
    query, stop, launched = RunQuery(where="number(tags['rows']) > 9"), Event(), dict[str, str]()

    def watch(_: FenceProgress) -> None:
        if launched:
            stop.set()
        else:
            launched.update({rows: platform.launch("quick_job", tags={"rows": rows}) for rows in ("many", "1", "10")})

    report = cancel_behind_fence(platform.instance, query, hold_s=60, watch=watch, stop=stop)
    unclear, other, meant = launched["many"], launched["1"], launched["10"]
    statuses = [platform.status(run_id) for run_id in (unclear, other, meant)]
    assert statuses == [STATUS.STARTING, STATUS.STARTING, STATUS.CANCELED]
    why = "--where, character 1 (\"number(tags['rows'])\"): could not convert string to float: 'many'"
    why += f"; of run {unclear}"
    assert (report.failed, report.cancelled) == ({unclear: why}, (meant,))
    notes = [
        [entry.message for entry in platform.instance.all_logs(run_id) if "a fence" in entry.message]
        for run_id in (unclear, other)
    ]
    assert [len(said) for said in notes] == [1, 0]
    assert notes[0][0].endswith(f": {why}; to stop it: dagster-taskiq run cancel {unclear}")
    with pytest.raises(QueryError, match="could not convert"):
        cancel_behind_fence(platform.instance, query, hold_s=60)
    assert fence_for(platform.instance, platform.run(other)) is None, "it was taken down"


@pytest.mark.long
def test_while_a_sensor_goes_on_launching(endpoint: str) -> None:
    with (
        open_platform(endpoint, source=UNHURRIED, extra={"run_coordinator": COORDINATOR}) as platform,
        platform.worker("-n", "w"),
    ):
        first = submit(platform, {"dagster/sensor_name": "files"})
        with dequeuing(platform):
            platform.marked(first, "started")
            out, error = Lines(), Lines()
            arguments = ("run", "cancel", "--sensor", "files", "--until", "10m", "--yes", "--json")
            process = start_command(arguments, platform.environ(), out.writer, error.writer)
            out.close_writer()
            error.close_writer()
            run = platform.run(first)
            wait_until(lambda: fence_for(platform.instance, run), "the fence is up", seen=lambda: error.lines)
            late = [submit(platform, {"dagster/sensor_name": "files"}) for _ in range(4)]
            other = submit(platform, {"dagster/sensor_name": "more"})
            for run_id in (first, *late):
                assert platform.finished(run_id, within=90) is STATUS.CANCELED
            assert [platform.marks(run_id) for run_id in late] == [[]] * 4, "none of them has started"
            platform.marked(other, "started")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            out.join()
            assert fence_for(platform.instance, run) is None, "it was taken down"
            again = submit(platform, {"dagster/sensor_name": "files"})
            platform.marked(again, "started")
            assert platform.command("run", "cancel", "--all", "--yes").returncode == 0
            for run_id in (again, other):
                assert platform.finished(run_id) is STATUS.CANCELED
    report = json.loads("".join(out.lines))
    assert report["told_while_running"] == [first]
    assert sorted(report["cancelled_while_waiting"]) == sorted(report["came_meanwhile"]) == sorted(late)
