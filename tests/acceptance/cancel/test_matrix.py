"""The same promise on every queue and storage, with run monitoring on and off, and both ways to start a child."""

from collections import Counter
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support.platform import Platform

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

MONITORING: dict[str, Any] = {"run_monitoring": {"enabled": True, "max_resume_run_attempts": 2}}


def keeps_its_promise(platform: Platform) -> None:
    with platform.worker("-n", "a"), platform.worker("-n", "b"):
        good = platform.launch("quick_job", seconds=0)
        polite = [platform.launch("sleepy_job") for _ in range(3)]
        stubborn = platform.launch("carries_on_job", grace=0.5)
        for run_id in (*polite, stubborn):
            platform.marked(run_id, "started", within=60)
            assert platform.launcher.terminate(run_id), platform.story(run_id)
        for run_id in (*polite, stubborn):
            assert platform.finished(run_id, within=60) is DagsterRunStatus.CANCELED, platform.story(run_id)
            platform.assert_nothing_left(run_id)
            assert Counter(platform.events(run_id))[DagsterEventType.RUN_CANCELED] == 1
        for run_id in polite:
            assert Counter(platform.marks(run_id))["cleanup-end"] == 1
            assert Stage.KILLED not in platform.stages(run_id)
        assert Stage.KILLED in platform.stages(stubborn)
        assert platform.finished(good, within=60) is DagsterRunStatus.SUCCESS


@pytest.mark.parametrize("extra", [{}, MONITORING], ids=["unmonitored", "monitored"])
@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_on_sqlite(endpoint: str, fifo: bool, extra: dict[str, Any]) -> None:
    with open_platform(endpoint, fifo=fifo, extra=extra, source=UNHURRIED) as platform:
        keeps_its_promise(platform)


@pytest.mark.postgres
@pytest.mark.parametrize("extra", [{}, MONITORING], ids=["unmonitored", "monitored"])
@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_on_postgres(endpoint: str, postgres: str, fifo: bool, extra: dict[str, Any]) -> None:
    storage = {"storage": {"postgres": {"postgres_url": postgres}}}
    with open_platform(endpoint, fifo=fifo, extra={**extra, **storage}, source=UNHURRIED) as platform:
        keeps_its_promise(platform)


def test_in_fresh_interpreters(endpoint: str) -> None:
    with open_platform(endpoint, source={**UNHURRIED, "start_method": "spawn"}) as platform:
        keeps_its_promise(platform)


def test_jobs_as_message_groups_of_a_fair_queue(endpoint: str) -> None:
    with open_platform(endpoint, source={**UNHURRIED, "is_fair_queue": True}) as platform:
        keeps_its_promise(platform)
