"""Which route a run goes to: the table of what decides, and what is written down of it."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun, JobDefinition, job, op
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.routing import Routing, code_location_of, route_of_run, served_routes
from dagster_taskiq.storage.tags import (
    CELERY_QUEUE_TAG,
    GRACE_SECONDS_TAG,
    QUEUE_TAG,
    ROUTE_TAG,
    RUN_ID_TAG,
    TIMEOUT_TAG,
    tag_launched_run,
)

RULES = [
    {"route": "ml", "code_location": "ml*"},
    {"route": "train", "job": "train_*"},
    {"route": "big", "tag": "size=big"},
    {"route": "default", "tag": "size"},
]


@op
def nothing() -> None: ...


def job_of(name: str, **options: Any) -> JobDefinition:
    @job(name=name, **options)
    def one() -> None:
        nothing()

    return one


def settings(**source: Any) -> Settings:
    return Settings.from_config(
        {"queue_url": "http://localhost/1/q", "region_name": "us-east-1", "config_source": source}
    )


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as one:
        yield one


def run_of(
    instance: DagsterInstance, one: JobDefinition, tags: Mapping[str, str] | None = None, location: str | None = None
) -> DagsterRun:
    origin = None
    if location is not None:
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(location), "__repository__")
        origin = RemoteJobOrigin(repository, one.name)
    return instance.create_run_for_job(one, tags=tags, remote_job_origin=origin)


PLAIN = job_of("plain")
TRAIN = job_of("train_cats", tags={"size": "big"})
APART = job_of("apart", tags={QUEUE_TAG: "of-job", "size": "big"}, run_tags={"team": "a"})
APART_CELERY = job_of("apart_celery", tags={CELERY_QUEUE_TAG: "of-celery"}, run_tags={})
APART_RULED = job_of("apart_ruled", tags={"size": "big"}, run_tags={})
TABLE: Mapping[str, tuple[JobDefinition, Mapping[str, str], str | None, str]] = {
    "nothing says anything": (PLAIN, {}, None, "default"),
    "its own tag": (PLAIN, {QUEUE_TAG: "gpu"}, "ml", "gpu"),
    "ours wins over celery's": (PLAIN, {QUEUE_TAG: "gpu", CELERY_QUEUE_TAG: "fast"}, None, "gpu"),
    "celery's": (PLAIN, {CELERY_QUEUE_TAG: "fast"}, None, "fast"),
    "its own tag for the unnamed route wins over a rule": (TRAIN, {QUEUE_TAG: "default"}, "ml", "default"),
    "its own celery tag wins over its job's": (APART, {CELERY_QUEUE_TAG: "fast"}, None, "fast"),
    "its job's, which has run tags of its own": (APART, {}, "ml", "of-job"),
    "its job's for celery": (APART_CELERY, {}, "ml", "of-celery"),
    "a rule by code location": (PLAIN, {}, "ml_models", "ml"),
    "a rule by code location, that is known by a tag": (PLAIN, {".dagster/repository": "r@ml"}, None, "ml"),
    "a rule by job; the first that matches": (TRAIN, {}, "other", "train"),
    "a rule by tag and value": (PLAIN, {"size": "big"}, None, "big"),
    "a rule by tag": (PLAIN, {"size": "small"}, None, "default"),
    "a rule by a tag of the job that is not on the run": (APART_RULED, {}, None, "big"),
    "the tag of a copied run says nothing": (PLAIN, {ROUTE_TAG: "old"}, None, "default"),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_decides(case: str, instance: DagsterInstance) -> None:
    one, tags, location, route = TABLE[case]
    assert Routing(instance, settings(routes=RULES)).route_for(run_of(instance, one, tags, location)) == route


@pytest.mark.parametrize("tag", [QUEUE_TAG, CELERY_QUEUE_TAG])
@pytest.mark.parametrize("name", ["GPU", "", "a b", "gpu-steps", "x" * 31])
def test_a_tag_that_names_no_route_says_the_rule(instance: DagsterInstance, tag: str, name: str) -> None:
    routing = Routing(instance, settings())
    with pytest.raises(SettingsError, match=f"tag {tag} of the run: '{name}' is not the name of a route: 1 to 30"):
        routing.route_for(run_of(instance, PLAIN, {tag: name}))
    with pytest.raises(SettingsError, match=f"tag {tag} of job wrong: '{name}'"):
        routing.route_for(run_of(instance, job_of("wrong", tags={tag: name}, run_tags={})))


LIMITED = job_of("limited", tags={TIMEOUT_TAG: "60", GRACE_SECONDS_TAG: "5", "size": "big"}, run_tags={"team": "a"})


def test_what_a_job_says_of_its_runs_is_written_to_them_where_dagster_does_not(instance: DagsterInstance) -> None:
    """Not what is not ours; and what the run says itself is stronger."""
    run = run_of(instance, LIMITED, {"team": "a", GRACE_SECONDS_TAG: "9"})
    wanted = {"team": "a", TIMEOUT_TAG: "60", GRACE_SECONDS_TAG: "9"}
    assert Routing(instance, settings()).with_tags_of_job(run).tags == wanted
    (stored,) = instance.get_runs()
    assert stored.tags == wanted
    assert Routing(instance, settings()).with_tags_of_job(stored) is stored, "nothing is written twice"


def test_the_job_of_many_runs_is_read_once(instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    routing = Routing(instance, settings())
    assert routing.route_for(run_of(instance, APART)) == "of-job"
    monkeypatch.delattr(DagsterInstance, "get_job_snapshot")
    assert routing.route_for(run_of(instance, APART)) == "of-job"


def test_what_a_run_says_of_its_route(instance: DagsterInstance) -> None:
    run = run_of(instance, PLAIN)
    assert route_of_run(run) == "default"
    tag_launched_run(instance, run, "1234", {ROUTE_TAG: "gpu"})
    launched = instance.get_run_by_id(run.run_id)
    assert launched is not None
    assert route_of_run(launched) == "gpu"
    assert route_of_run(launched.with_tags({**launched.tags, RUN_ID_TAG: "of another"})) == "default"
    assert route_of_run(launched.with_tags({**launched.tags, ROUTE_TAG: "../other"})) == "default"


def test_the_unnamed_route_is_written_down_where_others_are_in_use(instance: DagsterInstance) -> None:
    run = run_of(instance, PLAIN)
    assert Routing(instance, settings()).tags_for(run, "gpu") == {ROUTE_TAG: "gpu"}
    assert Routing(instance, settings()).tags_for(run, "default") == {}
    assert Routing(instance, settings(routes=RULES)).tags_for(run, "default") == {ROUTE_TAG: "default"}
    heartbeats = Heartbeats.of_runs(instance, settings())
    heartbeats.beat("older", {})
    heartbeats.beat("w1", {"routes": ["default"]})
    assert Routing(instance, settings()).tags_for(run, "default") == {}
    heartbeats.beat("w2", {"routes": ["default", "gpu"]})
    assert Routing(instance, settings()).tags_for(run, "default") == {ROUTE_TAG: "default"}
    assert Routing(instance, settings(routes=RULES)).known_routes() == ("default", "big", "gpu", "ml", "train")
    # Decided anew: what was decided before must not stay.
    again = run.with_tags({**run.tags, ROUTE_TAG: "gpu", RUN_ID_TAG: run.run_id})
    with DagsterInstance.ephemeral() as empty:
        assert Routing(empty, settings()).tags_for(again, "default") == {ROUTE_TAG: "default"}


def test_the_routes_of_a_worker() -> None:
    assert served_routes({}) == ("default",)
    assert served_routes({"routes": ["gpu", "default"]}) == ("gpu", "default")
    assert served_routes({"routes": ["gpu", 7, "../x"]}) == ("gpu",)
    assert served_routes({"routes": "gpu"}) == ("default",)


def test_the_code_location_of_a_run(instance: DagsterInstance) -> None:
    assert code_location_of(run_of(instance, PLAIN)) is None
    assert code_location_of(run_of(instance, PLAIN, {".dagster/repository": "repo@there"})) == "there"
    assert code_location_of(run_of(instance, PLAIN, {".dagster/repository": "repo@there"}, "here")) == "here"
