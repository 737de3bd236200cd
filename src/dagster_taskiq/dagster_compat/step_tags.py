"""The tags of a plan's steps: those of the assets that they make, and tags put on them for Dagster's own limits."""

from collections.abc import Mapping

from dagster import JobDefinition
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.plan.step import IExecutionStep

__all__ = ["IExecutionStep", "asset_tags_of", "put_tags_on_steps"]


def asset_tags_of(job: JobDefinition, step: IExecutionStep) -> dict[str, Mapping[str, str]]:
    """By name, the tags of the assets of this run that a step makes, or helps to make; its op's are `step.tags`."""
    assets = job.asset_layer.get_assets_def_for_node(step.node_handle)
    if assets is None:
        return {}
    return {key.to_user_string(): assets.tags_by_key.get(key, {}) for key in sorted(assets.keys)}


def put_tags_on_steps(plan: ExecutionPlan, tags: Mapping[str, Mapping[str, str]]) -> None:
    """By step key, tags that the steps of this plan have from now on, in this process; the later ones of a fan-out too.

    Dagster's `tag_concurrency_limits` count by them.
    """
    for handle, step in list(plan.step_dict.items()):
        if more := tags.get(step.key):
            tagged = step._replace(tags={**(step.tags or {}), **more})  # type: ignore[attr-defined]  # all are tuples
            plan.step_dict[handle] = plan.step_dict_by_key[step.key] = tagged
