"""A run that has ended stays ended, whatever is written late, and ends once: sensors of run statuses see each end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, job
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from dagster_taskiq import cancel_runs
from dagster_taskiq.dagster_compat.many_runs import move_runs, set_status
from dagster_taskiq.storage.status_repair import repair_late_canceling, restore, terminal_events
from dagster_taskiq.storage.tags import tag_launched_run

KIND, STATUS = DagsterEventType, DagsterRunStatus
LAUNCHER = """
run_launcher:
  module: dagster_taskiq.launcher
  class: TaskiqRunLauncher
  config: {queue_url: "http://127.0.0.1:9/1/q", region_name: us-east-1}
run_coordinator:
  module: dagster_taskiq.coordinator
  class: TaskiqRunCoordinator
"""


@job
def nothing() -> None: ...


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text(LAUNCHER)
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def happens(instance: DagsterInstance, run: DagsterRun, *kinds: DagsterEventType) -> None:
    for kind in kinds:
        instance.report_dagster_event(DagsterEvent(kind.value, run.job_name, message=""), run.run_id)


def status(instance: DagsterInstance, run: DagsterRun) -> DagsterRunStatus:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


@pytest.mark.parametrize("is_sent", [False, True], ids=["before it has a task", "with its task"])
def test_dagsters_daemon_starts_a_run_in_the_moment_in_which_it_is_withdrawn(
    instance: DagsterInstance, is_sent: bool
) -> None:
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("jobs"), "__repository__")
    run = instance.create_run_for_job(
        nothing, status=STATUS.QUEUED, remote_job_origin=RemoteJobOrigin(repository, nothing.name)
    )
    happens(instance, run, KIND.RUN_ENQUEUED)
    assert cancel_runs(instance, [run.run_id], reason="wrong input", requested_by="ada").cancelled == (run.run_id,)
    happens(instance, run, KIND.RUN_STARTING)  # the daemon had read QUEUED before
    if is_sent:
        tag_launched_run(instance, run, "1234")
    assert status(instance, run) is STATUS.STARTING
    cancel_runs(instance, [run.run_id], requested_by="ada")
    assert status(instance, run) is STATUS.CANCELED
    assert terminal_events(instance, run.run_id) == [KIND.RUN_CANCELED]


@pytest.mark.parametrize(
    ("ends", "late", "final"),
    [
        ([KIND.RUN_SUCCESS], KIND.RUN_CANCELING, STATUS.SUCCESS),
        ([KIND.RUN_FAILURE], KIND.RUN_CANCELING, STATUS.FAILURE),
        ([KIND.RUN_CANCELED], KIND.RUN_START, STATUS.CANCELED),
        ([KIND.RUN_SUCCESS], KIND.RUN_FAILURE, STATUS.SUCCESS),
        ([KIND.RUN_CANCELED], KIND.RUN_SUCCESS, STATUS.CANCELED),
        ([KIND.RUN_FAILURE], KIND.RUN_CANCELED, STATUS.CANCELED),
    ],
)
def test_it_gets_its_status_back_without_another_end(
    instance: DagsterInstance, ends: list[DagsterEventType], late: DagsterEventType, final: DagsterRunStatus
) -> None:
    run = instance.create_run_for_job(nothing)
    happens(instance, run, KIND.RUN_START, *ends, late)
    history = terminal_events(instance, run.run_id)
    assert restore(instance, run, history) is final
    assert status(instance, run) is final
    assert terminal_events(instance, run.run_id) == history
    (record,) = instance.get_run_records()
    assert record.end_time is not None


def test_a_canceling_that_came_too_late(instance: DagsterInstance) -> None:
    run = instance.create_run_for_job(nothing)
    happens(instance, run, KIND.RUN_START, KIND.RUN_SUCCESS, KIND.RUN_CANCELING)
    assert repair_late_canceling(instance, run.run_id) is STATUS.SUCCESS
    assert status(instance, run) is STATUS.SUCCESS
    assert repair_late_canceling(instance, run.run_id) is None


def test_a_status_is_set_once_and_only_when_it_is_another(instance: DagsterInstance) -> None:
    run = instance.create_run_for_job(nothing, status=STATUS.STARTED)
    assert set_status(instance, run.run_id, STATUS.CANCELED) is STATUS.STARTED
    assert set_status(instance, run.run_id, STATUS.CANCELED) is None
    assert set_status(instance, "no such run", STATUS.CANCELED) is None


def test_a_status_that_others_change_all_the_time_is_not_waited_for_without_end(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = instance.create_run_for_job(nothing, status=STATUS.STARTED)
    read, looks = instance.get_run_by_id, []

    def others_are_quicker(run_id: str) -> DagsterRun | None:
        found = read(run_id)
        assert found is not None
        looks.append(found.status)
        other = STATUS.STARTED if found.status is STATUS.CANCELING else STATUS.CANCELING
        move_runs(instance, [found], found.status, other)
        return found

    monkeypatch.setattr(instance, "get_run_by_id", others_are_quicker)
    with pytest.raises(TimeoutError, match="all the time"):
        set_status(instance, run.run_id, STATUS.CANCELED)
    assert {*looks} == {STATUS.STARTED, STATUS.CANCELING}
