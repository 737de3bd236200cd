"""Runs that end without a start: they have waited too long, or a newer run with the same key has come."""

import json
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster._core.run_coordinator import SubmitRunContext
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import should_retry
from tests.acceptance.conftest import open_platform
from tests.acceptance.operator.test_coordinator import COORDINATOR, Daemon, submit
from tests.support.moto import sqs_client
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.dagster_compat.api import LaunchRunContext
from dagster_taskiq.dagster_compat.key_values import replace_value
from dagster_taskiq.dagster_compat.many_runs import move_runs
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, QUEUE_TTL_TAG, RUN_ID_TAG, SUPERSEDE_TAG
from dagster_taskiq.storage.unstarted import Unstarted, end_handed_over, end_queued
from dagster_taskiq.story.gather import story_of
from dagster_taskiq.worker.admission import Action, Candidate, admit_run

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

STATUS = DagsterRunStatus
AT_ONCE = {QUEUE_TTL_TAG: "0.001"}
WHY = "waited longer than its queue_ttl_seconds of 0.001 s"
KEY = {SUPERSEDE_TAG: "the one"}
WITH_COORDINATOR = {"run_coordinator": COORDINATOR}
RETRIES = {"run_retries": {"enabled": True, "max_retries": 2}}


def storage(request: pytest.FixtureRequest, kind: str) -> dict[str, Any]:
    return {} if kind == "sqlite" else {"storage": {"postgres": {"postgres_url": request.getfixturevalue("postgres")}}}


OUTCOMES = pytest.mark.parametrize("outcome", ["canceled", "failure"])
STORAGES = pytest.mark.parametrize("kind", ["sqlite", "postgres"])


def ended(platform: Platform, run_id: str, *, fails: bool = False) -> None:
    """By its ttl, once, and it did nothing."""
    story, events = platform.story(run_id), Counter(platform.events(run_id))
    assert platform.status(run_id) is (STATUS.FAILURE if fails else STATUS.CANCELED), story
    assert WHY in story[-1], story
    assert events[DagsterEventType.RUN_FAILURE] + events[DagsterEventType.RUN_CANCELED] == 1, story
    assert not events[DagsterEventType.RUN_START], story
    assert platform.marks(run_id) == []
    if not fails:
        tags = platform.run(run_id).tags
        assert (tags[CANCEL_REASON_TAG], tags[CANCELLED_BY_TAG]) == (WHY, "dagster-taskiq")


def superseded(platform: Platform, run_id: str, by: str) -> None:
    story = platform.story(run_id)
    assert platform.status(run_id) is STATUS.CANCELED, story
    assert f"superseded by run {by} (dagster-taskiq/supersede_key = the one)" in story[-1], story
    assert Counter(platform.events(run_id))[DagsterEventType.RUN_CANCELED] == 1, story


@pytest.mark.parametrize(("kind", "outcome"), [("sqlite", "canceled"), ("postgres", "failure")])
def test_what_waits_too_long_is_ended_by_the_daemon_of_the_queue(
    endpoint: str, kind: str, outcome: str, request: pytest.FixtureRequest
) -> None:
    extra, source = WITH_COORDINATOR | RETRIES | storage(request, kind), {"queue_ttl_outcome": outcome}
    with open_platform(endpoint, extra=extra, source=source) as platform:
        handed_over = platform.launch("quick_job")
        platform.instance.add_run_tags(handed_over, AT_ONCE)
        short, long, none = (submit(platform, tags) for tags in (AT_ONCE, {QUEUE_TTL_TAG: "600"}, None))
        unreadable = submit(platform, {QUEUE_TTL_TAG: "soon"})
        Daemon(platform.instance).take()
        for run_id in (handed_over, short):
            ended(platform, run_id, fails=outcome == "failure")
            assert not should_retry(platform.run(run_id), platform.instance), "it would begin after all"
        going_on = {platform.status(run_id) for run_id in (long, none, unreadable)}
        assert going_on <= {STATUS.QUEUED, STATUS.STARTING}, going_on
        assert any(line.startswith("If it has not begun by") for line in story_of(platform.instance, long).summary)


def test_it_is_not_even_sent_when_it_is_launched_too_late(platform: Platform) -> None:
    before = platform.waiting()
    run_id = platform.launch("quick_job", tags=AT_ONCE)
    ended(platform, run_id)
    assert platform.waiting() == before


@OUTCOMES
def test_a_worker_does_not_begin_with_it(endpoint: str, outcome: str) -> None:
    with open_platform(endpoint, source={"queue_ttl_outcome": outcome}) as platform:
        late, good = platform.launch("quick_job"), platform.launch("quick_job", tags={QUEUE_TTL_TAG: "600"})
        platform.instance.add_run_tags(late, AT_ONCE)
        with platform.worker():
            assert platform.finished(late) in {STATUS.CANCELED, STATUS.FAILURE}
            assert platform.finished(good) is STATUS.SUCCESS
            wait_until(lambda: platform.waiting() == 0, "their messages are deleted")
        ended(platform, late, fails=outcome == "failure")


def test_one_whose_message_is_lost_is_ended_by_a_worker_that_looks_for_it(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        run_id = platform.launch("quick_job")
        sqs_client(platform.endpoint_url).purge_queue(QueueUrl=platform.queue_url)
        platform.instance.add_run_tags(run_id, AT_ONCE)
        with platform.worker():
            platform.finished(run_id, within=60)
        ended(platform, run_id)
        assert Stage.PICKED_UP not in platform.stages(run_id)


def how_it_ends(outcome: str) -> Unstarted:
    return Unstarted(WHY, "dagster-taskiq", fails=outcome == "failure")


def withdrawn_half(platform: Platform, end: Unstarted) -> str:
    """A run that somebody was taking from Dagster's queue when he died."""
    run = platform.run(submit(platform, job="quick_job", seconds=0))
    tags = {run.run_id: {**run.tags, **end.tags, RUN_ID_TAG: run.run_id}}
    assert move_runs(platform.instance, [run], STATUS.QUEUED, STATUS.CANCELING, tags)
    return run.run_id


@OUTCOMES
def test_one_is_ended_by_a_worker_when_who_was_ending_it_has_died(endpoint: str, outcome: str) -> None:
    with open_platform(
        endpoint, extra=WITH_COORDINATOR | RETRIES, source={"visibility_timeout_seconds": 8}
    ) as platform:
        run_id = withdrawn_half(platform, how_it_ends(outcome))
        with platform.worker():
            platform.finished(run_id, within=100)
        ended(platform, run_id, fails=outcome == "failure")
        assert not should_retry(platform.run(run_id), platform.instance)


@OUTCOMES
def test_one_that_the_daemon_takes_while_it_is_ended_is_not_sent(endpoint: str, outcome: str) -> None:
    """Who ends it hangs; Dagster's daemon had read QUEUED, and makes it STARTING."""
    with open_platform(endpoint, extra=WITH_COORDINATOR) as platform:
        run_id = withdrawn_half(platform, how_it_ends(outcome))
        platform.report(platform.run(run_id), DagsterEventType.RUN_STARTING)
        workspace: Any = None
        platform.launcher.launch_run(LaunchRunContext(platform.run(run_id), workspace))
        ended(platform, run_id, fails=outcome == "failure")
        assert platform.waiting() == 0


def test_one_with_copied_tags_of_a_cancelled_run_is_sent(platform: Platform) -> None:
    run_id = platform.launch("quick_job", tags={CANCELLED_BY_TAG: "adele"})
    assert platform.status(run_id) is STATUS.STARTING, "in the launchpad, Dagster's UI copies them"


@OUTCOMES
@STORAGES
def test_it_is_never_both_ended_and_taken_from_the_queue(
    endpoint: str, kind: str, outcome: str, request: pytest.FixtureRequest
) -> None:
    """Dagster's daemon launches it at the moment in which somebody on another host, whose clock differs, ends it."""
    with open_platform(endpoint, extra=WITH_COORDINATOR | storage(request, kind)) as platform, platform.worker():
        taken = [is_taken_while_it_is_ended(platform, outcome) for _ in range(8)]
        print(f"taken: {sum(taken)} of {len(taken)}")


def is_taken_while_it_is_ended(platform: Platform, outcome: str) -> bool:
    run_id, together = submit(platform, job="quick_job", seconds=0), threading.Barrier(2)

    def end() -> None:
        with DagsterInstance.from_config(str(platform.home)) as instance:
            instance.get_run_by_id(run_id)  # connected
            together.wait(20)
            end_queued(instance, [run_id], how_it_ends(outcome))

    daemon = Daemon(platform.instance)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(end)
        together.wait(20)
        daemon.take()
        ending.result(30)
    if platform.finished(run_id) is STATUS.SUCCESS:
        finals = {DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_CANCELED} & set(platform.events(run_id))
        assert not finals, platform.story(run_id)
        return True
    ended(platform, run_id, fails=outcome == "failure")
    return False


def test_one_can_be_ended_when_who_had_kept_it_from_workers_has_died(platform: Platform) -> None:
    run_id, end = platform.launch("quick_job"), how_it_ends("canceled")
    claims = Claims.of(platform.instance, platform.launcher.settings)
    withheld = claims.withhold(platform.run(run_id), end.by)
    assert withheld is not None
    assert not end_handed_over(claims, run_id, end), "he may be doing it"
    half_a_minute_ago = json.dumps({**json.loads(withheld.stored), "since": withheld.since - 31})
    assert replace_value(platform.instance, f"dagster-taskiq/claim/{run_id}", withheld.stored, half_a_minute_ago)
    assert end_handed_over(claims, run_id, end)
    ended(platform, run_id)


@STORAGES
def test_it_is_never_both_ended_and_begun(endpoint: str, kind: str, request: pytest.FixtureRequest) -> None:
    """A worker receives it at the moment in which it is ended."""
    with open_platform(endpoint, extra=storage(request, kind)) as platform:
        begun = [is_begun_while_it_is_ended(platform, looks_first=number % 2 == 0) for number in range(10)]
        print(f"begun: {sum(begun)} of {len(begun)}")


def is_begun_while_it_is_ended(platform: Platform, *, looks_first: bool) -> bool:
    run_id = platform.launch("quick_job")
    ends, begins = (Claims.of(platform.instance, platform.launcher.settings) for _ in range(2))
    candidate = Candidate("execute_run", run_id, platform.task_id(run_id), "w-1", "here")
    together = threading.Barrier(2)

    def end() -> bool:
        together.wait(10)
        return end_handed_over(ends, run_id, Unstarted(WHY, "dagster-taskiq"))

    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(end)
        together.wait(10)
        if not looks_first:
            wait_until(lambda: ending.done() or begins.read([run_id]), "it is being ended", every=0.0005)
        decision = admit_run(platform.instance, begins, candidate)
        was_ended = ending.result(30)
    assert was_ended is not (decision.action is Action.START), decision
    assert platform.status(run_id) is (STATUS.CANCELED if was_ended else STATUS.STARTING)
    return not was_ended


def test_of_runs_with_one_key_the_newest_stays_in_the_queue(endpoint: str) -> None:
    with open_platform(endpoint, extra=WITH_COORDINATOR) as platform:
        other, without = submit(platform, {SUPERSEDE_TAG: "another"}), submit(platform)
        first, second, third = (submit(platform, KEY) for _ in range(3))
        superseded(platform, first, second)
        superseded(platform, second, third)
        assert {platform.status(run_id) for run_id in (other, without, third)} == {STATUS.QUEUED}


@STORAGES
def test_of_two_that_come_at_once_one_survives_the_newer_one(
    endpoint: str, kind: str, request: pytest.FixtureRequest
) -> None:
    with open_platform(endpoint, extra=WITH_COORDINATOR | storage(request, kind)) as platform:
        for round_ in range(4):
            key = {SUPERSEDE_TAG: f"of round {round_}"}
            older, newer = (platform.create("sleepy_job", key, remote_job_origin=origin()) for _ in range(2))
            together = threading.Barrier(2)

            def hand_in(run: Any, together: threading.Barrier = together) -> None:
                with DagsterInstance.from_config(str(platform.home)) as instance:
                    together.wait(20)
                    workspace: Any = None
                    instance.run_coordinator.submit_run(SubmitRunContext(run, workspace))

            in_order: Sequence[Any] = (older, newer) if round_ % 2 else (newer, older)
            with ThreadPoolExecutor(2) as pool:
                for handed_in in [pool.submit(hand_in, run) for run in in_order]:
                    handed_in.result(60)
            seen = [platform.story(run.run_id) for run in (older, newer)]
            assert platform.status(newer.run_id) is STATUS.QUEUED, seen
            assert platform.status(older.run_id) is STATUS.CANCELED, seen


def origin() -> Any:
    from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

    return RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__"), "sleepy_job")


def test_one_at_work_is_terminated_and_says_why(working: Platform) -> None:
    older = working.launch("sleepy_job", tags=KEY)
    working.marked(older, "started")
    newer = working.launch("quick_job", tags=KEY, seconds=0)
    assert working.finished(older) is STATUS.CANCELED
    superseded(working, older, newer)
    working.assert_nothing_left(older)
    assert working.mark_counts(older)["cleanup-end"] == 1
    assert working.finished(newer) is STATUS.SUCCESS


def test_one_at_work_goes_on_where_only_what_waits_is_meant(endpoint: str) -> None:
    source = {"superseded_runs": "waiting", "max_concurrent_runs": 1}
    with open_platform(endpoint, source=source) as platform, platform.worker():
        at_work = platform.launch("closes_when_told_job", tags=KEY)
        platform.marked(at_work, "started")
        waits = platform.launch("quick_job", tags=KEY, seconds=0)
        last = platform.launch("quick_job", tags=KEY, seconds=0)
        superseded(platform, waits, last)
        assert platform.status(at_work) is STATUS.STARTED
        assert platform.launcher.terminate(at_work)
        assert platform.finished(at_work) is STATUS.CANCELED
        assert platform.finished(last) is STATUS.SUCCESS


def test_an_older_one_that_is_launched_late_is_ended_itself(platform: Platform) -> None:
    older = platform.create("quick_job", KEY)
    newer = platform.launch("quick_job", tags=KEY)
    platform.instance.launch_run(older.run_id, workspace=None)  # type: ignore[arg-type]
    superseded(platform, older.run_id, newer)
    assert platform.status(newer) is STATUS.STARTING
