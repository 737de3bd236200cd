"""Where `on_cancel` may stand, and that what it says is found again in what Dagster makes of it."""

import warnings
from typing import Any
from unittest.mock import MagicMock, Mock

import dagster as dg
import pytest
from taskiq import InMemoryBroker

from dagster_taskiq import CleanupContext, on_cancel
from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.cancellation.handlers import handlers_of


def first(context: CleanupContext) -> None:
    """Nothing."""


def second(context: CleanupContext) -> None:
    """Nothing."""


def third(context: CleanupContext) -> None:
    """Nothing."""


def names(target: object) -> list[str]:
    return [handler.name for handler in handlers_of(target)]


def identities(target: object) -> set[str]:
    return {handler.identity for handler in handlers_of(target)}


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


def test_handlers_of_one_name_have_names_and_identities_of_their_own() -> None:
    @on_cancel(lambda _: None)
    @on_cancel(lambda _: None)
    @on_cancel(first)
    @on_cancel(first)
    def function() -> None:
        """Nothing."""

    assert names(function) == ["first", "first-2", "<lambda>", "<lambda>-2"]
    assert len(identities(function)) == 4
    job = on_cancel(first)(a_graph.to_job(name="of_a_graph"))
    assert names(job) == ["first", "first-2"]
    assert len(identities(job)) == 2
    assert identities(a_graph) < identities(job)


def kinds(function: Any) -> dict[str, tuple[Any, ...]]:
    """Two definitions of each kind, of one function."""
    return {
        "op": (dg.op(name="a")(function), dg.op(name="b")(function)),
        "graph": (dg.graph(name="a")(function), dg.graph(name="b")(function)),
        "job": (dg.job(name="a")(function), dg.job(name="b")(function)),
        "asset": (dg.asset(name="a")(function), dg.asset(name="b")(function)),
        "multi_asset": tuple(dg.multi_asset(specs=[dg.AssetSpec(name)], name=name)(function) for name in "ab"),
        "asset_check": tuple(dg.asset_check(asset=an_asset, name=name)(function) for name in "ab"),
        "asset job": (dg.define_asset_job("a"), dg.define_asset_job("b")),
    }


@pytest.mark.parametrize("kind", [*kinds(lambda: None)])
def test_what_is_declared_on_a_definition_is_not_left_on_its_function(kind: str) -> None:
    def function() -> None:
        """Nothing."""

    a, b = kinds(function)[kind]
    decorated = on_cancel(second)(on_cancel(first)(a))
    assert (names(decorated), names(b), names(function)) == (["first", "second"], [], [])
    if kind != "asset job":
        on_cancel(third)(function)
        assert names(kinds(function)[kind][0]) == ["third"]


def test_what_is_declared_on_a_copy_of_a_job_is_not_left_on_the_original() -> None:
    original = on_cancel(first)(dg.job(name="a")(lambda: None))
    copy = on_cancel(second)(original.with_top_level_resources({}))
    assert (names(original), names(copy)) == (["first"], ["first", "second"])
    assert names(copy.with_hooks(set())) == ["first", "second"]


@dg.success_hook
def a_hook(context: dg.HookContext) -> None:
    """Nothing."""


configurable = on_cancel(first)(
    dg.graph(name="g", config=dg.ConfigMapping(lambda _: {}, config_schema={}))(lambda: None)
)


@pytest.mark.parametrize(
    "copy",
    [
        outside.configured({}, name="other"),
        outside.with_retry_policy(dg.RetryPolicy()).node_def,
        outside.tag({"a": "b"}).node_def,
        configurable.configured({}, name="other"),
        an_asset.with_attributes(group_names_by_key={an_asset.key: "group"}),
        an_asset.with_hooks({a_hook}),
        an_asset.with_resources({"io_manager": dg.mem_io_manager}),
        a_graph_asset.with_attributes(group_names_by_key={a_graph_asset.key: "group"}),
    ],
    ids=lambda copy: type(copy).__name__,
)
def test_a_copy_of_a_definition_has_it_too(copy: object) -> None:
    assert names(copy)[0] == "first"


def observable(function: Any) -> Any:
    with warnings.catch_warnings(action="ignore", category=dg.BetaWarning):
        return dg.observable_source_asset(function)


def a_source() -> dg.DataVersion:
    return dg.DataVersion("1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_function_of_an_observable_source_asset_has_it_in_its_run() -> None:
    """An observation is run, too; but Dagster makes its op only then, and of another function."""

    @observable
    @on_cancel(first)
    def observed() -> dg.DataVersion:
        return dg.DataVersion("1")

    defs = dg.Definitions(assets=[observed], jobs=[dg.define_asset_job("observes", [observed])])
    (node,) = defs.resolve_job_def("observes").graph.nodes
    assert names(node.definition) == ["first"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (observable(a_source), "write it below @observable_source_asset of a_source"),
        (dg.AssetsDefinition(specs=[dg.AssetSpec("external")]), "the external asset external is never run"),
        (dg.AssetSpec("a_spec"), "AssetSpec is nothing that is run by itself"),
        (dg.sensor(name="s", job_name="x")(lambda: None), "SensorDefinition is nothing that is run by itself"),
        (dg.schedule(cron_schedule="@daily", job_name="x", name="s")(lambda: None), "ScheduleDefinition is nothing"),
        (dg.resource(lambda: None), "ResourceDefinition is nothing"),
        (dg.mem_io_manager, "IOManagerDefinition is nothing"),
        (a_hook, "HookDefinition is nothing"),
        (plain.alias("other"), "decorate the definition plain, not one use of it"),
        (dg.ConfigurableResource, "the class ConfigurableResource is never run"),
        (InMemoryBroker().register_task(a_source, "a_task"), "write it below the decorator"),
        (
            CancellableSQSBroker("https://sqs.eu-west-1.amazonaws.com/123456789012/q").register_task(
                a_source, "a_task"
            ),
            "write it below the decorator that makes a task of a_task",
        ),
        (1, "1 is never run; it is for functions, ops, assets, asset checks, graphs, jobs and taskiq tasks"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_it_can_never_run_for_is_refused(target: object, why: str) -> None:
    with pytest.raises(ValueError, match=r"^on_cancel: ") as refused:
        on_cancel(first)(target)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


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


@pytest.mark.parametrize("kind", [Mock, MagicMock])
def test_a_mock_of_an_op_has_what_it_was_given_and_no_more(kind: type[Mock]) -> None:
    """It answers every name with a mock that does the same, so a search in all of them would have no end."""
    assert names(kind()) == []
    assert names(on_cancel(second)(kind(node_def=on_cancel(first)(kind())))) == ["first", "second"]
