"""Where `on_cancel` may stand, and that what it says is found again in what Dagster makes of it."""

from typing import Any

import dagster as dg
import pytest

from dagster_taskiq import CleanupContext, on_cancel
from dagster_taskiq.cancellation.handlers import handlers_of


def first(context: CleanupContext) -> None:
    """Nothing."""


def second(context: CleanupContext) -> None:
    """Nothing."""


def names(target: object) -> list[str]:
    return [handler.name for handler in handlers_of(target)]


@dg.op(config_schema={"x": dg.Field(int, default_value=1)})
@on_cancel(first)
def inside() -> None:
    """With the decorator below Dagster's."""


@on_cancel(second)
@on_cancel(first)
@dg.op
def outside() -> None:
    """With the decorators above Dagster's."""


@dg.op
def plain() -> int:
    return 1


@on_cancel(first)
@dg.asset
def an_asset() -> int:
    return 1


@dg.graph_asset
@on_cancel(first)
def a_graph_asset() -> Any:
    return plain()


@dg.graph
@on_cancel(first)
def a_graph() -> None:
    outside()


@on_cancel(first)
@dg.job
def outer_job() -> None:
    inside()


@dg.job
@on_cancel(second)
def inner_job() -> None:
    a_graph()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (inside, ["first"]),
        (inside.configured({"x": 2}, name="other"), ["first"]),
        (outside, ["first", "second"]),
        (plain, []),
        (an_asset, ["first"]),
        (an_asset.with_attributes(group_names_by_key={an_asset.key: "group"}), ["first"]),
        (a_graph_asset, ["first"]),
        (a_graph, ["first"]),
        (a_graph.to_job(name="of_a_graph"), ["first"]),
        (outer_job, ["first"]),
        (inner_job, ["second"]),
        (inner_job.with_hooks(set()), ["second"]),
        (inner_job.with_top_level_resources({}), ["second"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_it_is_found(target: object, expected: list[str]) -> None:
    assert names(target) == expected


def test_it_is_found_in_the_jobs_of_definitions() -> None:
    assets_job = on_cancel(second)(dg.define_asset_job("assets_job"))
    defs = dg.Definitions(assets=[an_asset, a_graph_asset], jobs=[outer_job, assets_job], resources={"x": 1})
    job = defs.resolve_job_def("assets_job")
    assert names(job) == ["second"]
    assert {node.name: names(node.definition) for node in job.graph.nodes} == {
        "an_asset": ["first"],
        "a_graph_asset": ["first"],
    }
    assert names(defs.resolve_job_def("outer_job")) == ["first"]
    subset = defs.resolve_job_def("assets_job").get_subset(asset_selection={an_asset.key})
    assert names(subset) == ["second"]


def test_a_handler_that_is_used_twice_has_two_names() -> None:
    @on_cancel(first)
    @on_cancel(first)
    def function() -> None:
        """Nothing."""

    assert names(function) == ["first", "first-2"]


def test_a_decorator_of_the_users_in_between_does_not_hide_it() -> None:
    import functools

    def logged(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @dg.op
    @logged
    @on_cancel(first)
    def decorated() -> None:
        """Nothing."""

    assert names(decorated) == ["first"]


@pytest.mark.parametrize("timeout", [0, -1, 3_601])
def test_a_timeout_that_makes_no_sense_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be more than 0 and at most 3600 seconds"):
        on_cancel(first, timeout=timeout)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match="on_cancel needs a function"):
        on_cancel("first")  # type: ignore[arg-type]
