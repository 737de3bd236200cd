"""Executing runs and steps in this process, what a step has to know, and the events of steps that were stopped."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
)
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.events import JobFailureData, RunFailureReason
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.context.system import IStepContext, PlanOrchestrationContext
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.objects import ErrorSource, StepFailureData
from dagster._core.execution.plan.outputs import StepOutputHandle
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.plan.state import KnownExecutionState
from dagster._core.execution.plan.step import ExecutionStep
from dagster._core.execution.retries import RetryMode, get_retries_config
from dagster._core.execution.step_dependency_config import StepDependencyConfig, get_step_dependency_config_field
from dagster._core.execution.tags import get_tag_concurrency_limits_config
from dagster._core.executor.step_delegating import (
    CheckStepHealthResult,
    StepDelegatingExecutor,
    StepHandler,
    StepHandlerContext,
)
from dagster._grpc.types import ExecuteStepArgs
from dagster_shared.error import SerializableErrorInfo

__all__ = [
    "ActiveExecution",
    "CheckStepHealthResult",
    "ExecuteStepArgs",
    "ExecutionPlan",
    "ExecutionStep",
    "IStepContext",
    "InstanceConcurrencyContext",
    "JobFailureData",
    "KnownExecutionState",
    "PlanOrchestrationContext",
    "RetryMode",
    "RunFailureReason",
    "StepDelegatingExecutor",
    "StepDependencyConfig",
    "StepHandler",
    "StepHandlerContext",
    "describe_state",
    "error_info",
    "execute_run",
    "execute_step",
    "failed_for_good",
    "failure_of_a_handler",
    "forget_dynamic_outputs",
    "get_retries_config",
    "get_step_dependency_config_field",
    "get_tag_concurrency_limits_config",
    "interrupted_step",
    "multiple_process_executor_requirements",
    "needs_history",
    "rebuild_state",
    "resume_run",
    "unexpected_termination",
    "was_interrupted",
]


_IGNORE: Final[Callable[[DagsterEvent], Any]] = lambda _: None  # noqa: E731


def execute_run(run_id: str, instance: DagsterInstance) -> int:
    """What `dagster api execute_run` does, in this process; returns its exit code."""
    from dagster._cli.api import _execute_run_command_body

    return _execute_run_command_body(run_id, instance, _IGNORE, set_exit_code_on_failure=True)


def resume_run(run_id: str, instance: DagsterInstance) -> int:
    """What `dagster api resume_run` does, in this process; returns its exit code."""
    from dagster._cli.api import _resume_run_command_body

    return _resume_run_command_body(run_id, instance, _IGNORE, set_exit_code_on_failure=True)


def execute_step(
    run: DagsterRun,
    instance: DagsterInstance,
    step_key: str,
    known_state: KnownExecutionState,
    retry_mode: RetryMode,
    *,
    should_verify_step: bool,
) -> Iterator[DagsterEvent]:
    """What `dagster api execute_step` does, in this process, as far as it is iterated."""
    from dagster._cli.api import _execute_step_command_body

    if run.job_code_origin is None:
        raise ValueError(f"run {run.run_id} does not say where its code is")
    arguments = ExecuteStepArgs(
        job_origin=run.job_code_origin,
        run_id=run.run_id,
        step_keys_to_execute=[step_key],
        retry_mode=retry_mode,
        known_state=known_state,
        should_verify_step=should_verify_step,
    )
    return _execute_step_command_body(arguments, instance, run)


def describe_state(state: KnownExecutionState) -> dict[str, Any]:
    """What a step's process needs to know of the other steps, as JSON; all but the history of a re-execution."""
    return {
        "attempts": dict(state.previous_retry_attempts),
        "mappings": {step: dict(outputs) for step, outputs in state.dynamic_mappings.items()},
        "outputs": sorted(map(list, state.ready_outputs), key=str),
    }


def needs_history(state: KnownExecutionState) -> bool:
    """Whether the run is a re-execution whose steps look at the outputs of earlier runs."""
    return state.parent_state is not None or bool(state.step_output_versions)


def rebuild_state(described: Mapping[str, Any], run: DagsterRun, instance: DagsterInstance, *, history: bool) -> Any:
    """The `KnownExecutionState` that was described. With `history`, that of the run's own plan is put into it.

    Raises whatever Dagster's checks raise for a description that is none.
    """
    state = KnownExecutionState(
        previous_retry_attempts=dict(described["attempts"]),
        dynamic_mappings={step: dict(outputs) for step, outputs in described["mappings"].items()},
        ready_outputs={StepOutputHandle(*parts) for parts in described["outputs"]},
    )
    plan_id = run.execution_plan_snapshot_id
    if not history or plan_id is None:
        return state
    past = instance.get_execution_plan_snapshot(plan_id).initial_known_state
    if past is None:
        return state
    return state._replace(parent_state=past.parent_state, step_output_versions=past.step_output_versions)


def forget_dynamic_outputs(active: ActiveExecution, step: ExecutionStep) -> None:
    """The step begins again under the same attempt: what it has mapped so far does not count."""
    active._prep_for_dynamic_outputs(step)  # noqa: SLF001


def failed_for_good(entry: EventLogEntry) -> EventLogEntry:
    """The entry of a step that asks for a retry, as that of one that has failed because it was interrupted."""
    event = entry.dagster_event
    if event is None:
        raise ValueError("not the entry of an event")
    error = event.step_retry_data.error
    if error.cause is not None and error.cause.cls_name == DagsterExecutionInterruptedError.__name__:
        error = error.cause
    data = StepFailureData(  # type: ignore[no-untyped-call]
        error=error, user_failure_data=None, error_source=ErrorSource.INTERRUPT
    )
    failure = event._replace(  # a NamedTuple's own way
        event_type_value=DagsterEventType.STEP_FAILURE.value,
        event_specific_data=data,
        message=f'Execution of step "{event.step_key}" was cancelled.',
    )
    return entry._replace(dagster_event=failure, user_message=failure.message or "", level=logging.ERROR)


def was_interrupted(event: DagsterEvent) -> bool:
    """Whether a step failed because it was interrupted."""
    return event.is_step_failure and event.step_failure_data.error_source is ErrorSource.INTERRUPT


def interrupted_step(step_context: IStepContext, why: str) -> DagsterEvent:
    """Report the failure of a step that was stopped; for one whose process could not do it itself."""
    data = StepFailureData(  # type: ignore[no-untyped-call]
        error=error_info(why), user_failure_data=None, error_source=ErrorSource.INTERRUPT
    )
    message = f'Execution of step "{step_context.step.key}" failed: {why}'
    return DagsterEvent.step_failure_event(step_context, data, message)


def unexpected_termination() -> JobFailureData:
    """Why a run failed whose process ended before its time."""
    return JobFailureData(error=None, failure_reason=RunFailureReason.UNEXPECTED_TERMINATION)


def failure_of_a_handler() -> JobFailureData:
    """Why a run failed whose cleanup handlers did."""
    return JobFailureData(error=None, failure_reason=RunFailureReason.RUN_EXCEPTION)


def error_info(message: str) -> SerializableErrorInfo:
    """An error for an engine event, without a stack: it is for a person who reads the run's log."""
    return SerializableErrorInfo(message=message, stack=[], cls_name=None)
