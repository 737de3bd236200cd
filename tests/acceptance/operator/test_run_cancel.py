"""`run cancel` with several ids: each has its outcome, and what is wrong with one keeps no other from being stopped."""

import pytest
from dagster import DagsterRunStatus
from tests.acceptance.cancel.test_truth_table import finished, started
from tests.acceptance.conftest import open_platform
from tests.support.platform import Platform

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

UNKNOWN = "11111111-2222-3333-4444-555555555555"
STATUS = DagsterRunStatus


def test_several_at_once(platform: Platform) -> None:
    """By their ids, and by what `worker list` prints of them."""
    one, other, over = started(platform), started(platform), finished(platform)
    ended = platform.command("run", "cancel", one[:8], UNKNOWN, over, "1234567", other)
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == [
        f"{one}: asked to stop, it is CANCELING",
        f"{over}: nothing to stop, it is FAILURE",
        f"{other}: asked to stop, it is CANCELING",
    ]
    wrong = [line for line in ended.stderr.splitlines() if "there is no run" in line]
    assert [line.partition(":")[0] for line in wrong] == [UNKNOWN, "1234567"], ended.stderr
    assert {platform.status(one), platform.status(other)} == {STATUS.CANCELING}
    again = platform.command("run", "cancel", one, other, one)
    assert again.returncode == 0, again
    assert len(again.stdout.splitlines()) == 2, again.stdout


def test_a_beginning_that_several_runs_have(platform: Platform) -> None:
    ids = [f"7e57ab1e-000{number}-4000-8000-000000000000" for number in (1, 2)]
    for run_id in ids:
        run = platform.create("quick_job")
        platform.instance.add_run(run._replace(run_id=run_id))  # a NamedTuple's own way
    ended = platform.command("run", "cancel", "7e57ab1e", ids[0])
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("7e57ab1e: ")]
    assert "several runs begin with 7e57ab1e" in line
    assert all(run_id in line for run_id in ids)
    assert platform.status(ids[1]) is STATUS.NOT_STARTED, "what is not clear is not stopped"


def test_the_lines_of_a_command_are_not_mixed_with_metrics(endpoint: str) -> None:
    """In a container of ECS, too: metrics are written by workers and by Dagster's daemon."""
    with open_platform(endpoint, source={"metrics": "emf"}) as platform:
        run_id = started(platform)
        ended = platform.command("run", "cancel", run_id)
        assert ended.stdout.startswith(f"{run_id}: "), ended
        assert len(ended.stdout.splitlines()) == 1, ended


def test_what_could_not_be_sent_is_not_asked_to_stop(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        run_id = started(platform)
        dagster_yaml = platform.home / "dagster.yaml"
        dagster_yaml.write_text(dagster_yaml.read_text().replace(endpoint, "http://127.0.0.1:9"))
        ended = platform.command("run", "cancel", run_id)
        assert ended.returncode == 0, ended
        assert ended.stdout == (
            f"{run_id}: the cancel message could not be sent; its worker learns it from the database within 1 s,"
            " it is CANCELING\n"
        )
