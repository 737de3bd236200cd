"""A cancel at any moment of a run's life ends the same way: in a state that is final and true, with nothing alive."""

import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.support.platform import FINISHED, Platform
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(300)]

MANY = int(os.environ.get("DAGSTER_TASKIQ_TEST_MOMENTS", "200"))
FEW = 24
PARTS = 4
HOWS = ("terminate", "mark", "terminate", "mark+terminate", "terminate", "terminate+terminate")
JOBS = ("quick_job", "retried_job")
AT_ONCE = 4
OP_SECONDS = 0.2


@dataclass(frozen=True)
class Shot:
    delay: float
    how: str
    job: str


def life_of_a_run(platform: Platform) -> float:
    """Seconds from launch until the run is finished, alone on the worker."""
    began = time.monotonic()
    run_id = platform.launch("quick_job", seconds=OP_SECONDS)
    assert platform.finished(run_id) is DagsterRunStatus.SUCCESS
    return time.monotonic() - began


def fire(platform: Platform, shot: Shot) -> str:
    run_id = platform.launch(shot.job, seconds=OP_SECONDS)
    time.sleep(shot.delay)  # the random moment itself, nothing is waited for
    if "mark" in shot.how and platform.status(run_id) not in FINISHED:
        platform.instance.report_run_canceled(platform.run(run_id))
    if "terminate" in shot.how:
        platform.launcher.terminate(run_id)
    return run_id


def check(platform: Platform, run_id: str, shot: Shot) -> DagsterRunStatus:
    wait_until(
        lambda: platform.status(run_id) in FINISHED and not platform.processes(run_id),
        f"run of {shot} is final and its processes are gone",
        within=40,
        every=0.1,
        seen=lambda: (platform.status(run_id), platform.processes(run_id), platform.story(run_id)),
    )
    return platform.status(run_id)


def shots_over(life: float, times: int, chance: random.Random) -> list[Shot]:
    """Spread over the whole life, at random within each part of it; every way to cancel, at early and late moments."""
    hows = [HOWS[number % len(HOWS)] for number in range(times)]
    chance.shuffle(hows)
    moments = [(number + chance.random()) / times * life for number in range(times)]
    shots = [Shot(moment, how, chance.choice(JOBS)) for moment, how in zip(moments, hows, strict=True)]
    chance.shuffle(shots)
    return shots


@pytest.mark.long
@pytest.mark.parametrize(
    "times", [FEW, *(pytest.param(MANY // PARTS, marks=pytest.mark.nightly, id=f"part{part}") for part in range(PARTS))]
)
def test_a_cancel_at_every_moment(working: Platform, times: int) -> None:
    platform = working
    seed = int(os.environ.get("DAGSTER_TASKIQ_TEST_SEED", str(random.SystemRandom().randrange(10**6))))
    print(f"seed {seed} (DAGSTER_TASKIQ_TEST_SEED)")
    chance = random.Random(seed)  # noqa: S311 - no secret
    life = life_of_a_run(platform)
    shots = shots_over(life, times, chance)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = list(pool.map(lambda shot: fire(platform, shot), shots))
        outcomes = list(pool.map(lambda pair: check(platform, *pair), zip(runs, shots, strict=True)))
    print(Counter((shot.how, outcome.value) for shot, outcome in zip(shots, outcomes, strict=True)))
    for run_id, shot in zip(runs, shots, strict=True):
        hold_true(platform, run_id, shot)


def hold_true(platform: Platform, run_id: str, shot: Shot) -> None:
    """What must hold of every run, long after its end as well as at it."""
    told = (shot, platform.story(run_id), platform.marks(run_id))
    status = platform.status(run_id)
    assert status in (DagsterRunStatus.CANCELED, DagsterRunStatus.SUCCESS), told
    marks = Counter(mark.split()[0] for mark in platform.marks(run_id))
    assert marks["cleanup-begin"] == marks["cleanup-end"] <= 1, told
    assert marks["started"] <= 1, told
    events = platform.events(run_id)
    if status is DagsterRunStatus.SUCCESS:
        assert marks["cleanup-end"] == 1, told
        assert "mark" not in shot.how or DagsterEventType.RUN_CANCELED not in events, told
    platform.assert_nothing_left(run_id)
