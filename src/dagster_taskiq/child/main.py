"""What runs inside the child: handlers first, then the fence, then Dagster. Knows Dagster; not asyncio, not SQS.

The *fence*: once this process has to stop, for whatever reason, it writes no terminal run event itself. It hands
its verdict to the supervisor, which writes the final state when the whole process tree is gone. A step's process
writes how its step ended, unless its worker is gone: then the run decides what becomes of the step.
"""

import importlib
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from dagster import DagsterInstance

from dagster_taskiq._last_words import print_traceback
from dagster_taskiq._text import clean_text
from dagster_taskiq.child.child_process import ChildProcess
from dagster_taskiq.child.control_channel import ControlChannel
from dagster_taskiq.child.current_step import StepOfRun
from dagster_taskiq.child.event_fence import RunFence, StepFence
from dagster_taskiq.child.stays import tell_what_stays
from dagster_taskiq.child.step_process import tell_in_step_processes
from dagster_taskiq.cleanup.runner import Cleanup
from dagster_taskiq.dagster_compat.api import InstanceRef, deserialize_value
from dagster_taskiq.dagster_compat.child_instance import open_in_child
from dagster_taskiq.dagster_compat.console import limit_console
from dagster_taskiq.dagster_compat.execution import RetryMode, execute_run, execute_step, rebuild_state, resume_run
from dagster_taskiq.dagster_compat.interrupts import capture_interrupts
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.storage import read_migration_scripts_once
from dagster_taskiq.messages import StepMessage, unpack

WARM_UP: Final = "dagster_taskiq.child.main:warm_up"
RUN_TARGET: Final = "dagster_taskiq.child.main:run"
STEP_TARGET: Final = "dagster_taskiq.child.main:step"
CLEANUP_TARGET: Final = "dagster_taskiq.child.main:cleanup"
PRELOAD: Final = (
    "dagster_taskiq.child.main",
    "dagster_taskiq.executor",
    # Imported where they are used, which in a child is always, or nearly.
    "dagster_taskiq.cancellable_broker",
    "dagster._cli.api",
)
_LONGEST_ERROR: Final = 2000
_INTERRUPTS: Final = {signal.SIGTERM, signal.SIGINT}
_BODIES: Final = {"execute_run": execute_run, "resume_run": resume_run}


def warm_up(instance_ref: str) -> None:
    """Runs in the fork server: open the instance once and close it again, so that forks find everything imported.

    Leaves no connection and no thread behind.
    """
    read_migration_scripts_once()
    with DagsterInstance.from_ref(deserialize_value(instance_ref, InstanceRef)) as instance:
        instance.get_run_by_id("warm-up")
        with suppress(Exception):  # a storage that has never seen this run may raise
            instance.all_logs("warm-up")


def run(argument: dict[str, Any], channel: socket.socket) -> int:
    """Execute or resume the run that `argument` names. Starts with SIGTERM and SIGINT blocked; returns an exit code."""
    return _work(_run, argument, channel)


def step(argument: dict[str, Any], channel: socket.socket) -> int:
    """Execute the step that `argument` names. Starts with SIGTERM and SIGINT blocked; returns an exit code."""
    return _work(_step, argument, channel)


def cleanup(argument: dict[str, Any], channel: socket.socket) -> int:
    """Run the cleanup handlers of the run that `argument` names. Starts with SIGTERM and SIGINT blocked, as `run`."""
    return _work(_cleanup, argument, channel)


def _work(body: Callable[[dict[str, Any], DagsterInstance, ControlChannel], int], argument: Any, channel: Any) -> int:
    control = ControlChannel(channel)
    for interrupt in _INTERRUPTS:
        # For the exit, after the block. It is not enough that this thread blocks them: those of the op do not.
        signal.signal(interrupt, _come_too_late)
    with capture_interrupts():
        # From here on a signal is either captured (and seen at the next step) or raised inside the op.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        try:
            limit_console(argument["log_level"])
            read_migration_scripts_once()
            importlib.invalidate_caches()  # a folder that was not there when the worker began may be by now
            reference = deserialize_value(argument["instance_ref"], InstanceRef)
            with open_in_child(reference) as instance:
                return body(argument, instance, control)
        except BaseException as error:  # noqa: BLE001 - the supervisor decides what it means; nothing may be lost
            print_traceback()
            control.send(error=clean_text(f"{type(error).__name__}: {error}", _LONGEST_ERROR))
            return 1
        finally:
            # What comes now comes too late to matter, and must not tear the exit.
            signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
            control.send(finished=True)
            tell_what_stays(control.send)


def _come_too_late(*_: object) -> None:
    """Nothing. Ignored, the signal would also be ignored by programs that a thread of the op may still start."""


def _run(argument: dict[str, Any], instance: DagsterInstance, control: ControlChannel) -> int:
    run_id = argument["run_id"]
    process = ChildProcess(control)
    tell_in_step_processes()
    instance.handle_new_event = RunFence(instance, run_id, process)  # type: ignore[method-assign]
    return _BODIES[argument["kind"]](run_id, instance)


def _step(argument: dict[str, Any], instance: DagsterInstance, control: ControlChannel) -> int:
    message = StepMessage.from_kwargs(argument["message"])
    run = retry_storage(lambda: instance.get_run_by_id(message.run_id), "read the run")
    if run is None:
        raise LookupError(f"run {message.run_id} was deleted")
    process = ChildProcess(control, StepOfRun(instance, message.run_id, message.step_key))
    fence = instance.handle_new_event = StepFence(instance, message, process)  # type: ignore[method-assign]
    state = rebuild_state(unpack(message.state or ""), run, instance, history=message.reexecution)
    # Dagster's own look whether the step was started before counts starts, and takes one that begins again after an
    # interruption for a second one. The claim has decided.
    look = not message.begins_again
    for _ in execute_step(run, instance, message.step_key, state, RetryMode(message.retries), should_verify_step=look):
        pass  # the events are in the database; nobody reads them here
    fence.forget_state()
    return 0


def _cleanup(argument: dict[str, Any], instance: DagsterInstance, control: ControlChannel) -> int:
    run = retry_storage(lambda: instance.get_run_by_id(argument["run_id"]), "read the run")
    if run is not None:
        cleanup = Cleanup(instance, run, argument["worker_id"], tell=lambda what: control.send(cleaning=what))
        if "step_key" in argument:
            outcome = cleanup.run_for_step(argument["step_key"], argument["reason"])
        else:
            outcome = cleanup.run()
        control.send(cleaned=not outcome.stopped)
    return 0
