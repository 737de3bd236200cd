"""Jobs, nodes, resources and ops as Dagster defines them; for cleanup handlers, above all."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dagster import (
    DagsterInstance,
    DagsterLogManager,
    DagsterRun,
    GraphDefinition,
    JobDefinition,
    ResourceDefinition,
)
from dagster._core.definitions.dependency import Node, NodeHandle
from dagster._core.definitions.metadata.metadata_value import ObjectMetadataValue
from dagster._core.execution.context.compute import current_execution_context
from dagster._core.execution.context.op_execution_context import OpExecutionContext
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._record import copy
from dagster._utils.hosted_user_process import recon_job_from_origin

__all__ = [
    "current_op",
    "job_of",
    "nodes_of",
    "op_config",
    "parents_of",
    "resource_config",
    "resources_for",
    "run_logger",
    "with_object_in_metadata",
]


def current_op() -> OpExecutionContext | None:
    """The op that calls this, if one does."""
    context = current_execution_context.get()
    return context.op_execution_context if context is not None else None


def with_object_in_metadata(job: Any, key: str, value: object) -> Any:
    """A copy of an unresolved job of assets with an object in its metadata, of which only the class is serialised."""
    return copy(job, metadata={**(job.metadata or {}), key: ObjectMetadataValue("cleanup handlers", instance=value)})


def job_of(run: DagsterRun, instance: DagsterInstance) -> JobDefinition:
    """The definition of a run's job, as `execute_run` has loaded it: in the process of the run, it is there already.

    Raises whatever the user's code raises when it is imported.
    """
    if run.job_code_origin is None:
        raise ValueError(f"run {run.run_id} does not say where its code is")
    job = recon_job_from_origin(run.job_code_origin)
    if run.has_repository_load_data and run.execution_plan_snapshot_id is not None:
        plan = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
        job = job.with_repository_load_data(plan.repository_load_data)
    if run.resolved_op_selection or run.asset_selection or run.asset_check_selection:
        job = job.get_subset(
            op_selection=run.resolved_op_selection,
            asset_selection=run.asset_selection,
            asset_check_selection=run.asset_check_selection,
        )
    return job.get_definition()


def nodes_of(graph: Any) -> Iterator[tuple[str, Node]]:
    """Every node of a job or graph, by its path from the outside: "outer.inner"."""
    for node in graph.nodes:
        yield node.name, node
        if isinstance(node.definition, GraphDefinition):
            for path, inner in nodes_of(node.definition):
                yield f"{node.name}.{path}", inner


def parents_of(handle: NodeHandle) -> Iterator[NodeHandle]:
    """The graphs that a node is in, the innermost first."""
    parent = handle.parent
    while parent is not None:
        yield parent
        parent = parent.parent


def op_config(job: JobDefinition, run: DagsterRun, handle: NodeHandle) -> Any:
    """The configuration of an op in a run, with its defaults."""
    found = ResolvedRunConfig.build(job, run.run_config).ops.get(str(handle))
    return found.config if found is not None else None


def resources_for(job: JobDefinition, keys: Iterable[str]) -> dict[str, ResourceDefinition]:
    """The definitions of these resources of a job, and of those that they need. Raises `LookupError`."""
    found: dict[str, ResourceDefinition] = {}
    wanted = list(keys)
    while wanted:
        key = wanted.pop()
        if key in found:
            continue
        if key not in job.resource_defs:
            raise LookupError(f"the job has no resource {key!r}; it has {sorted(job.resource_defs)}")
        found[key] = job.resource_defs[key]
        wanted += found[key].get_required_resource_keys(job.resource_defs)
    return found


def resource_config(run: DagsterRun, keys: Iterable[str]) -> dict[str, Any]:
    """What a run's configuration says of these resources."""
    config: Mapping[str, Any] = dict(run.run_config).get("resources") or {}  # type: ignore[assignment]
    return {key: config[key] for key in keys if key in config}


def run_logger(instance: DagsterInstance, run: DagsterRun, step_key: str | None) -> DagsterLogManager:
    """Writes into the event log of a run, and says of which step."""
    logger = DagsterLogManager.create(loggers=[], instance=instance, dagster_run=run)
    return logger.with_tags(step_key=step_key) if step_key is not None else logger
