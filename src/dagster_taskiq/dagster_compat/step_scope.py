"""When the steps of a run begin and end in this process, as Dagster executes them. Knows its loop over the steps."""

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, Final, Protocol

from dagster import DagsterEventType, DagsterInstance
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.execution.plan import execute_plan
from dagster._core.executor import multiprocess
from dagster._core.executor.multiprocess import MultiprocessExecutorChildProcessCommand as StepCommand

_EXECUTE: Final = "execute_plan_iterator"
_COMMAND: Final = "MultiprocessExecutorChildProcessCommand"
_OVER: Final = {
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
    DagsterEventType.STEP_SKIPPED,
}
__all__ = ["StepCommand", "StepWatcher", "tags_of", "use_step_command", "watch_process_of_step", "watch_steps"]


class StepWatcher(Protocol):
    """What is told of the attempts of steps. `context`: Dagster's, of the step."""

    def began(self, context: Any) -> None:
        """Before it loads its inputs."""

    def torn_off(self, context: Any) -> None:
        """Something was raised in it, of which Dagster makes a failure, or a retry, after this."""

    def reported(self, context: Any) -> None:
        """How it has ended is written; its hooks have not run."""

    def fails_alone(self, context: Any) -> bool:
        """It was interrupted, and its failure is written: whether the others are to go on."""

    def ended(self, context: Any) -> None:
        """Its hooks have run, or it was torn off. Its resources are given back after that."""


_watcher: StepWatcher | None = None


def watch_steps(watcher: StepWatcher) -> None:
    """From now on, in this process, this one is told of the attempts of steps; also of one that is at work."""
    global _watcher
    _watcher = watcher
    steps = _original(execute_plan, "dagster_event_sequence_for_step")
    core = _original(execute_plan, "core_dagster_event_sequence_for_step")
    hooks = _original(execute_plan, "_trigger_hook")

    @functools.wraps(steps)
    def watched_step(step_context: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return _watched(steps(step_context, *args, **kwargs), step_context)

    @functools.wraps(core)
    def watched_core(step_context: Any) -> Iterator[Any]:
        try:
            yield from core(step_context)
        except GeneratorExit:
            raise
        except BaseException:
            _watching().torn_off(step_context)
            raise

    @functools.wraps(hooks)
    def watched_hooks(step_context: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from hooks(step_context, *args, **kwargs)
        finally:
            _watching().ended(step_context)

    execute_plan.dagster_event_sequence_for_step = watched_step
    execute_plan.core_dagster_event_sequence_for_step = watched_core  # type: ignore[attr-defined]
    execute_plan._trigger_hook = watched_hooks  # noqa: SLF001


def _watched(events: Generator[Any], step_context: Any) -> Iterator[Any]:
    _watching().began(step_context)
    try:
        with closing(events):
            for event in events:
                if event.event_type in _OVER:
                    _watching().reported(step_context)
                yield event
    except DagsterExecutionInterruptedError:
        if not _watching().fails_alone(step_context):
            _watching().ended(step_context)
            raise
    except BaseException:
        _watching().ended(step_context)
        raise


def _watching() -> StepWatcher:
    if _watcher is None:
        raise RuntimeError("nobody watches steps here")
    return _watcher


def tags_of(step_context: Any, name: str) -> list[str]:
    """The values of a tag of a step: that of its op; if that has none, those of the assets and checks that it makes."""
    if name in step_context.step.tags:
        return [str(step_context.step.tags[name])]
    layer, node = step_context.job_def.asset_layer, step_context.node_handle
    definition = layer.get_assets_def_for_node(node) if layer is not None else None
    if definition is None:
        return []
    keys = layer.get_selected_entity_keys_for_node(node)
    return [str(spec.tags[name]) for spec in definition.specs if spec.key in keys and name in spec.tags]


def watch_process_of_step(began: Callable[[DagsterInstance, str, str], object]) -> None:
    """Have it called in a process of the multiprocess executor, before it makes the resources of its step."""
    execute: Callable[..., Iterator[Any]] = _original(multiprocess, _EXECUTE)

    @functools.wraps(execute)
    def watched(plan: Any, job: Any, run: Any, *args: Any, instance: DagsterInstance, **kwargs: Any) -> Iterator[Any]:
        (step_key,) = plan.step_keys_to_execute
        began(instance, run.run_id, step_key)
        return execute(plan, job, run, *args, instance=instance, **kwargs)

    setattr(multiprocess, _EXECUTE, watched)


def use_step_command(command: type[StepCommand]) -> None:
    """Have the multiprocess executor of this process send it to the processes of its steps."""
    setattr(multiprocess, _COMMAND, command)


def _original(module: Any, name: str) -> Any:
    """As Dagster has it: watched by one process of ours, not also by an earlier one of its tests."""
    found = getattr(module, name)
    return getattr(found, "__wrapped__", found)
