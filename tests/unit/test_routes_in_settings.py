"""The settings about routes, and the names of their queues."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq import queue_names
from dagster_taskiq._route_rules import RouteRule, first_match
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.queue_names import is_route, route_queue_url
from dagster_taskiq.settings import Settings

URL = "https://sqs.us-east-1.amazonaws.com/1/work"


def settings(**source: object) -> Settings:
    return Settings.from_config({"queue_url": URL, "region_name": "us-east-1", "config_source": source}, environ={})


def test_a_route_has_three_queues_of_its_own() -> None:
    gpu = settings().of_route("gpu")
    assert (gpu.queue_url, gpu.steps_queue_url, gpu.cancel_queue_url) == (
        f"{URL}-gpu",
        f"{URL}-gpu-steps",
        f"{URL}-gpu-cancels",
    )
    assert settings().of_route("default").queue_url == URL
    assert route_queue_url(f"{URL}.fifo", "gpu") == f"{URL}-gpu.fifo"


names = st.from_regex(r"[a-z0-9_-]{1,12}", fullmatch=True)


@given(one=names, other=names)
def test_no_two_routes_share_a_queue(one: str, other: str) -> None:
    def queues(route: str) -> set[str]:
        url = route_queue_url(URL, route)
        return {url, queue_names.steps_queue_url(url), queue_names.cancel_queue_url(url)}

    if is_route(one) and is_route(other) and one != other:
        assert not queues(one) & queues(other)


@pytest.mark.parametrize("name", ["", "-gpu", "GPU", "steps", "gpu-steps", "cancels", "a" * 31, None, "gpu.fifo"])
def test_what_is_no_name_of_a_route_is_refused(name: object) -> None:
    assert not is_route(name)
    with pytest.raises(SettingsError, match="not the name of a route"):
        settings(serves=[name])


def test_the_first_rule_that_matches_counts() -> None:
    rules = settings(
        routes=[
            {"route": "gpu", "job": "train_*"},
            {"route": "ml", "code_location": "ml", "tag": "team=a*"},
            {"route": "big", "tag": "large"},
            {"route": "default", "code_location": "ml"},
        ]
    ).routes
    assert rules[0] == RouteRule("gpu", job="train_*")
    assert first_match(rules, "ml", "train_all", {}) == "gpu"
    assert first_match(rules, "ml", "load", {"team": "ada", "large": "yes"}) == "ml"
    assert first_match(rules, "ml", "load", {"team": "bob", "large": "yes"}) == "big"
    assert first_match(rules, "ml", "load", {}) == "default"
    assert first_match(rules, None, "load", {}) is None


@pytest.mark.parametrize(
    "rules",
    ["gpu", {"route": "gpu"}, [{"route": "gpu"}], [{"route": "-", "job": "a"}], [{"route": "a", "jobs": "a"}], [3], 3],
)
def test_a_rule_that_is_none_is_refused_with_an_example(rules: object) -> None:
    with pytest.raises(SettingsError, match=r"routes"):
        settings(routes=rules)


def test_routes_survive_the_override_of_other_settings() -> None:
    given_settings = settings(routes=[{"route": "gpu", "job": "a"}], serves="gpu, default")
    assert given_settings.serves == ("gpu", "default")
    assert given_settings.overridden_by({}, grace_seconds=3).routes == given_settings.routes
