"""A worker whose database does not answer for a while, runs at every stage of their lives, and what became of them."""

import random
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from dagster import DagsterRunStatus

from dagster_taskiq.storage.heartbeats import Heartbeats
from tests.support.monitoring import monitoring_daemon
from tests.support.platform import Platform, WorkerProcess
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import wait_until

MONITORED = {
    "run_monitoring": {
        "enabled": True,
        "max_resume_run_attempts": 3,
        "poll_interval_seconds": 1,
        "cancel_timeout_seconds": 600,
        "start_timeout_seconds": 600,
    }
}
SUCCESS, CANCELED = DagsterRunStatus.SUCCESS, DagsterRunStatus.CANCELED


@contextmanager
def behind_a_hole(platform: Platform, postgres: str) -> Iterator[tuple[TcpProxy, dict[str, str]]]:
    """The proxy, and the environment of a worker that has the database by way of it; all others have it directly."""
    url = urllib.parse.urlsplit(postgres)
    with tcp_proxy(url.hostname or "127.0.0.1", url.port or 5432) as proxy:
        through = url._replace(netloc=f"{url.username}@{proxy.host}:{proxy.port}").geturl()
        home = platform.home / "behind"
        home.mkdir()
        (home / "dagster.yaml").write_text((platform.home / "dagster.yaml").read_text().replace(postgres, through))
        yield proxy, {"DAGSTER_HOME": str(home)}


@dataclass
class Fleet:
    """A worker `a` behind the hole, perhaps a healthy one, `b`, and Dagster's monitoring."""

    platform: Platform
    proxy: TcpProxy
    workers: dict[str, WorkerProcess]
    stages: dict[str, str] = field(default_factory=dict)
    """By run: what happened to it, in words."""
    expected: dict[str, set[DagsterRunStatus]] = field(default_factory=dict)

    def launch(self, stage: str, *expected: DagsterRunStatus, job: str = "sleepy_job", **config: Any) -> str:
        run_id = self.platform.launch(job, **config)
        self.stages[run_id] = stage
        self.expected[run_id] = set(expected)
        return run_id

    def heartbeat_age(self, name: str) -> float:
        """Of the worker with that name, in seconds."""
        beats = Heartbeats(self.platform.instance, 60, 5).last()
        return time.time() - max(beat.at for beat in beats if beat.worker_id.startswith(f"{name}-"))

    def told(self, run_id: str) -> str:
        story = "\n".join(self.platform.story(run_id))
        return f"{self.stages[run_id]}: {self.platform.status(run_id)}\n{story}"

    def logs(self) -> str:
        """Of the workers."""
        return "\n".join(f"--- {name}\n{worker.log()[-20_000:]}" for name, worker in self.workers.items())

    def verdict(self, within: float) -> tuple[list[str], list[str]]:
        """When all runs are over: those that were executed twice, and those whose end is wrong, with their story."""
        twice, wrong = [], []
        until = time.monotonic() + within
        for run_id, expected in self.expected.items():
            try:
                status = self.platform.finished(run_id, within=max(1, until - time.monotonic()))
            except AssertionError:
                wrong.append(f"not over: {self.told(run_id)}")
                continue
            if status not in expected or self.platform.processes(run_id):
                wrong.append(self.told(run_id))
            if self.platform.mark_counts(run_id)["started"] > 1:
                twice.append(self.told(run_id))
        return twice, wrong


@contextmanager
def fleet(platform: Platform, postgres: str, *, healthy: bool) -> Iterator[Fleet]:
    """`healthy`: with a second worker that has the database directly."""
    with ExitStack() as stack:
        proxy, environment = stack.enter_context(behind_a_hole(platform, postgres))
        workers = {"a": stack.enter_context(platform.worker("-n", "a", env=environment))}
        if healthy:
            workers["b"] = stack.enter_context(platform.worker("-n", "b"))
        stack.enter_context(monitoring_daemon(platform))
        try:
            yield Fleet(platform, proxy, workers)
        finally:
            proxy.back()
            proxy.cut()


def every_stage(fleet: Fleet, hole_s: float) -> None:
    """One hole, and runs that meet it before they are claimed, as they start, at work, as they end and as they stop."""
    platform, proxy = fleet.platform, fleet.proxy
    working = [
        fleet.launch("works through it", SUCCESS, seconds=hole_s + 5),
        fleet.launch("ends in it", SUCCESS, seconds=2 + hole_s / 3),
        fleet.launch("is marked CANCELING in it", CANCELED),
        fleet.launch("is cancelled in it by a message, as it writes", CANCELED, seconds=2 + hole_s / 3),
    ]
    ending = fleet.launch("ends as it begins", SUCCESS, seconds=2)
    for run_id in working:
        platform.marked(run_id, "started")
    _, _, marked, by_message = working
    cancel = platform.task_id(by_message)
    fleet.launch("starts as it begins", SUCCESS, job="quick_job", seconds=0)
    platform.marked(ending, "slept")
    began = time.monotonic()
    proxy.swallow()
    fleet.launch("is launched in it", SUCCESS, job="quick_job", seconds=0)
    platform.instance.report_run_canceling(platform.run(marked))
    platform.marked(by_message, "slept")
    platform.cancel_by_message(cancel)
    wait_until(lambda: time.monotonic() - began >= hole_s, "the hole is over", within=hole_s + 5)
    proxy.heal()


def at_random(fleet: Fleet, seed: int, longest_s: float) -> float:
    """A hole of up to `longest_s`, at any moment in the lives of a dozen runs; its length."""
    dice = random.Random(seed)  # noqa: S311 - it must be the same for the same seed
    platform, proxy = fleet.platform, fleet.proxy
    hole_s = dice.uniform(0, longest_s)
    begins_at, healed = dice.uniform(0, 10), False
    until = begins_at + hole_s
    began = time.monotonic()
    launches = sorted(dice.uniform(0, max(10, min(until, 40))) for _ in range(12))
    stops: list[tuple[float, str, str]] = []
    while launches or stops or not healed:
        now = time.monotonic() - began
        if begins_at <= now:
            proxy.swallow()
            begins_at = float("inf")
        if until <= now and not healed:
            proxy.heal()
            healed = True
        if launches and launches[0] <= now:
            launches.pop(0)
            seconds, how = (
                dice.choice([0.0, 1.0, 5.0, 20.0]),
                dice.choice(["", "", "", "terminated", "marked", "message"]),
            )
            expected = {SUCCESS, CANCELED} if how else {SUCCESS}
            run_id = fleet.launch(
                f"{seconds:g} s from {now:.1f} s on, {how or 'left alone'}", *expected, seconds=seconds
            )
            if how:
                stops.append((now + dice.uniform(0, 15), how, run_id))
        for stop in [stop for stop in stops if stop[0] <= now]:
            stops.remove(stop)
            _stop(platform, stop[1], stop[2])
        time.sleep(0.05)
    return hole_s


def _stop(platform: Platform, how: str, run_id: str) -> None:
    run = platform.run(run_id)
    if how == "terminated":
        platform.launcher.terminate(run_id)
    elif how == "message":
        platform.cancel_by_message(platform.task_id(run_id))
    elif run.status is DagsterRunStatus.STARTED:
        platform.instance.report_run_canceling(run)
