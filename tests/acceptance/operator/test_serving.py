"""Workers that serve routes: of whom is taken what, in which order, and who hears of a cancel."""

import json
import re
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from dagster import DagsterRunStatus, RunsFilter
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support.platform import ENTRYPOINT, Platform
from tests.support.waiting import wait_until

from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.fleet import hold_fleet, release_fleet
from dagster_taskiq.storage.tags import QUEUE_TAG
from dagster_taskiq.storage.workers import WorkerInfo, list_workers

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def platform(endpoint: str) -> Iterator[Platform]:
    """With the route gpu, and no worker. Only the cancel queues tell of cancels: the other channel is too slow."""
    with open_platform(endpoint, source={**UNHURRIED, "status_poll_seconds": 300, "cancel_ttl": 600}) as one:
        one.create_route("gpu")
        yield one


def test_a_worker_takes_the_work_of_its_route_and_no_other(platform: Platform) -> None:
    other = platform.launch("quick_job")
    with platform.worker("-n", "g", "-q", "gpu") as worker:
        base = queue_name(platform.queue_url)
        assert f"is ready: it listens to {base}-gpu and {base}-gpu-steps\n" in worker.log()
        run_id = platform.launch("quick_job", tags={QUEUE_TAG: "gpu"})
        assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, worker.log()
        listed = platform.command("worker", "list", "--json")
        (one,) = json.loads(listed.stdout)
        assert one["routes"] == ["gpu"]
        assert re.search(r"worker +state +routes .*alive +gpu ", platform.command("worker", "list").stdout, re.DOTALL)
    assert platform.status(other) is DagsterRunStatus.STARTING
    with platform.worker("-n", "d") as worker:
        assert platform.finished(other) is DagsterRunStatus.SUCCESS, worker.log()
        assert "routes" not in platform.command("worker", "list").stdout


def test_a_worker_of_two_routes_takes_work_and_cancels_of_both(platform: Platform) -> None:
    with platform.worker("-n", "both", "-q", "gpu,default") as worker:
        base = queue_name(platform.queue_url)
        assert f"listens to {base}-gpu and {base}-gpu-steps, then {base} and {base}-steps\n" in worker.log()
        run_ids = [platform.launch("sleepy_job", tags={QUEUE_TAG: route}) for route in ("gpu", "default")]
        for run_id in run_ids:
            platform.marked(run_id, "started")
            assert platform.launcher.terminate(run_id)
        for run_id in run_ids:
            assert platform.finished(run_id) is DagsterRunStatus.CANCELED, worker.log()


def test_the_preferred_route_is_served_first_and_the_slots_are_shared(platform: Platform) -> None:
    with platform.worker("-n", "both", "-q", "gpu", "-q", "default", "--max-runs", "1") as worker:
        first = platform.launch("sleepy_job")
        platform.marked(first, "started")
        low = [platform.launch("quick_job") for _ in range(3)]
        high = [platform.launch("quick_job", tags={QUEUE_TAG: "gpu"}) for _ in range(3)]
        assert platform.launcher.terminate(first)
        for run_id in (*low, *high):
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, worker.log()
    records = platform.instance.get_run_records(RunsFilter(run_ids=[*low, *high]))
    spans = sorted((one.start_time or 0, one.end_time or 0, one.dagster_run.run_id in high) for one in records)
    assert [is_high for _, _, is_high in spans] == [True] * 3 + [False] * 3
    assert all(end <= next_start for (_, end, _), (next_start, _, _) in pairwise(spans)), "one at a time"


def test_holds_and_stops_are_for_all_routes_of_a_worker(platform: Platform) -> None:
    with platform.worker("-n", "both", "-q", "gpu,default") as worker:
        assert "both-" in platform.command("worker", "health", "--pid", str(worker.pid)).stdout
        hold = hold_fleet(platform.instance, reason="migration", by="ada")
        wait_until(lambda: working(platform).held == hold.since, "it has heard of the hold", seen=worker.log)
        run_ids = [platform.launch("sleepy_job", tags={QUEUE_TAG: route}) for route in ("default", "gpu")]
        before = time.time()
        release_fleet(platform.instance)
        for run_id in run_ids:
            platform.marked(run_id, "started")
        records = platform.instance.get_run_records(RunsFilter(run_ids=run_ids))
        assert all((record.start_time or 0) > before for record in records)
        assert "both-" in platform.command("worker", "stop", "both", "--wait", "--timeout", "60s").stdout, worker.log()
        assert worker.process.wait(30) == 0, worker.log()
    for run_id in run_ids:
        assert platform.status(run_id) is DagsterRunStatus.FAILURE
        assert any("worker shut down" in line for line in platform.story(run_id)), platform.story(run_id)
        platform.assert_nothing_left(run_id)


def working(platform: Platform) -> WorkerInfo:
    (one,) = list_workers(platform.instance, platform.launcher.settings)
    return one


@pytest.mark.parametrize("how", ["option", "variable", "entrypoint"])
def test_a_worker_of_a_route_without_queues_says_what_to_do(platform: Platform, how: str) -> None:
    arguments = ("-q", "gpu", "-q", "far") if how == "option" else ()
    program = (sys.executable, str(ENTRYPOINT)) if how == "entrypoint" else None
    env = {"DAGSTER_TASKIQ_ROUTE": "gpu,far"} if how != "option" else None
    with platform.worker(*arguments, env=env, program=program, ready=False) as worker:
        wait_until(lambda: worker.process.poll() is not None, "it has ended", within=60, seen=worker.log)
    assert worker.process.poll() == 1
    said = (
        "Error: route 'far' does not exist; routes that exist: default, gpu;"
        " create it with `dagster-taskiq queue create --route far`\n"
    )
    assert said in worker.log()
