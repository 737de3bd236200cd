"""A run that is ended by force while its process builds its plan: after Dagster's last look, before RUN_START."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from tests.acceptance.conftest import open_platform
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import Stage

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

STATUS = DagsterRunStatus


@pytest.fixture(scope="module")
def blind(endpoint: str) -> Iterator[Platform]:
    """Its worker looks at the database every five minutes only, so that nothing but the run's process can notice."""
    rarely = {"status_poll_seconds": 300, "cancel_ttl": 600}
    with open_platform(endpoint, source=rarely) as platform, platform.worker("-n", "blind"):
        yield platform


def forced_end(platform: Platform, run_id: str) -> None:
    platform.instance.report_run_canceled(platform.run(run_id))


def start_timeout(platform: Platform, run_id: str) -> None:
    platform.instance.report_run_failed(platform.run(run_id))


def only_marked(platform: Platform, run_id: str) -> None:
    platform.instance.report_run_canceling(platform.run(run_id))


@pytest.mark.parametrize(
    ("end", "status"),
    [(forced_end, STATUS.CANCELED), (start_timeout, STATUS.FAILURE), (only_marked, STATUS.CANCELED)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_was_ended_while_it_was_planned_never_starts(
    blind: Platform, end: Callable[[Platform, str], None], status: DagsterRunStatus
) -> None:
    run = blind.create("planned_slowly_job")
    made = blind.mark_counts(run.run_id)["planning"]
    hold = Path(f"{run.tags['marks']}.hold")
    hold.touch()
    blind.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    wait_until(
        lambda: blind.mark_counts(run.run_id)["planning"] > made,
        "its process is planning",
        seen=lambda: blind.story(run.run_id),
    )
    end(blind, run.run_id)
    hold.unlink()
    assert blind.finished(run.run_id) is status
    wait_until(lambda: not blind.processes(run.run_id), "its process is gone", seen=lambda: blind.story(run.run_id))
    wait_until(lambda: blind.waiting() == 0, "its message is settled", seen=lambda: blind.story(run.run_id))
    story = blind.story(run.run_id)
    assert blind.status(run.run_id) is status, story
    assert DagsterEventType.RUN_START not in blind.events(run.run_id), story
    assert blind.mark_counts(run.run_id)["started"] == 0, story
    assert Stage.MENDED not in blind.stages(run.run_id), "nothing had to be restored"
