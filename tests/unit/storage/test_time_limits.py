"""Which time limit of a run counts, and how a limit is read and said."""

from collections.abc import Iterator
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test, instance_for_test

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.storage.queue_ttl import waited_too_long
from dagster_taskiq.storage.status_repair import terminal_events
from dagster_taskiq.storage.tags import QUEUE_TTL_TAG, TIMED_OUT_TAG, TIMEOUT_TAG, own_tags, was_stopped
from dagster_taskiq.storage.time_limits import TimeLimit, limit_of_run, mark_timed_out, seconds_from_tag

DAGSTERS, OLD, SETTING = "dagster/max_runtime", "dagster/max_runtime_seconds", "max_runtime_seconds of run_monitoring"
STATUS = DagsterRunStatus
WHY = "run timed out: longer than its limit of 5 s (dagster-taskiq/timeout_seconds)"


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture(scope="module")
def monitored() -> Iterator[DagsterInstance]:
    monitoring = {"enabled": True, "max_runtime_seconds": 100}
    launcher = {"module": "dagster._core.test_utils", "class": "MockedRunLauncher"}
    with instance_for_test(overrides={"run_monitoring": monitoring, "run_launcher": launcher}) as instance:
        yield instance


@pytest.mark.parametrize(
    ("tags", "seconds", "where"),
    [
        ({}, None, None),
        ({TIMEOUT_TAG: "5"}, 5.0, TIMEOUT_TAG),
        ({TIMEOUT_TAG: "0.5"}, 0.5, TIMEOUT_TAG),
        ({DAGSTERS: "7"}, 7.0, DAGSTERS),
        ({OLD: "7"}, 7.0, OLD),
        ({TIMEOUT_TAG: "5", DAGSTERS: "7"}, 5.0, TIMEOUT_TAG),
        ({TIMEOUT_TAG: "9", DAGSTERS: "7"}, 7.0, DAGSTERS),
        ({TIMEOUT_TAG: "soon", DAGSTERS: "7"}, 7.0, DAGSTERS),
        ({TIMEOUT_TAG: "soon"}, None, None),
        ({DAGSTERS: "soon"}, None, None),
        ({DAGSTERS: "0"}, None, None),
        ({DAGSTERS: "nan"}, None, None),
        ({DAGSTERS: "1e308"}, None, None),
    ],
)
def test_the_shortest_counts(
    instance: DagsterInstance, tags: dict[str, str], seconds: float | None, where: str | None
) -> None:
    limit, ignored = limit_of_run(instance, create_run_for_test(instance, tags=tags))
    assert limit == (TimeLimit(seconds, where) if seconds is not None and where is not None else None)
    assert (ignored is not None) is (tags.get(TIMEOUT_TAG) == "soon")


@pytest.mark.parametrize(
    ("tags", "seconds", "where"),
    [({}, 100.0, SETTING), ({DAGSTERS: "300"}, 300.0, DAGSTERS), ({TIMEOUT_TAG: "300"}, 100.0, SETTING)],
)
def test_the_setting_of_run_monitoring_counts_unless_dagsters_tag_is_there(
    monitored: DagsterInstance, tags: dict[str, str], seconds: float, where: str
) -> None:
    assert limit_of_run(monitored, create_run_for_test(monitored, tags=tags))[0] == TimeLimit(seconds, where)


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "nan", "-inf", "0.0001", "5 s"])
def test_what_is_no_sensible_number_of_seconds(value: str) -> None:
    with pytest.raises(SettingsError, match="must be a number of seconds greater than 0, not"):
        seconds_from_tag(value)


@pytest.mark.parametrize("value", ["inf", "1e308", "315360001"])
def test_what_is_too_long_to_be_meant(value: str) -> None:
    with pytest.raises(SettingsError, match=f"must be ten years at most .315360000 seconds., not '{value}'"):
        seconds_from_tag(value)


@pytest.mark.parametrize(
    ("seconds", "said"), [(5.0, "5 s"), (0.25, "0.25 s"), (86_400.0, "86400 s"), (1e6, "1000000 s")]
)
def test_it_is_said_as_it_was_written(seconds: float, said: str) -> None:
    assert TimeLimit(seconds, "x").exceeded("step") == f"step timed out: longer than its limit of {said} (x)"


@pytest.mark.parametrize(
    ("status", "marked"),
    [(STATUS.STARTED, True), (STATUS.CANCELING, False), (STATUS.SUCCESS, False), (STATUS.CANCELED, False)],
)
def test_a_run_that_is_over_or_being_stopped_is_not_marked(
    instance: DagsterInstance, status: DagsterRunStatus, marked: bool
) -> None:
    run = create_run_for_test(instance, status=status)
    assert mark_timed_out(instance, run.run_id, WHY) is marked
    now = instance.get_run_by_id(run.run_id)
    assert now is not None
    assert now.status is (STATUS.CANCELING if marked else status)
    assert own_tags(now).get(TIMED_OUT_TAG) == (WHY if marked else None)


def test_one_that_ends_at_this_moment_stays_as_it_ended(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run_for_test(instance, status=STATUS.STARTED)
    report = instance.report_run_canceling

    def late(*arguments: Any) -> None:
        instance.report_run_failed(run)
        report(*arguments)

    monkeypatch.setattr(instance, "report_run_canceling", late)
    assert not mark_timed_out(instance, run.run_id, WHY)
    now = instance.get_run_by_id(run.run_id)
    assert now is not None
    assert now.status is STATUS.FAILURE
    assert len(terminal_events(instance, run.run_id)) == 1
    assert not was_stopped(now), "nothing is cleaned up after a run that has failed by itself"


@pytest.mark.parametrize(("ttl", "too_long"), [("0.001", True), ("600", False), ("soon", False), (None, False)])
def test_how_long_a_run_may_wait(instance: DagsterInstance, ttl: str | None, too_long: bool) -> None:
    run = create_run_for_test(instance, tags={QUEUE_TTL_TAG: ttl} if ttl is not None else {})
    assert (waited_too_long(instance, run) is not None) is too_long
