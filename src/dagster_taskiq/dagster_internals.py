"""The only module that imports Dagster's private parts, so that the day they move, one place changes.

`tests/unit/test_dagster_internals.py` says when they do.
"""

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from alembic.config import Config
from alembic.script import ScriptDirectory
from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterLogManager,
    DagsterRun,
    GraphDefinition,
    JobDefinition,
    ResourceDefinition,
)
from dagster._cli.api import _execute_run_command_body, _execute_step_command_body, _resume_run_command_body
from dagster._core.definitions.dependency import Node, NodeHandle
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.definitions.metadata.metadata_value import ObjectMetadataValue
from dagster._core.errors import DagsterExecutionInterruptedError, DagsterInvalidConfigError
from dagster._core.events import EngineEventData, JobFailureData, RunFailureReason
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.context.compute import current_execution_context
from dagster._core.execution.context.op_execution_context import OpExecutionContext
from dagster._core.execution.context.system import IStepContext, PlanOrchestrationContext
from dagster._core.execution.plan import compute
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
from dagster._core.instance import InstanceRef
from dagster._core.launcher import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._core.storage.event_log import SqlEventLogStorage, SqlEventLogStorageTable
from dagster._core.storage.runs import SqliteRunStorage, SqlRunStorage
from dagster._core.storage.runs.schema import KeyValueStoreTable
from dagster._core.storage.sqlalchemy_compat import db_select
from dagster._core.storage.tags import MAX_RETRIES_TAG
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._daemon.monitoring import RESUME_RUN_LOG_MESSAGE
from dagster._grpc.types import ExecuteStepArgs
from dagster._record import copy
from dagster._serdes import ConfigurableClass, ConfigurableClassData, deserialize_value, serialize_value
from dagster._utils.hosted_user_process import recon_job_from_origin
from dagster._utils.interrupts import (
    _replace_interrupt_signal,
    capture_interrupts,
    check_captured_interrupt,
    raise_interrupts_as,
)
from dagster_shared.error import SerializableErrorInfo
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import InterfaceError, OperationalError

__all__ = [
    "FINISHED_STATUSES",
    "MAX_RETRIES_TAG",
    "RESUME_RUN_LOG_MESSAGE",
    "ActiveExecution",
    "CheckRunHealthResult",
    "CheckStepHealthResult",
    "ConfigurableClass",
    "ConfigurableClassData",
    "DagsterExecutionInterruptedError",
    "DagsterInvalidConfigError",
    "EngineEventData",
    "ExecuteStepArgs",
    "ExecutionPlan",
    "ExecutionStep",
    "IStepContext",
    "InstanceConcurrencyContext",
    "InstanceRef",
    "JobFailureData",
    "KnownExecutionState",
    "LaunchRunContext",
    "PlanOrchestrationContext",
    "ResumeRunContext",
    "RetryMode",
    "RunFailureReason",
    "RunLauncher",
    "StepDelegatingExecutor",
    "StepDependencyConfig",
    "StepHandler",
    "StepHandlerContext",
    "WorkerStatus",
    "capture_interrupts",
    "check_captured_interrupt",
    "delete_values",
    "describe_state",
    "deserialize_entry",
    "deserialize_value",
    "error_info",
    "event_of",
    "events_of_step",
    "execute_run",
    "execute_step",
    "failed_for_good",
    "get_retries_config",
    "get_step_dependency_config_field",
    "get_tag_concurrency_limits_config",
    "hook_interrupts",
    "interrupted_step",
    "multiple_process_executor_requirements",
    "needs_history",
    "outages",
    "raise_interrupts_as",
    "read_migration_scripts_once",
    "rebuild_state",
    "resume_run",
    "serialize_value",
    "unexpected_termination",
    "values_under",
    "was_interrupted",
]

_RunBody = Callable[[str, DagsterInstance], int]
_LOOK_BACK: Final = 50
"""Events of one type; those of other processes of the run may have come between."""
_IGNORE: Final[Callable[[DagsterEvent], Any]] = lambda _: None  # noqa: E731


def execute_run(run_id: str, instance: DagsterInstance) -> int:
    """What `dagster api execute_run` does, in this process; returns its exit code."""
    return _execute_run_command_body(run_id, instance, _IGNORE, set_exit_code_on_failure=True)


def resume_run(run_id: str, instance: DagsterInstance) -> int:
    """What `dagster api resume_run` does, in this process; returns its exit code."""
    return _resume_run_command_body(run_id, instance, _IGNORE, set_exit_code_on_failure=True)


def execute_step(
    run: DagsterRun, instance: DagsterInstance, step_key: str, known_state: KnownExecutionState, retry_mode: RetryMode
) -> Iterator[DagsterEvent]:
    """What `dagster api execute_step` does, in this process, as far as it is iterated."""
    if run.job_code_origin is None:
        raise ValueError(f"run {run.run_id} does not say where its code is")
    arguments = ExecuteStepArgs(
        job_origin=run.job_code_origin,
        run_id=run.run_id,
        step_keys_to_execute=[step_key],
        retry_mode=retry_mode,
        known_state=known_state,
        should_verify_step=True,
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


def events_of_step(
    instance: DagsterInstance, run_id: str, step_key: str, of_type: Iterable[DagsterEventType]
) -> list[DagsterEvent]:
    """The events of one step, in order.

    Dagster's own interface only reads those of the whole run, which for a run of a thousand steps would be a million.
    """
    storage = instance.event_log_storage
    kinds = set(of_type)
    if not isinstance(storage, SqlEventLogStorage):
        entries: Iterable[EventLogEntry] = instance.all_logs(run_id, of_type=kinds)
    else:
        table = SqlEventLogStorageTable.c
        query = (
            db_select([table.event])
            .where(table.run_id == run_id)
            .where(table.step_key == step_key)
            .where(table.dagster_event_type.in_([kind.value for kind in kinds]))
            .order_by(table.id.asc())
        )
        with storage.run_connection(run_id) as connection:
            entries = [deserialize_entry(row[0]) for row in connection.execute(query).fetchall()]
    events = [event for event in map(event_of, entries) if event is not None]
    return [event for event in events if event.step_key == step_key]


def values_under(instance: DagsterInstance, prefix: str) -> dict[str, str]:
    """All keys that begin so, and their values, of Dagster's key-value storage, which itself only answers for one key.

    Empty for a storage that is not SQL.
    """
    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        return {}
    table = KeyValueStoreTable.c
    query = db_select([table.key, table.value]).where(table.key.startswith(prefix, autoescape=True))
    with storage.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query).fetchall()}


def put_value(instance: DagsterInstance, key: str, value: str) -> None:
    """Set one key of Dagster's key-value storage, in one statement also on SQLite.

    There Dagster's own way is an insert that fails and an update.
    """
    storage = instance.run_storage
    if isinstance(storage, SqliteRunStorage):
        insert = sqlite.insert(KeyValueStoreTable).values(key=key, value=value)
        with storage.connect() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["key"], set_={"value": value}))
        return
    instance.daemon_cursor_storage.set_cursor_values({key: value})


def delete_values(instance: DagsterInstance, keys: Iterable[str]) -> None:
    """Delete keys of Dagster's key-value storage, which itself only adds to them."""
    storage, gone = instance.run_storage, list(keys)
    if gone and isinstance(storage, SqlRunStorage):
        with storage.connect() as connection:
            connection.execute(KeyValueStoreTable.delete().where(KeyValueStoreTable.c.key.in_(gone)))


def failed_for_good(entry: EventLogEntry) -> EventLogEntry:
    """The entry of a step that asks for a retry, as that of one that has failed because it was interrupted."""
    event = entry.dagster_event
    if event is None:
        raise ValueError("not the entry of an event")
    data = StepFailureData(  # type: ignore[no-untyped-call]
        error=event.step_retry_data.error, user_failure_data=None, error_source=ErrorSource.INTERRUPT
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
    return DagsterEvent.step_failure_event(step_context, data)


def read_migration_scripts_once() -> None:
    """Have alembic keep what it has read of Dagster's migration scripts, in this process and its forks.

    For every SQLite file that Dagster opens, and it has one for each run, alembic loads some ninety Python files, two
    or three times; that was half of a short run (measured). The scripts do not change while a process lives.
    """
    read = ScriptDirectory.from_config
    if getattr(read, "keeps", False):
        return
    kept = lru_cache(maxsize=8)(read)

    def from_config(config: Config) -> ScriptDirectory:
        # Dagster makes one configuration for each of its storages and keeps it, so it can be the key. Users'
        # migrations are read as ever: they may change while an op runs.
        ours = (config.get_main_option("script_location") or "").startswith("dagster")
        return kept(config) if ours else read(config)

    from_config.keeps = True  # type: ignore[attr-defined]
    ScriptDirectory.from_config = from_config  # type: ignore[method-assign]


_on_interrupt: Final[list[Callable[[], None]]] = []


def hook_interrupts(hook: Callable[[], None]) -> None:
    """Have `hook` called whenever an interrupt is about to be raised in this process; in the signal handler.

    Dagster's signal handler creates a `DagsterExecutionInterruptedError` exactly when it interrupts code (while
    interrupts are only captured it sets a flag instead), so its constructor is the one place that knows.
    """

    def __init__(self: DagsterExecutionInterruptedError, *args: object) -> None:  # noqa: N807
        note_interrupt()
        BaseException.__init__(self, *args)

    _on_interrupt.append(hook)
    DagsterExecutionInterruptedError.__init__ = __init__  # type: ignore[method-assign, assignment]


def note_interrupt() -> None:
    """An interrupt takes hold without such an error: in a coroutine."""
    for hook in _on_interrupt:
        hook()


def interrupt_coroutines(is_cancelled: Callable[[], bool]) -> None:
    """Have ops that are coroutines cancelled as asyncio does it, at the `await` where they stand.

    Dagster raises its interrupt in the event loop: the coroutine would never be resumed, and none of its `finally`
    blocks run. A cancellation that leaves the coroutine becomes the interrupt that Dagster expects; `is_cancelled`
    tells it from one of the coroutine's own.
    """

    def results(context: Any, async_results: Any) -> Iterator[Any]:
        while True:
            try:
                yield _run_interruptibly(context.event_loop, anext(async_results), is_cancelled)
            except StopAsyncIteration:
                return

    compute.gen_from_async_gen = results  # type: ignore[assignment]


def _run_interruptibly(loop: asyncio.AbstractEventLoop, awaitable: Any, is_cancelled: Callable[[], bool]) -> Any:
    task: asyncio.Future[Any] = asyncio.ensure_future(awaitable, loop=loop)
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        note_interrupt()
        if not interrupted:
            interrupted = True
            loop.call_soon_threadsafe(task.cancel)  # which also wakes the loop

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread():
        _replace_interrupt_signal(interrupt)
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError:
        if interrupted or is_cancelled():
            raise DagsterExecutionInterruptedError from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            _replace_interrupt_signal(before)


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


def deserialize_entry(text: str) -> EventLogEntry:
    """An event log entry from what `serialize_value` made of it."""
    return deserialize_value(text, EventLogEntry)


def unexpected_termination() -> JobFailureData:
    """Why a run failed whose process ended before its time."""
    return JobFailureData(error=None, failure_reason=RunFailureReason.UNEXPECTED_TERMINATION)


def failure_of_a_handler() -> JobFailureData:
    """Why a run failed whose cleanup handlers did."""
    return JobFailureData(error=None, failure_reason=RunFailureReason.RUN_EXCEPTION)


def event_of(entry: EventLogEntry) -> DagsterEvent | None:
    """The Dagster event in an event log entry; None for a plain log line."""
    event = entry.dagster_event
    return event if isinstance(event, DagsterEvent) else None


def outages() -> tuple[type[Exception], ...]:
    """What Dagster's storage raises when its database cannot be reached, or is too busy; it may work again later."""
    errors: list[type[Exception]] = [OperationalError, InterfaceError]
    for module, name in (
        ("dagster_postgres.utils", "DagsterPostgresException"),
        ("dagster_mysql.utils", "DagsterMySQLException"),
    ):
        if module in sys.modules:  # or else that storage is not in use
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def is_stored(instance: DagsterInstance, entry: EventLogEntry) -> bool:
    """Whether the log of its run holds this very event, by its time (in microseconds), step and type."""
    kind = entry.dagster_event_type
    page = instance.get_records_for_run(entry.run_id, of_type=kind, limit=_LOOK_BACK, ascending=False)
    return any(
        (found.timestamp, found.step_key, found.dagster_event_type) == (entry.timestamp, entry.step_key, kind)
        for found in (record.event_log_entry for record in page.records)
    )


def error_info(message: str) -> SerializableErrorInfo:
    """An error for an engine event, without a stack: it is for a person who reads the run's log."""
    return SerializableErrorInfo(message=message, stack=[], cls_name=None)
