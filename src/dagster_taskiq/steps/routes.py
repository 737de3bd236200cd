"""Which route each step of a plan goes to. Knows tags, and Dagster's plan; no queues."""

from collections.abc import Mapping

from dagster import JobDefinition

from dagster_taskiq.dagster_compat.execution import ExecutionPlan
from dagster_taskiq.dagster_compat.step_tags import IExecutionStep, asset_tags_of, put_tags_on_steps
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.storage.routing import route_in_tags
from dagster_taskiq.storage.tags import QUEUE_TAG, ROUTE_TAG


def route_steps(job: JobDefinition, plan: ExecutionPlan, route_of_run: str) -> set[str]:
    """Decide for all steps of a plan, and put it into their tags. The routes of those that are to be executed.

    Raises `SettingsError` for a step whose tags name no route, or whose assets want different ones.
    """
    routes = {step.key: _own_route(job, step) or route_of_run for step in plan.steps}
    put_tags_on_steps(plan, {step_key: {ROUTE_TAG: route} for step_key, route in routes.items()})
    return {routes.get(step_key, route_of_run) for step_key in plan.step_keys_to_execute}


def route_of_step(tags: Mapping[str, str] | None, otherwise: str = DEFAULT_ROUTE) -> str:
    """What `route_steps` has decided, by the tags of a step of its plan."""
    return (tags or {}).get(ROUTE_TAG, otherwise)


def _own_route(job: JobDefinition, step: IExecutionStep) -> str | None:
    of_op = route_in_tags(step.tags or {}, f"step {step.key}")
    if of_op is not None:
        return of_op
    wanted = {name: route_in_tags(tags, f"asset {name}") for name, tags in asset_tags_of(job, step).items()}
    routes = {route for route in wanted.values() if route is not None}
    if len(routes) > 1:
        which = ", ".join(f"{name} to {route}" for name, route in wanted.items() if route is not None)
        raise SettingsError(
            f"step {step.key} makes assets that are to go to different routes: {which};"
            f" set {QUEUE_TAG} in its op_tags, which count before the tags of its assets"
        )
    return next(iter(routes), None)
