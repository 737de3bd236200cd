"""When the steps of a run begin and end in this process, as Dagster executes them. Knows its loop over the steps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

from dagster import DagsterInstance
from dagster._core.execution.plan import execute_plan
from dagster._core.executor import multiprocess
from dagster._core.executor.multiprocess import MultiprocessExecutorChildProcessCommand as StepCommand

_EXECUTE: Final = "execute_plan_iterator"
_COMMAND: Final = "MultiprocessExecutorChildProcessCommand"
__all__ = ["StepCommand", "use_step_command", "watch_process_of_step", "watch_steps"]


def watch_steps(
    began: Callable[[DagsterInstance, str, str], object], ended: Callable[[DagsterInstance, str, str], object]
) -> None:
    """Have these called with the instance, the run id and the step key: before the step loads its inputs, and later.

    A step has ended when its hooks have, or with whatever ends the loop. Its resources are given back after that.
    """
    steps, hooks = _original(execute_plan, "dagster_event_sequence_for_step"), _original(execute_plan, "_trigger_hook")

    @functools.wraps(steps)
    def watched_step(step_context: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        of = step_context.instance, step_context.run_id, step_context.step.key
        began(*of)
        try:
            yield from steps(step_context, *args, **kwargs)
        except BaseException:
            ended(*of)
            raise

    @functools.wraps(hooks)
    def watched_hooks(step_context: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from hooks(step_context, *args, **kwargs)
        finally:
            ended(step_context.instance, step_context.run_id, step_context.step.key)

    execute_plan.dagster_event_sequence_for_step = watched_step
    execute_plan._trigger_hook = watched_hooks  # noqa: SLF001


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
