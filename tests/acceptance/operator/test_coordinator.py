"""What waits stays in Dagster's queue: the daemon's own iteration, on real storage, queues and heartbeats."""

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.run_coordinator import SubmitRunContext
from dagster._daemon.controller import create_daemon_of_type
from dagster._daemon.run_coordinator import QueuedRunCoordinatorDaemon
from tests.acceptance.conftest import open_platform
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.coordinator import TaskiqRunCoordinator
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.storage.fleet import hold_fleet
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

COORDINATOR = {"module": "dagster_taskiq.coordinator", "class": "TaskiqRunCoordinator"}


class Daemon:
    """Dagster's daemon of the run queue, one iteration at a time."""

    def __init__(self, instance: DagsterInstance) -> None:
        self.instance = instance
        found = create_daemon_of_type(QueuedRunCoordinatorDaemon.daemon_type(), instance)
        assert isinstance(found, QueuedRunCoordinatorDaemon)
        self._daemon = found
        self._context: Any = SimpleNamespace(instance=instance, create_request_context=lambda: None)

    def take(self) -> None:
        """Take from the queue what may be started."""
        list(self._daemon.run_iteration(self._context))

    def iterate(self) -> dict[str, int]:
        """How many runs have which status afterwards."""
        self.take()
        statuses = [run.status.value for run in self.instance.get_runs()]
        return {status: statuses.count(status) for status in sorted(set(statuses))}


@contextmanager
def dequeuing(platform: Platform) -> Iterator[None]:
    """Somebody takes from the queue all the time, as the daemon does; until the end."""
    over = threading.Event()

    def dequeue() -> None:
        with DagsterInstance.from_config(str(platform.home)) as instance:
            daemon = Daemon(instance)
            while not over.is_set():
                daemon.take()

    taking = threading.Thread(target=dequeue)
    taking.start()
    try:
        yield
    finally:
        over.set()
        taking.join(60)


@contextmanager
def queued(endpoint: str, runs: int, *, source: Any = None, extra: Any = None, **config: Any) -> Iterator[Platform]:
    """A platform with runs in Dagster's queue, and no worker."""
    extra = {"run_coordinator": {**COORDINATOR, "config": config}, **(extra or {})}
    with open_platform(endpoint, source=source, extra=extra) as platform:
        for _ in range(runs):
            submit(platform)
        yield platform


def submit(platform: Platform, tags: dict[str, str] | None = None, job: str = "sleepy_job", **config: Any) -> str:
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__")
    run = platform.create(job, tags, remote_job_origin=RemoteJobOrigin(repository, job), **config)
    workspace: Any = None
    return platform.instance.run_coordinator.submit_run(SubmitRunContext(run, workspace)).run_id


def beat(instance: DagsterInstance, worker: str, runs: int) -> None:
    Heartbeats(instance, 6, 4).beat(worker, {"slots": [runs, 4]})


def test_so_many_are_handed_over_as_there_are_slots_and_one_more(endpoint: str) -> None:
    with queued(endpoint, 8) as platform:
        assert Daemon(platform.instance).iterate() == {"QUEUED": 7, "STARTING": 1}, "one for a fleet without workers"
        assert platform.waiting() == 1
        beat(platform.instance, "a", 2)
        beat(platform.instance, "b", 1)
        with DagsterInstance.from_config(str(platform.home)) as instance:  # the daemon, started again
            daemon = Daemon(instance)
            assert daemon.iterate() == {"QUEUED": 4, "STARTING": 4}
            assert daemon.iterate() == {"QUEUED": 4, "STARTING": 4}
            (first, *_) = instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTING]))
            assert instance.run_launcher.terminate(first.run_id)
            assert daemon.iterate() == {"CANCELED": 1, "QUEUED": 3, "STARTING": 4}
        assert platform.instance.run_coordinator.dequeue_interval_seconds == 1  # type: ignore[attr-defined]


def test_configured_limits_stay_upper_bounds_and_priorities_count_until_the_last_moment(endpoint: str) -> None:
    limits = [{"key": "database", "value": "small", "limit": 1}]
    with queued(endpoint, 3, look_ahead=2, max_concurrent_runs=3, tag_concurrency_limits=limits) as platform:
        beat(platform.instance, "a", 100)
        small = [submit(platform, {"database": "small", "dagster/priority": "2"}) for _ in range(2)]
        urgent = submit(platform, {"dagster/priority": "1"})
        assert Daemon(platform.instance).iterate() == {"QUEUED": 3, "STARTING": 3}
        handed_over = platform.instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTING]))
        assert {small[0], urgent} <= {run.run_id for run in handed_over}
        assert platform.status(small[1]) is DagsterRunStatus.QUEUED


def test_the_daemon_does_not_say_every_second_that_all_slots_are_busy(
    endpoint: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dagster.daemon"), "propagate", True)
    with queued(endpoint, 1) as platform, caplog.at_level("INFO", "dagster.daemon"):
        daemon = Daemon(platform.instance)
        for _ in range(4):
            daemon.iterate()
        said = [record.getMessage() for record in caplog.records if "won't launch more" in record.getMessage()]
        assert said == ["1 runs are currently in progress. Maximum is 1, won't launch more."]


def test_elsewhere_it_tells_the_configured_limit_and_asks_nobody(endpoint: str) -> None:
    """Each run's own process asks for the limits of pools, and gets them together with this one."""
    with queued(endpoint, 0, max_concurrent_runs=7) as platform:
        config = platform.instance.get_concurrency_config().run_queue_config
        assert config is not None
        assert config.max_concurrent_runs == 7


def test_it_says_what_is_configured_wrongly(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="look_ahead must be at least 1, not 0"):
        TaskiqRunCoordinator(look_ahead=0)
    replaced = {"concurrency": {"runs": {"max_concurrent_runs": 25}}}
    with (
        queued(endpoint, 0, extra=replaced) as platform,
        pytest.raises(SettingsError, match=r"concurrency\.runs\.max_concurrent_runs .* into the config of run_coord"),
    ):
        submit(platform)
    other = {"run_launcher": {"module": "dagster", "class": "DefaultRunLauncher"}}
    with (
        queued(endpoint, 0, extra=other) as platform,
        pytest.raises(SettingsError, match="needs the run_launcher TaskiqRunLauncher, not DefaultRunLauncher"),
    ):
        submit(platform)


def test_it_publishes_how_many_wait_and_for_how_long(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with queued(endpoint, 3, source={"metrics": "emf"}) as platform:
        beat(platform.instance, "a", 1)
        daemon = Daemon(platform.instance)
        daemon.iterate()
        daemon.iterate()
        (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if "RunsWaiting" in line]
        assert (line["RunsWaiting"], line["RunSlots"]) == (3, 1)
        assert 0 <= line["SecondsOldestRunWaits"] < 60
        units = {metric["Name"]: metric["Unit"] for metric in line["_aws"]["CloudWatchMetrics"][0]["Metrics"]}
        counts = dict.fromkeys(("RunsWaiting", "RunsHeld", "RunSlots"), "Count")
        assert units == counts | {"SecondsOldestRunWaits": "Seconds"}


def test_what_is_held_does_not_make_the_fleet_grow(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with queued(endpoint, 2, source={"metrics": "emf"}) as platform:
        beat(platform.instance, "a", 1)
        hold_fleet(platform.instance, reason="migration", by="ada")
        assert Daemon(platform.instance).iterate() == {"QUEUED": 2}, "not even one for a fleet without workers"
        (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if "RunsWaiting" in line]
        assert (line["RunsWaiting"], line["RunsHeld"], line["RunSlots"]) == (0, 2, 1)


@pytest.mark.slow
def test_a_worker_that_stops_has_no_free_slot_from_that_moment_on(endpoint: str) -> None:
    """And one that is ready has its slots before it says so."""
    patient = {"drain_seconds": 20, "stop_timeout_seconds": 30, "visibility_timeout_seconds": 60}
    with queued(endpoint, 2, source={**patient, "max_concurrent_runs": 1}) as platform, platform.worker() as worker:
        assert "QUEUED" not in Daemon(platform.instance).iterate(), "one for its slot, and one more"

        def at_work() -> list[str]:
            started = RunsFilter(statuses=[DagsterRunStatus.STARTED])
            return [run.run_id for run in platform.instance.get_runs(started)]

        wait_until(at_work, "one run is at work")
        began = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)
        last = Heartbeats(platform.instance, 30, 20).last
        wait_until(lambda: [beat.facts.get("slots") for beat in last()] == [[1, 0]], "it says so", within=9, seen=last)
        assert time.monotonic() - began < 9, "not with the next beat, ten seconds later"
        (run_id,) = at_work()
        assert platform.launcher.terminate(run_id)
        assert worker.stop() == 0
