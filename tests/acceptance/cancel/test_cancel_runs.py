"""`cancel_runs`: many at once, what waits before what runs, and a report that is true."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterRunStatus, RunsFilter
from tests.acceptance.cancel.test_truth_table import finished, started, unknown
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, Daemon, dequeuing, submit
from tests.support.platform import Platform
from tests.support.proxy import SqsProxy, sqs_proxy
from tests.support.waiting import wait_until

from dagster_taskiq import CancelProgress, cancel_runs, select_runs
from dagster_taskiq.dagster_compat.many_runs import move_runs
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(240)]

STATUS = DagsterRunStatus
WITH_COORDINATOR: Mapping[str, Any] = {"run_coordinator": COORDINATOR}


@pytest.fixture(scope="module")
def proxied(endpoint: str) -> Iterator[tuple[Platform, SqsProxy]]:
    """A platform with Dagster's queue, whose launcher and worker reach SQS by way of a proxy."""
    with sqs_proxy(endpoint) as proxy, open_platform(proxy.url, source=UNHURRIED, extra=WITH_COORDINATOR) as platform:
        yield platform, proxy


def at_work(platform: Platform) -> list[str]:
    runs = platform.instance.get_runs(RunsFilter(statuses=[STATUS.STARTED]))
    return [run.run_id for run in runs if any(mark.startswith("started") for mark in platform.marks(run.run_id))]


def test_all_of_sixty_of_which_some_run_while_the_daemon_starts_others(proxied: tuple[Platform, SqsProxy]) -> None:
    platform, proxy = proxied
    run_ids = [submit(platform) for _ in range(60)]
    with platform.worker("-n", "w"), dequeuing(platform):
        wait_until(lambda: len(at_work(platform)) >= 5, "five are at work", within=90, seen=lambda: at_work(platform))
        sent, told = proxy.seen.copy(), list[CancelProgress]()
        which = RunsFilter(job_name="sleepy_job")
        report = cancel_runs(platform.instance, which, reason="test", requested_by="ada", tell=told.append)
        for run_id in run_ids:
            assert platform.finished(run_id, within=90) is STATUS.CANCELED
    assert report.counts == {"cancelled": 60}, report
    assert sorted(report.cancelled) == sorted(run_ids)
    assert told[-1].done == told[-1].of == 60
    for run_id in run_ids:
        events = Counter(platform.events(run_id))
        assert events[DagsterEventType.RUN_CANCELED] == 1, platform.story(run_id)
        tags = platform.run(run_id).tags
        assert (tags[CANCEL_REASON_TAG], tags[CANCELLED_BY_TAG]) == ("test", "ada")
    never_started = [run_id for run_id in run_ids if not platform.marks(run_id)]
    assert len(never_started) >= 60 - 12, "eight slots, one more is handed over, and what was between"
    requests = proxy.seen - sent
    batches = sum(count for key, count in requests.items() if key[0] == "SendMessageBatch" and "-cancels" in key[1])
    assert 1 <= batches <= 2, requests


def test_half_of_them_unknown_or_finished(platform: Platform) -> None:
    going, over = [started(platform) for _ in range(3)], finished(platform)
    selection = select_runs(platform.instance, [*going, unknown(platform), over])
    assert (len(selection), selection.at_work) == (3, tuple(going))
    assert {platform.status(run_id) for run_id in going} == {STATUS.STARTED}, "selecting changes nothing"
    report = cancel_runs(platform.instance, iter([going[0], unknown(platform), over, *going]))
    assert sorted(report.cancelled) == sorted(going)
    assert (report.already_finished, report.not_found, report.failed) == ((over,), (unknown(platform),), {})
    assert str(report) == "3 cancelled, 1 already finished, 1 not found"
    assert cancel_runs(platform.instance, [over]).counts == {"already finished": 1}


def test_by_what_a_function_says_and_stopped_in_the_middle(endpoint: str) -> None:
    with open_platform(endpoint, extra=WITH_COORDINATOR) as platform:
        wanted = [submit(platform, {"team": "a"}) for _ in range(3)]
        other = submit(platform, {"team": "b"})
        urgent = submit(platform, {"team": "a", "dagster/priority": "5"})
        selection = select_runs(platform.instance, lambda run: run.tags.get("team") == "a")
        assert selection.waiting == (urgent, *wanted), "in the order in which they would start"
        stop = threading.Event()
        stop.set()
        report = cancel_runs(platform.instance, selection, stop=stop)
        assert (report.left, report.cancelled) == ((urgent, *wanted), ())
        report = cancel_runs(platform.instance, lambda run: run.tags.get("team") == "a", reason="no \x00 good")
        assert report.counts == {"cancelled": 4}
        assert Stage.REQUESTED in platform.stages(urgent)
        assert platform.run(urgent).tags[CANCEL_REASON_TAG] == "no � good"
        (found,) = platform.instance.get_runs(RunsFilter(tags={"team": "a", CANCEL_REASON_TAG: "no � good"}), limit=1)
        assert found.status is STATUS.CANCELED
        assert platform.status(other) is STATUS.QUEUED
        assert platform.instance.get_run_records(RunsFilter(run_ids=[urgent]))[0].end_time is not None
        assert Daemon(platform.instance).iterate() == {"CANCELED": 4, "STARTING": 1}


def test_without_sqs_their_statuses_stop_them(endpoint: str) -> None:
    with sqs_proxy(endpoint) as proxy, open_platform(proxy.url) as platform:
        going = [started(platform) for _ in range(2)]
        proxy.away()
        report = cancel_runs(platform.instance, going)
        assert sorted(report.marked) == sorted(report.cancelled) == sorted(going)
        assert str(report) == "2 cancelled; no cancel message for 2 of them"
        assert {platform.status(run_id) for run_id in going} == {STATUS.CANCELING}


def test_on_postgresql(endpoint: str, postgres: str) -> None:
    extra = {**WITH_COORDINATOR, "storage": {"postgres": {"postgres_url": postgres}}}
    with open_platform(endpoint, extra=extra) as platform:
        run_ids = [submit(platform) for _ in range(3)]
        report = cancel_runs(platform.instance, RunsFilter(job_name="sleepy_job"), reason="why", requested_by="ada")
        assert sorted(report.cancelled) == sorted(run_ids)
        for run_id in run_ids:
            assert platform.status(run_id) is STATUS.CANCELED
            events = Counter(platform.events(run_id))
            assert events[DagsterEventType.RUN_CANCELED] == events[DagsterEventType.RUN_CANCELING] == 1
            assert platform.run(run_id).tags[CANCEL_REASON_TAG] == "why"
        found = platform.instance.get_runs(RunsFilter(tags={CANCELLED_BY_TAG: "ada"}))
        assert sorted(run.run_id for run in found) == sorted(run_ids)


def test_one_that_was_left_between_the_queue_and_its_end_is_cancelled(endpoint: str) -> None:
    """Who withdrew it died after the first of the two statuses."""
    with open_platform(endpoint, extra=WITH_COORDINATOR) as platform:
        run_id = submit(platform)
        queued, canceling = STATUS.QUEUED, STATUS.CANCELING
        assert move_runs(platform.instance, [platform.run(run_id)], queued, canceling) == {run_id}
        report = cancel_runs(platform.instance, [run_id])
        assert (report.withdrawn, report.failed) == ((run_id,), {})
        assert platform.status(run_id) is STATUS.CANCELED
