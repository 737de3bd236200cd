"""What this package uses of Dagster's private parts: these tests say when they move."""

import hashlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    GraphDefinition,
    OpDefinition,
)
from dagster._cli.api import _execute_run_command_body, _execute_step_command_body, _resume_run_command_body
from dagster._core.events.log import EventLogEntry
from dagster._core.execution import api, backfill, context_creation_job
from dagster._core.execution.plan import compute, execute_plan
from dagster._core.executor import multiprocess
from dagster._core.storage.dagster_run import CANCELABLE_RUN_STATUSES
from dagster._core.storage.runs.sqlite.sqlite_run_storage import __file__ as run_storage_module
from dagster._core.storage.sql import get_alembic_config
from dagster._daemon.monitoring import run_monitoring
from dagster._daemon.run_coordinator import QueuedRunCoordinatorDaemon
from dagster_graphql.implementation import execution
from dagster_graphql.schema import backfill as graphql_backfill

from dagster_taskiq.cancellation.handlers import ATTRIBUTE
from dagster_taskiq.dagster_compat.api import RESUME_RUN_LOG_MESSAGE, serialize_value
from dagster_taskiq.dagster_compat.cancelable import let_starting_runs_be_terminated
from dagster_taskiq.dagster_compat.definitions import let_copies_keep
from dagster_taskiq.dagster_compat.execution import ActiveExecution, KnownExecutionState, StepDelegatingExecutor
from dagster_taskiq.dagster_compat.run_monitoring import _MARKS
from dagster_taskiq.dagster_compat.run_queue import DAEMON_OF_THE_QUEUE
from dagster_taskiq.dagster_compat.storage import deserialize_entry, read_migration_scripts_once


def test_all_of_dagster_asks_one_list_which_runs_may_be_terminated() -> None:
    """Its GraphQL terminates what is in it, and its backfills cancel that."""
    let_starting_runs_be_terminated()
    let_starting_runs_be_terminated()
    assert CANCELABLE_RUN_STATUSES.count(DagsterRunStatus.STARTING) == 1
    for user in (backfill, execution):
        assert user.CANCELABLE_RUN_STATUSES is CANCELABLE_RUN_STATUSES, user.__name__
    # The list of a backfill's runs asks it since Dagster 1.13.4, and each run before.
    own = getattr(graphql_backfill, "CANCELABLE_RUN_STATUSES", CANCELABLE_RUN_STATUSES)
    assert own is CANCELABLE_RUN_STATUSES
    assert DagsterRun("a_job", status=DagsterRunStatus.STARTING).is_cancelable


def test_what_copies_ops_and_graphs() -> None:
    """Each is wrapped once; `configured` and all else that copies goes through them, and a graph keeps its function."""
    let_copies_keep(ATTRIBUTE)
    let_copies_keep(ATTRIBUTE)
    for kind, method, caller in (
        (OpDefinition, "with_replaced_properties", "copy_for_configured"),
        (GraphDefinition, "copy", "copy_for_configured"),
    ):
        assert inspect.unwrap(getattr(kind, method)) is getattr(kind, method).__wrapped__
        assert f"self.{method}(" in inspect.getsource(getattr(kind, caller))
    assert "self._composition_fn" in inspect.getsource(vars(GraphDefinition)["composition_fn"].fget)


def test_the_loop_over_the_steps_calls_what_we_watch() -> None:
    """By their names in its module, with the step's context first; and a process of a step is given its one step."""
    loop = inspect.getsource(execute_plan.inner_plan_execution_iterator)
    assert "check.generator(dagster_event_sequence_for_step(step_context))" in loop
    assert "yield from _trigger_hook(step_context, step_event_list)" in loop
    process = inspect.getsource(multiprocess.MultiprocessExecutorChildProcessCommand.execute)
    assert "step_keys_to_execute=[self.step_key]" in process
    assert "yield from execute_plan_iterator(" in process
    assert "instance=instance" in process


def test_the_bodies_of_the_commands_take_what_we_give() -> None:
    for body in (_execute_run_command_body, _resume_run_command_body):
        assert list(inspect.signature(body).parameters) == [
            "run_id",
            "instance",
            "write_stream_fn",
            "set_exit_code_on_failure",
        ]


def test_the_body_of_the_steps_command_takes_what_we_give() -> None:
    assert list(inspect.signature(_execute_step_command_body).parameters) == ["args", "instance", "dagster_run"]


def test_all_that_a_step_knows_of_the_others_is_described() -> None:
    """A new field would have to be sent along, or taken from the run's plan."""
    described = {"previous_retry_attempts", "dynamic_mappings", "ready_outputs"}
    from_the_plan = {"step_output_versions", "parent_state"}
    assert set(KnownExecutionState._fields) == described | from_the_plan


def test_the_plan_at_work_has_the_methods_that_our_loop_calls() -> None:
    ours = {
        "check_for_interrupts",
        "concurrency_event_iterator",
        "get_known_state",
        "get_steps_to_execute",
        "handle_event",
        "mark_interrupted",
        "plan_events_iterator",
        "rebuild_from_events",
        "verify_complete",
    }
    assert ours <= {name for name, _ in inspect.getmembers(ActiveExecution, inspect.isfunction)}
    for name in ("is_complete", "has_in_flight_steps", "retry_state"):
        assert isinstance(inspect.getattr_static(ActiveExecution, name), property), name
    assert list(inspect.signature(ActiveExecution.get_steps_to_execute).parameters) == ["self", "limit"]
    assert list(inspect.signature(StepDelegatingExecutor.log_failure_or_retry_event_after_error).parameters) == [
        "self",
        "step_context",
        "err_info",
        "known_state",
    ]


def test_dagsters_own_loop_is_still_the_one_that_ours_differs_from() -> None:
    """Our loop is written after this one. When it changes: read it, take over what is good, put the new digest here."""
    source = inspect.getsource(StepDelegatingExecutor.execute)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "478b66d7f14b93ff", source


def test_every_interrupt_comes_to_us_with_what_dagster_wants_done() -> None:
    """In a process of its own: it takes over the handlers."""
    script = """
import signal
from dagster._utils.interrupts import capture_interrupts, check_captured_interrupt, raise_interrupts_as
from dagster_taskiq.dagster_compat.interrupts import route_interrupts

def through(wanted):
    try:
        wanted()
    except ValueError:
        print("raised")
        raise
    print("noted" if check_captured_interrupt() else "ignored")

signal.signal(signal.SIGINT, lambda *_: None)
route_interrupts(through)
with capture_interrupts():
    signal.raise_signal(signal.SIGTERM)
    try:
        with raise_interrupts_as(ValueError):  # what was noted before
            print("unreachable")
    except ValueError:
        print(check_captured_interrupt())
    signal.raise_signal(signal.SIGINT)  # the handler from before is there again
    with capture_interrupts():
        print(check_captured_interrupt())
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.split() == ["noted", "raised", "False", "noted", "noted", "True", "ignored"], done


def test_the_coroutines_of_ops_are_run_where_we_replace_it() -> None:
    source = inspect.getsource(compute._yield_compute_results)
    assert "= gen_from_async_gen(step_context, user_event_generator)" in source
    assert "context.event_loop.run_until_complete(async_gen.__anext__())" in inspect.getsource(compute)


def test_every_event_passes_through_one_method_of_the_instance() -> None:
    """The fence stands there."""
    instance = DagsterInstance.ephemeral()
    seen: list[object] = []
    instance.handle_new_event = lambda event, *, batch_metadata=None: seen.append(event)  # type: ignore[method-assign]
    event = DagsterEvent(DagsterEventType.RUN_SUCCESS.value, "job", message="")
    instance.report_dagster_event(event, "run")
    assert len(seen) == 1
    parameters = inspect.signature(DagsterInstance.handle_new_event).parameters
    assert list(parameters) == ["self", "event", "batch_metadata"]


def test_an_event_log_entry_survives_its_way_through_the_channel() -> None:
    instance = DagsterInstance.ephemeral()
    seen: list[EventLogEntry] = []
    instance.handle_new_event = lambda event, *, batch_metadata=None: seen.append(event)  # type: ignore[method-assign]
    instance.report_dagster_event(DagsterEvent(DagsterEventType.RUN_SUCCESS.value, "job", message="done"), "run")
    assert deserialize_entry(serialize_value(seen[0])) == seen[0]


def test_dagster_still_counts_resumes_by_the_message_that_we_write() -> None:
    assert RESUME_RUN_LOG_MESSAGE == run_monitoring.RESUME_RUN_LOG_MESSAGE
    assert "RESUME_RUN_LOG_MESSAGE" in inspect.getsource(run_monitoring.count_resume_run_attempts)


def test_run_monitoring_still_says_so_when_it_stops_a_run_that_is_too_slow() -> None:
    assert f'message=f"{_MARKS}' in inspect.getsource(run_monitoring.check_run_timeout)


def test_dagster_itself_still_decides_by_the_status_when_a_run_worker_starts() -> None:
    """The reasons for our admit_run: should Dagster change its mind, look at the table again."""
    source = inspect.getsource(api.execute_run_iterator)
    assert "RUN_WORKER_RESTART" in source
    assert "DagsterRunStatus.CANCELED" in source


def test_the_status_transitions_are_still_unguarded() -> None:
    """The reason for writing first and looking afterwards, on both sides."""
    instance = DagsterInstance.ephemeral()
    from dagster import job

    @job
    def nothing() -> None: ...

    run = instance.create_run_for_job(nothing)
    instance.report_run_canceled(run)
    instance.report_dagster_event(DagsterEvent(DagsterEventType.RUN_SUCCESS.value, "nothing", message=""), run.run_id)
    after = instance.get_run_by_id(run.run_id)
    assert after is not None
    assert after.status.value == "SUCCESS", "Dagster guards CANCELED now: late_events.py can go"


def test_dagsters_migration_scripts_are_read_once_and_users_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads: list[str] = []

    def read(config: Config) -> object:
        reads.append(config.get_main_option("script_location") or "")
        return object()

    monkeypatch.setattr(ScriptDirectory, "from_config", read)
    read_migration_scripts_once()
    read_migration_scripts_once()
    theirs, dagsters = Config(), get_alembic_config(run_storage_module)
    theirs.set_main_option("script_location", str(tmp_path))
    for _ in range(3):
        ScriptDirectory.from_config(theirs)
        ScriptDirectory.from_config(dagsters)
    assert reads.count(str(tmp_path)) == 3
    assert len(reads) == 4, reads


def test_default_loggers_and_processes_of_steps_are_made_where_we_replace_them() -> None:
    assert "in default_system_loggers(instance):" in inspect.getsource(context_creation_job)
    assert "in execute_child_process_command(multiproc_ctx, command):" in inspect.getsource(multiprocess)


def test_what_holds_a_run_back_is_asked_of_the_counters_that_the_daemon_asks() -> None:
    """When its look at the queue changes: read it, and put the new digest here."""
    source = inspect.getsource(QueuedRunCoordinatorDaemon._get_runs_to_dequeue)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "42a4e3896cae3740", source
    assert QueuedRunCoordinatorDaemon.daemon_type() == DAEMON_OF_THE_QUEUE
