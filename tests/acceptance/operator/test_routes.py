"""Runs go to the queue of their route, and so does everything that is said to them; an unknown route is an error."""

from collections.abc import Iterator, Mapping

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.launcher import LaunchRunContext, ResumeRunContext
from tests.acceptance.conftest import open_platform
from tests.support.platform import Platform
from tests.support.proxy import sqs_proxy

from dagster_taskiq import cancel_runs
from dagster_taskiq.errors import SettingsError, UnknownRoute
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.storage.tags import CELERY_QUEUE_TAG, QUEUE_TAG, ROUTE_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(120)]

RULES = [{"route": "big", "job": "sleepy_*"}, {"route": "far", "tag": "place=far"}]


@pytest.fixture(scope="module")
def platform(endpoint: str) -> Iterator[Platform]:
    """With the routes gpu and big, and no worker."""
    with open_platform(endpoint, source={"routes": RULES}) as one:
        one.create_route("gpu")
        one.create_route("big")
        yield one


def counts(platform: Platform, suffix: str = "") -> dict[str, int]:
    return {route: platform.waiting(f"{route}{suffix}") for route in ("", "-gpu", "-big")}


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {route: after[route] - before[route] for route in after if after[route] != before[route]}


@pytest.mark.parametrize(
    ("job", "tags", "route"),
    [
        ("quick_job", {QUEUE_TAG: "gpu"}, "gpu"),
        ("quick_job", {CELERY_QUEUE_TAG: "big"}, "big"),
        ("sleepy_job", {}, "big"),
        ("sleepy_job", {QUEUE_TAG: "default"}, "default"),
        ("quick_job", {}, "default"),
    ],
)
def test_a_run_waits_in_the_queue_of_its_route(
    platform: Platform, job: str, tags: Mapping[str, str], route: str
) -> None:
    before = counts(platform)
    run_id = platform.launch(job, tags=tags)
    suffix = "" if route == "default" else f"-{route}"
    assert grown(before, counts(platform)) == {suffix: 1}
    run, queue = platform.run(run_id), f"{queue_name(platform.queue_url)}{suffix}"
    assert run.tags[ROUTE_TAG] == route
    assert any(f"Submitted to queue {queue} as task" in line for line in platform.story(run_id))
    assert f"on queue {platform.queue_url}{suffix};" in str(platform.launcher.get_run_worker_debug_info(run))


def test_a_run_of_an_unknown_route_fails_and_says_which_routes_there_are(platform: Platform) -> None:
    run = platform.create("quick_job", {"place": "far"})
    with pytest.raises(UnknownRoute) as raised:
        platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    said = (
        "route 'far' does not exist; routes that exist: default, big, gpu;"
        " create it with `dagster-taskiq queue create --route far`"
    )
    assert str(raised.value) == said
    assert platform.status(run.run_id) is DagsterRunStatus.FAILURE
    assert any(said in line for line in platform.story(run.run_id)), platform.story(run.run_id)


def test_who_may_not_list_queues_says_what_is_known_of_routes(endpoint: str) -> None:
    rules = [{"route": "big", "job": "sleepy_*"}]
    with sqs_proxy(endpoint) as proxy, open_platform(proxy.url, source={"routes": rules}) as platform:
        proxy.fail_with(403, action="ListQueues")
        run = platform.create("quick_job", {QUEUE_TAG: "far"})
        with pytest.raises(UnknownRoute, match="route 'far' does not exist; routes that exist: default, big; create"):
            platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]


def test_a_tag_that_names_no_route_fails_the_run_with_the_rule(platform: Platform) -> None:
    run = platform.create("quick_job", {QUEUE_TAG: "GPU 1"})
    with pytest.raises(SettingsError, match="tag dagster-taskiq/queue of the run: 'GPU 1' is not the name of a route"):
        platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    assert platform.status(run.run_id) is DagsterRunStatus.FAILURE


@pytest.mark.parametrize("route", ["GPU 1", "nowhere"])
def test_a_run_that_was_terminated_at_its_launch_does_not_fail_because_of_its_route(
    platform: Platform, route: str
) -> None:
    run = platform.create("quick_job", {QUEUE_TAG: route})
    platform.instance.report_run_canceled(run)
    platform.launcher.launch_run(LaunchRunContext(run, workspace=None))
    assert platform.status(run.run_id) is DagsterRunStatus.CANCELED


def test_terminate_goes_to_the_cancel_queue_of_the_run_s_route(platform: Platform) -> None:
    run_id = platform.launch("quick_job", tags={QUEUE_TAG: "gpu"})
    platform.report(platform.run(run_id), DagsterEventType.RUN_START)
    before = counts(platform, "-cancels")
    assert platform.launcher.terminate(run_id)
    assert grown(before, counts(platform, "-cancels")) == {"-gpu": 1}


def test_of_many_runs_each_is_told_on_its_route(platform: Platform) -> None:
    routes = ["gpu", "default", "gpu", "big"]
    run_ids = [platform.launch("quick_job", tags={QUEUE_TAG: route}) for route in routes]
    for run_id in run_ids:
        platform.report(platform.run(run_id), DagsterEventType.RUN_START)
    before = counts(platform, "-cancels")
    report = cancel_runs(platform.instance, run_ids)
    assert sorted(report.told) == sorted(run_ids)
    assert not report.marked
    assert grown(before, counts(platform, "-cancels")) == {"": 1, "-gpu": 2, "-big": 1}


def test_a_run_is_resumed_on_the_route_that_it_had(platform: Platform) -> None:
    run_id = platform.launch("sleepy_job")
    platform.report(platform.run(run_id), DagsterEventType.RUN_START)
    platform.instance.add_run_tags(run_id, {QUEUE_TAG: "gpu"})
    before = counts(platform)
    platform.launcher.resume_run(ResumeRunContext(platform.run(run_id), workspace=None, resume_attempt_number=1))
    assert grown(before, counts(platform)) == {"-big": 1}
    assert platform.run(run_id).tags[ROUTE_TAG] == "big"


def test_a_run_that_is_launched_again_goes_to_where_its_tags_say_now(platform: Platform) -> None:
    """What an earlier launch, or the run that its tags were copied from, has decided does not count."""
    other = platform.run(platform.launch("quick_job", tags={QUEUE_TAG: "gpu"}))
    copied = {name: value for name, value in other.tags.items() if name != QUEUE_TAG}
    run_id = platform.launch("quick_job", tags=copied)
    assert platform.run(run_id).tags[ROUTE_TAG] == "default"


def test_a_second_fleet_takes_two_commands(endpoint: str) -> None:
    with open_platform(endpoint) as platform:
        platform.create_route("gpu")
        wrong = platform.command("queue", "create", "--route", "Far")
        assert wrong.returncode == 1
        assert "Error: --route: 'Far' is not the name of a route: 1 to 30 lower-case letters" in wrong.stderr
        created = platform.command("queue", "create", "--route", "large,gpu", "--route", "cpu")
        assert created.returncode == 0, created
        assert (created.stdout.count(": created"), created.stdout.count(": exists")) == (6, 3), created.stdout
        with platform.worker("-n", "l", "-q", "large") as worker:
            run_id = platform.launch("quick_job", tags={QUEUE_TAG: "large"})
            assert platform.finished(run_id) is DagsterRunStatus.SUCCESS, worker.log()
