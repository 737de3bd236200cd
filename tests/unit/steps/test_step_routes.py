"""Which route a step goes to: its op's tags, its assets', its run's."""

from typing import Any

import dagster as dg
import pytest
from dagster._core.execution.api import create_execution_plan
from dagster._utils.tags import TagConcurrencyLimitsCounter

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.steps.routes import route_of_step, route_steps
from dagster_taskiq.storage.tags import CELERY_QUEUE_TAG, QUEUE_TAG, ROUTE_TAG


@dg.op
def plain() -> int:
    return 1


@dg.op(tags={QUEUE_TAG: "gpu", CELERY_QUEUE_TAG: "fast"})
def ours(number: int) -> int:
    return number


@dg.op(tags={CELERY_QUEUE_TAG: "fast", ROUTE_TAG: "not for people"})
def celery(number: int) -> int:
    return number


@dg.op(tags={ROUTE_TAG: "not for people"})
def without(number: int) -> int:
    return number


@dg.op(out=dg.DynamicOut(int))
def many() -> Any:
    yield dg.DynamicOutput(1, "a")


@dg.job
def ops() -> None:
    without(celery(ours(plain())))
    many().map(ours.alias("each"))


@dg.asset(tags={QUEUE_TAG: "gpu"})
def of_asset() -> int:
    return 1


@dg.asset(tags={QUEUE_TAG: "gpu"}, op_tags={QUEUE_TAG: "default"})
def of_op(of_asset: int) -> int:
    return of_asset


@dg.asset
def of_run(of_op: int) -> int:
    return of_op


@dg.multi_asset(specs=[dg.AssetSpec("one", tags={QUEUE_TAG: "big"}), dg.AssetSpec("other")])
def agreed():  # type: ignore[no-untyped-def]  # Dagster reads annotations
    ...


@dg.graph_asset(tags={CELERY_QUEUE_TAG: "big"})
def of_graph() -> Any:
    return without(plain())


@dg.multi_asset(
    specs=[dg.AssetSpec("left", tags={QUEUE_TAG: "big"}), dg.AssetSpec("right", tags={QUEUE_TAG: "gpu"})],
    can_subset=True,
)
def torn():  # type: ignore[no-untyped-def]
    ...


def job_of_assets(*assets: Any, only: Any = None) -> dg.JobDefinition:
    selected = dg.define_asset_job("some", selection=only or "*")
    return dg.Definitions(assets=assets, jobs=[selected]).resolve_job_def("some")


def routes(job: dg.JobDefinition, of_run: str = "of-run") -> dict[str, str]:
    plan = create_execution_plan(job)
    found = route_steps(job, plan, of_run)
    by_key = {step.key: route_of_step(step.tags) for step in plan.steps}
    assert found == set(by_key.values())
    assert {step.key: step for step in plan.steps} == plan.step_dict_by_key
    return by_key


def test_the_tags_of_ops() -> None:
    assert routes(ops) == {
        "plain": "of-run",
        "ours": "gpu",
        "celery": "fast",
        "without": "of-run",
        "many": "of-run",
        "each[?]": "gpu",
    }


def test_the_tags_of_assets() -> None:
    assert routes(job_of_assets(of_asset, of_op, of_run, agreed, of_graph)) == {
        "of_asset": "gpu",
        "of_op": "default",
        "of_run": "of-run",
        "agreed": "big",
        "of_graph.plain": "big",
        "of_graph.without": "big",
    }


def test_assets_of_one_step_that_want_different_routes_are_an_error_unless_one_is_selected() -> None:
    with pytest.raises(SettingsError, match=r"torn makes assets .*: left to big, right to gpu; set"):
        routes(job_of_assets(torn))
    assert routes(job_of_assets(torn, only=["left"])) == {"torn": "big"}


def test_a_tag_that_names_no_route_says_whose_it_is() -> None:
    @dg.asset(tags={QUEUE_TAG: "GPU"})
    def wrong() -> None: ...

    with pytest.raises(SettingsError, match=f"tag {QUEUE_TAG} of asset wrong: 'GPU' is not the name of a route"):
        routes(job_of_assets(wrong))


def test_what_a_fan_out_resolves_to_has_the_route_too() -> None:
    plan = create_execution_plan(ops)
    route_steps(ops, plan, "default")
    plan.resolve({"many": {"result": ["a", "b"]}})
    resolved = [step for step in plan.steps if step.key in ("each[a]", "each[b]")]
    assert [route_of_step(step.tags) for step in resolved] == ["gpu", "gpu"]
    limits = TagConcurrencyLimitsCounter([{"key": ROUTE_TAG, "value": "gpu", "limit": 1}], resolved[:1])  # type: ignore[arg-type]
    assert limits.is_blocked(resolved[1])  # type: ignore[arg-type]
