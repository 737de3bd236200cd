"""`launcher.terminate(run_id)`, row by row."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterRun, DagsterRunStatus
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG
from dagster._daemon.monitoring.run_monitoring import check_run_timeout
from tests.acceptance.conftest import SNAPPY, open_platform
from tests.support.moto import sqs_client
from tests.support.platform import Platform

from dagster_taskiq.dagster_compat.storage import put_value
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import TASK_ID_TAG, TIMED_OUT_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

STATUS = DagsterRunStatus
ELSEWHERE = "some-worker-1"


def unknown(platform: Platform) -> str:
    return "11111111-2222-3333-4444-555555555555"


def finished(platform: Platform) -> str:
    run = platform.create("quick_job")
    platform.instance.report_run_failed(run)
    return run.run_id


def never_launched_by_us(platform: Platform) -> str:
    run = platform.create("quick_job")
    return run.run_id


def starting_not_claimed(platform: Platform) -> str:
    return platform.launch("quick_job")


def starting_claimed(platform: Platform) -> str:
    run_id = platform.launch("quick_job")
    claim(platform, run_id, alive=True)
    return run_id


def started(platform: Platform) -> str:
    run_id = starting_claimed(platform)
    report_started(platform, run_id)
    return run_id


def started_owner_dead(platform: Platform) -> str:
    run_id = platform.launch("quick_job")
    claim(platform, run_id, alive=False)
    report_started(platform, run_id)
    return run_id


def canceling(platform: Platform) -> str:
    run_id = started(platform)
    platform.instance.report_run_canceling(platform.run(run_id))
    return run_id


def claim(platform: Platform, run_id: str, *, alive: bool) -> None:
    claims = Claims(platform.instance, Heartbeats(platform.instance, 60, 5))
    assert claims.take(platform.run(run_id), ELSEWHERE, platform.task_id(run_id), "elsewhere", None)
    claims.heartbeats.beat(ELSEWHERE) if alive else claims.heartbeats.gone(ELSEWHERE)


def report_started(platform: Platform, run_id: str) -> None:
    event = DagsterEvent(DagsterEventType.RUN_START.value, "quick_job", message="")
    platform.instance.report_dagster_event(event, run_id)


@dataclass(frozen=True)
class Row:
    run_is: Callable[[Platform], str]
    returns: bool
    status: DagsterRunStatus | None
    says: str | None = None
    cancels_sent: int = 0
    canceling_events: int = 0


TABLE = [
    Row(unknown, returns=False, status=None),
    Row(finished, returns=False, status=STATUS.FAILURE),
    Row(never_launched_by_us, returns=False, status=STATUS.CANCELED, says=engine_events.TASK_ID_MISSING),
    Row(starting_not_claimed, returns=True, status=STATUS.CANCELED, canceling_events=1),
    Row(
        starting_claimed, returns=True, status=STATUS.CANCELING, says=engine_events.CANCELLATION_REQUESTED,
        cancels_sent=1, canceling_events=1,
    ),
    Row(
        started, returns=True, status=STATUS.CANCELING, says=engine_events.CANCELLATION_REQUESTED,
        cancels_sent=1, canceling_events=1,
    ),
    Row(
        canceling, returns=True, status=STATUS.CANCELING, says=engine_events.CANCELLATION_REQUESTED,
        cancels_sent=1, canceling_events=1,
    ),
    Row(
        started_owner_dead, returns=True, status=STATUS.CANCELING, says=engine_events.CANCELLATION_REQUESTED,
        cancels_sent=1, canceling_events=1,
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def empty_cancel_queue(platform: Platform) -> Iterator[None]:
    yield
    cancels(platform)


def cancels(platform: Platform, url: str | None = None) -> int:
    """How many cancel messages wait; takes them."""
    client = sqs_client(platform.endpoint_url)
    queue = (url or platform.queue_url) + "-cancels"
    count = 0
    while messages := client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages", []):
        for message in messages:
            client.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
            count += 1
    client.close()
    return count


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.run_is.__name__)
def test_terminate_a_run_that_is(platform: Platform, row: Row) -> None:
    run_id = row.run_is(platform)
    assert platform.launcher.terminate(run_id) is row.returns
    if row.status is None:
        assert platform.instance.get_run_by_id(run_id) is None
        return
    assert platform.status(run_id) is row.status, platform.story(run_id)
    assert cancels(platform) == row.cancels_sent
    assert Counter(platform.events(run_id))[DagsterEventType.RUN_CANCELING] == row.canceling_events
    if row.says is not None:
        assert any(row.says in line for line in platform.story(run_id))


def test_a_run_that_takes_too_long_says_that_monitoring_has_terminated_it(endpoint: str) -> None:
    with open_platform(endpoint, extra={"run_monitoring": {"enabled": True}}) as platform:
        run_id = started(platform)
        platform.instance.add_run_tags(run_id, {MAX_RUNTIME_SECONDS_TAG: "0.001"})
        record = platform.instance.get_run_record_by_id(run_id)
        assert record is not None
        check_run_timeout(platform.instance, record, logging.getLogger(__name__), 0)
        story = platform.story(run_id)
        why = "run timed out: longer than its limit of 0.001 s (dagster/max_runtime)"
        asked = f"Requested Taskiq task cancellation. By Dagster's run monitoring: {why}"
        assert any(asked in line for line in story), story
        assert platform.run(run_id).tags[TIMED_OUT_TAG] == why
        assert platform.status(run_id) is STATUS.FAILURE, "as Dagster has it"


def test_a_run_whose_worker_is_dead_says_what_its_cancellation_waits_for(platform: Platform) -> None:
    run_id = started_owner_dead(platform)
    assert platform.launcher.terminate(run_id)
    assert f"its worker {ELSEWHERE} is dead; another worker finishes the cancellation" in platform.story(run_id)[-1]


def test_with_cancellation_disabled_terminate_says_so_and_does_nothing(platform: Platform) -> None:
    run_id = started(platform)
    launcher = TaskiqRunLauncher(
        platform.queue_url, "us-east-1", platform.endpoint_url, config_source={"enable_cancellation": False}
    )
    launcher.register_instance(platform.instance)
    assert launcher.terminate(run_id) is False
    assert platform.status(run_id) is STATUS.STARTED
    assert "Cancellation is disabled" in platform.story(run_id)[-1]


def test_with_an_unreachable_queue_the_status_does_the_work(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        run_id = started(platform)
        launcher = TaskiqRunLauncher(
            queue_url=platform.queue_url, region_name="us-east-1", endpoint_url="http://127.0.0.1:9"
        )
        launcher.register_instance(platform.instance)
        assert launcher.terminate(run_id) is True
        launcher.dispose()
        assert platform.status(run_id) is STATUS.CANCELING
        assert "could not be sent" in platform.story(run_id)[-1]


def test_a_worker_that_cannot_be_looked_for_is_told(platform: Platform) -> None:
    run_id = starting_not_claimed(platform)
    put_value(platform.instance, f"dagster-taskiq/claim/{run_id}", "no claim of this version")
    before = platform.waiting("-cancels")
    assert platform.launcher.terminate(run_id)
    assert platform.status(run_id) is STATUS.CANCELING
    assert platform.waiting("-cancels") == before + 1


def test_a_run_that_ended_while_terminate_looked_keeps_its_state(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run succeeds between `terminate` reading it and writing RUN_CANCELING."""
    run_id = started(platform)
    report = platform.instance.report_run_canceling

    def late(*args: object, **kwargs: object) -> None:
        success = DagsterEvent(DagsterEventType.RUN_SUCCESS.value, "quick_job", message="")
        platform.instance.report_dagster_event(success, run_id)
        report(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(platform.instance, "report_run_canceling", late)
    assert platform.launcher.terminate(run_id) is False
    assert platform.status(run_id) is STATUS.SUCCESS


@pytest.mark.parametrize("writes_it", [True, False], ids=["and_writes_the_status", "and_dies"])
def test_a_worker_that_has_written_canceled_but_not_yet_its_status(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, writes_it: bool
) -> None:
    """Dagster writes an event first and then the status of the run; `terminate` may look in between."""
    instance = platform.instance
    run_id = started(platform)
    report, look, write_status = (
        instance.report_run_canceling,
        instance.get_run_by_id,
        instance.run_storage.handle_run_event,
    )
    looks = 0

    def then_a_worker_reports_canceled(*args: Any, **kwargs: Any) -> None:
        report(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(instance.run_storage, "handle_run_event", lambda *what: None)
            platform.report(platform.run(run_id), DagsterEventType.RUN_CANCELED)
        monkeypatch.setattr(instance, "get_run_by_id", looking)

    def looking(run_id: str) -> DagsterRun | None:
        nonlocal looks
        looks += 1
        if writes_it and looks == 2:  # after the look that finds it CANCELING
            write_status(run_id, DagsterEvent(DagsterEventType.RUN_CANCELED.value, "quick_job", message=""))
        return look(run_id)

    monkeypatch.setattr(instance, "report_run_canceling", then_a_worker_reports_canceled)
    assert platform.launcher.terminate(run_id) is True
    assert platform.status(run_id) is STATUS.CANCELED
    kinds = Counter(platform.events(run_id))
    assert kinds[DagsterEventType.RUN_CANCELED] == 1, platform.story(run_id)
    assert platform.stages(run_id).count(Stage.REQUESTED) == 1, platform.story(run_id)


def test_launching_tags_the_run_and_needs_nothing_but_its_record(platform: Platform) -> None:
    run = platform.create("quick_job")
    launched = platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    assert launched.run_id == run.run_id
    assert platform.run(run.run_id).tags[TASK_ID_TAG]
    assert platform.status(run.run_id) is STATUS.STARTING


def test_a_tag_for_celery_is_said_to_have_no_effect(platform: Platform) -> None:
    run_id = platform.launch("quick_job", tags={"dagster-celery/run_priority": "3", "team": "blue"})
    (entry,) = [entry for entry in platform.instance.all_logs(run_id) if "dagster-celery" in str(entry.dagster_event)]
    assert entry.level == logging.WARNING
    assert entry.get_dagster_event().message == (
        "Without effect, because they are dagster-celery's: dagster-celery/run_priority=3 of the run. Instead: set"
        " dagster/priority on the run: those with a greater number leave Dagster's queue first"
    )


def test_health_is_never_unknown(platform: Platform) -> None:
    health = platform.launcher.check_run_worker_health
    expected = {
        starting_not_claimed: "RUNNING",
        started: "RUNNING",
        started_owner_dead: "NOT_FOUND",
        finished: "FAILED",
    }
    for make, status in expected.items():
        assert health(platform.run(make(platform))).status.value == status, make.__name__


def test_debug_info_names_task_queue_and_worker(platform: Platform) -> None:
    run = platform.run(started(platform))
    told = platform.launcher.get_run_worker_debug_info(run)
    assert told is not None
    for part in (run.tags[TASK_ID_TAG], platform.queue_url, ELSEWHERE, "alive"):
        assert part in told


@pytest.mark.parametrize(
    ("make", "says"),
    [(starting_not_claimed, "worker: none yet; waiting for a worker"), (started_owner_dead, "waiting for another one")],
)
def test_debug_info_says_what_a_run_waits_for(platform: Platform, make: Callable[[Platform], str], says: str) -> None:
    assert says in (platform.launcher.get_run_worker_debug_info(platform.run(make(platform))) or "")


def test_settings_of_the_tests_are_those_of_the_launcher(platform: Platform) -> None:
    assert platform.launcher.settings.grace_seconds == SNAPPY["grace_seconds"]
