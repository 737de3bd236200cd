"""Jobs, nodes, resources and ops as Dagster defines them; for cleanup handlers, above all."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dagster import (
    AssetsDefinition,
    DagsterInstance,
    DagsterLogManager,
    DagsterRun,
    GraphDefinition,
    JobDefinition,
    OpDefinition,
    ResourceDefinition,
    SourceAsset,
)
from dagster._core.definitions.composition import PendingNodeInvocation
from dagster._core.definitions.dependency import Node, NodeHandle
from dagster._core.definitions.metadata.metadata_value import ObjectMetadataValue
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.execution.context.compute import current_execution_context
from dagster._core.execution.context.op_execution_context import OpExecutionContext
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._record import copy
from dagster._utils.hosted_user_process import recon_job_from_origin

__all__ = [
    "current_op",
    "job_of",
    "let_copies_keep",
    "nodes_of",
    "op_config",
    "parents_of",
    "resource_config",
    "resources_for",
    "run_logger",
    "why_it_never_runs",
    "with_object_in_metadata",
]


def current_op() -> OpExecutionContext | None:
    """The op that calls this, if one does."""
    context = current_execution_context.get()
    return context.op_execution_context if context is not None else None


def with_object_in_metadata(job: Any, key: str, value: object) -> Any:
    """A copy of an unresolved job of assets with an object in its metadata, of which only the class is serialised."""
    return copy(job, metadata={**(job.metadata or {}), key: ObjectMetadataValue("cleanup handlers", instance=value)})


def let_copies_keep(attribute: str) -> None:
    """From now on a copy that Dagster makes of an op or a graph (`configured`) has this attribute of the original.

    And a graph's copy has the function that it was made from, which Dagster leaves out.
    """
    for kind, method in ((OpDefinition, "with_replaced_properties"), (GraphDefinition, "copy")):
        original = getattr(kind, method)
        if not hasattr(original, "__wrapped__"):
            setattr(kind, method, _keeping(original, attribute))


def _keeping(make_copy: Callable[..., Any], attribute: str) -> Callable[..., Any]:
    @functools.wraps(make_copy)
    def copy_and_keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        copied = make_copy(self, *args, **kwargs)
        if attribute in vars(self):
            setattr(copied, attribute, vars(self)[attribute])
        if isinstance(copied, GraphDefinition):
            copied._composition_fn = self.composition_fn  # noqa: SLF001
        return copied

    return copy_and_keep


def why_it_never_runs(definition: object) -> str | None:
    """Why nothing of this definition of Dagster's is ever cut short in a run; None: something may be."""
    for_what = "it is for ops, assets, asset checks, graphs and jobs"
    if isinstance(definition, SourceAsset):
        if definition.is_observable:
            return f"write it below @observable_source_asset of {definition.key.to_user_string()}, next to the function"
        return f"the source asset {definition.key.to_user_string()} is never run; {for_what}"
    if isinstance(definition, AssetsDefinition):
        names = ", ".join(sorted(key.to_user_string() for key in definition.keys))
        return None if definition.is_executable else f"the external asset {names} is never run; {for_what}"
    if isinstance(definition, PendingNodeInvocation):
        return f"decorate the definition {definition.node_def.name}, not one use of it (alias, tag, with_hooks)"
    if isinstance(definition, (OpDefinition, GraphDefinition, JobDefinition, UnresolvedAssetJobDefinition)):
        return None
    return f"{type(definition).__name__} is nothing that is run by itself, so nobody cancels it; {for_what}"


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
