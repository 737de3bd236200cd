"""A spot storm: workers are drained or killed every few seconds, and replaced, while runs of many steps go on.

The same seed makes the same plan; what comes of it depends on the machine's timing.
"""

import random
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.step_claims import StepClaims
from tests.support.platform import FINISHED, STORM_JOBS, Platform, WorkerProcess
from tests.support.waiting import wait_until

SETTINGS = {
    "interrupted_steps": "retry",
    "max_interruptions": 100,
    "drain_seconds": 1,
    "stop_timeout_seconds": 15,
    "max_concurrent_runs": 4,
    "max_concurrent_steps": 6,
}
_WORKERS = 3
_COUNTED = {DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY}


@dataclass
class Figures:
    """What a storm was, and what has come of it. `wrong`: what must not be."""

    seed: int
    seconds: float
    runs: int = 0
    steps: int = 0
    kills: int = 0
    drains: int = 0
    interruptions: int = 0
    """Of steps."""
    resumes: int = 0
    """Of runs."""
    longest_run_s: float = 0.0
    most_of_a_step: int = 0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """For people."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


class _Fleet:
    def __init__(self, platform: Platform, stack: ExitStack) -> None:
        self._platform = platform
        self._stack = stack
        self._alive: dict[str, WorkerProcess] = {}
        self._started = 0

    def add(self) -> None:
        self._started += 1
        name = f"spot{self._started}"
        self._alive[name] = self._stack.enter_context(self._platform.worker("-n", name, ready=False))

    def at_work(self, run_ids: Iterable[str]) -> list[str]:
        """The names of those that have a step of these runs."""
        claims = StepClaims(self._platform.instance)
        busy = {claim.worker_id.rpartition("-")[0] for one in run_ids for claim in claims.running(one).values()}
        return [name for name in self._alive if name in busy]

    def end_one(self, dice: random.Random, figures: Figures, run_ids: Iterable[str]) -> None:
        """One of those that are at work, if any is: which one, the dice say."""
        worker = self._alive.pop(dice.choice(self.at_work(run_ids) or [*self._alive]))
        if dice.random() < 0.5:
            worker.process.kill()
            figures.kills += 1
        else:
            worker.process.send_signal(signal.SIGTERM)
            figures.drains += 1


def storm(open_platform: Callable[..., Any], endpoint: str, seed: int, seconds: float, runs: int = 4) -> Figures:
    """Have it for so long, and then wait until all runs have ended on workers that are left alone."""
    dice, figures = random.Random(seed), Figures(seed, seconds)  # noqa: S311 - a plan, not a secret
    with open_platform(endpoint, source=SETTINGS) as platform, ExitStack() as stack:
        platform.jobs = STORM_JOBS
        fleet = _Fleet(platform, stack)
        for _ in range(_WORKERS):
            fleet.add()
        launched = {platform.launch("many", count=4, seconds=dice.uniform(2, 6)): time.time() for _ in range(runs)}
        wait_until(lambda: any(map(platform.marks, launched)), "the first step is at work", within=90)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not _all_over(platform, launched):
            time.sleep(dice.uniform(2, 6))  # the weather
            wait_until(
                lambda: fleet.at_work(launched) or _all_over(platform, launched), "somebody is at work", within=90
            )
            fleet.end_one(dice, figures, launched)
            fleet.add()
            if dice.random() < 0.3 and len(launched) < 3 * runs:
                launched[platform.launch("many", count=4, seconds=dice.uniform(2, 6))] = time.time()
        wait_until(
            lambda: _all_over(platform, launched),
            "all runs have ended",
            within=240,
            every=0.5,
            seen=lambda: [(run_id, platform.story(run_id)) for run_id in launched if not _over(platform, run_id)],
        )
        for run_id in launched:
            _look(platform, run_id, figures)
    return figures


def _over(platform: Platform, run_id: str) -> bool:
    return platform.status(run_id) in FINISHED


def _all_over(platform: Platform, launched: dict[str, float]) -> bool:
    return all(_over(platform, run_id) for run_id in launched)


def _look(platform: Platform, run_id: str, figures: Figures) -> None:
    def wrong(what: str) -> None:
        figures.wrong.append(f"run {run_id[:8]} {what}: {platform.story(run_id)}")

    events, notes = platform.events(run_id), platform.step_notes(run_id, Stage.STEP_INTERRUPTED)
    record = platform.instance.get_run_record_by_id(run_id)
    figures.runs += 1
    figures.steps += events.count(DagsterEventType.STEP_SUCCESS)
    figures.interruptions += len(notes)
    figures.resumes += platform.stages(run_id).count(Stage.RUN_INTERRUPTED)
    figures.most_of_a_step = max([figures.most_of_a_step, *(int(note["interruption"]) for note in notes)])
    if record is not None and record.start_time is not None and record.end_time is not None:
        figures.longest_run_s = max(figures.longest_run_s, round(record.end_time - record.start_time, 1))
    if platform.status(run_id) is not DagsterRunStatus.SUCCESS:
        wrong(f"is {platform.status(run_id).value}")
    if _COUNTED & set(events):
        wrong("has a failure or a retry of a step")
    marks = [mark.split()[0] for mark in platform.marks(run_id)]
    if "overlap" in marks:
        wrong("had a step that ran twice at the same time")
    if any(mark.startswith("began-") and not mark.startswith("began-0-") for mark in marks):
        wrong("had a step whose retry number is not 0")
    if "collected-1-of-2" not in marks:
        wrong("has collected something else than its two outputs")
    platform.assert_nothing_left(run_id)
