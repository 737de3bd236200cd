"""Cancel a run with a reason, and run its cleanup handlers by hand: for programs, as the command line does it.

Knows Dagster's runs and the launcher; not SQS, not processes.
"""

import asyncio
import getpass
import logging
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq._text import clean_text
from dagster_taskiq.cancellation.model import CancelOutcome
from dagster_taskiq.cleanup.record import cleanup_record
from dagster_taskiq.cleanup.runner import Cleanup
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.instance import open_instance
from dagster_taskiq.dagster_compat.interrupts import capture_interrupts
from dagster_taskiq.dagster_compat.storage import run_ids_beginning_with
from dagster_taskiq.errors import CleanupFailed, DagsterTaskiqError, RunNotFound
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.sqs.admin import identity
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, add_own_tags

logger = logging.getLogger(__name__)

_IDENTITY_WITHIN_S: Final = 2.0
_SHORTEST_BEGINNING: Final = 8
"""What `worker list` prints of an id."""
_NAMED_RUNS: Final = 3


def this_user() -> str:
    """Who runs this process, as far as the operating system knows: "ada@host"."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def describe_user(instance: DagsterInstance) -> str:
    """As `this_user`. When that is root, or has no name, as in a container: the IAM identity, if AWS answers.

    One request to AWS, of two seconds at most, and none to an emulator.
    """
    user = this_user()
    settings = launcher_of(instance).settings
    if not user.startswith(("root@", "unknown@")) or settings.endpoint_url is not None:
        return user
    try:
        return asyncio.run(asyncio.wait_for(identity(settings.region_name), _IDENTITY_WITHIN_S))
    except Exception:  # noqa: BLE001 - whatever it is, who asks is less important than that it is done
        return user


def status_poll_s(instance: DagsterInstance) -> float:
    """How long it takes a worker, at most, to see in the database that its run is to be stopped."""
    return launcher_of(instance).settings.status_poll_seconds


def cancel_run(
    run_id: str, *, reason: str | None = None, requested_by: str | None = None, instance: DagsterInstance | None = None
) -> bool:
    """Stop a run, as Terminate in Dagster's UI does it, with a reason and an author.

    Both are in the run's event log, in its op's token, in the context of its cleanup handlers, and in its tags
    `dagster-taskiq/cancel_reason` and `dagster-taskiq/cancelled_by`.
    `requested_by`: default `this_user()`. `instance`: default that of `$DAGSTER_HOME`.

    Returns at once. True: the run is being stopped. False: it is finished already, or cannot be stopped. Raises
    `RunNotFound`, and `DagsterTaskiqError` when the instance has another run launcher. A database that does not answer
    makes it raise, not hang; without the database's driver it is `DriverMissing`.
    """
    return request_cancel(run_id, reason=reason, requested_by=requested_by, instance=instance).stops


def request_cancel(
    run_id: str, *, reason: str | None = None, requested_by: str | None = None, instance: DagsterInstance | None = None
) -> CancelOutcome:
    """As `cancel_run`, and tells what came of it."""
    with ExitStack() as stack:
        instance = instance or stack.enter_context(open_instance())
        run, launcher = _run(instance, run_id), launcher_of(instance)
        by = clean_text(requested_by or this_user())
        if run.status is not DagsterRunStatus.QUEUED:
            return launcher.request_cancel(run_id, reason=reason, requested_by=by)
        # Only the run coordinator can take it from its queue. If the run was launched meanwhile, it calls the launcher.
        reason = clean_text(reason) if reason else None
        tags = {CANCEL_REASON_TAG: reason} if reason else {}
        try:
            add_own_tags(instance, run, {**tags, CANCELLED_BY_TAG: by})
            append_event(instance, run, engine_events.requested("none yet", reason, by))
        except Exception:  # whatever it is: the run is to be stopped, with or without them
            logger.exception("why the run was cancelled could not be written", extra={"run_id": run_id})
        stopped = instance.run_coordinator.cancel_run(run_id)
        withdrawn = _run(instance, run_id).status is DagsterRunStatus.CANCELED
        return CancelOutcome.NOTHING if not stopped else CancelOutcome.WITHDRAWN if withdrawn else CancelOutcome.ASKED


def find_run_id(instance: DagsterInstance, given: str) -> str:
    """The id of the run that is meant by its id, or by the beginning of it, of eight characters or more.

    Raises `RunNotFound` when there is no such run, and `DagsterTaskiqError` when there are several.
    """
    if instance.has_run(given):
        return given
    found = run_ids_beginning_with(instance, given, _NAMED_RUNS + 1) if len(given) >= _SHORTEST_BEGINNING else []
    if not found:
        raise RunNotFound(f"there is no run {given} in this Dagster instance; is DAGSTER_HOME the right one?")
    if len(found) > 1:
        more = ", …" if len(found) > _NAMED_RUNS else ""
        raise DagsterTaskiqError(
            f"several runs begin with {given} ({', '.join(found[:_NAMED_RUNS])}{more}); give more of the id"
        )
    return found[0]


def clean_up_run(
    run_id: str,
    *,
    instance: DagsterInstance | None = None,
    tell: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> bool:
    """Run the cleanup handlers of a cancelled run in this process: those that have failed, or have not run.

    Use it after you have fixed the cause of the failure. Each handler has all its attempts again; one that has
    succeeded is not called again. When all have succeeded, a run that was a FAILURE because of them becomes CANCELED.
    The run's code must be importable here, as on a worker; main thread only. `tell` is called when an attempt begins.

    Returns False when there is nothing to do. Raises `RunNotFound`, `CleanupFailed`, and `DagsterTaskiqError` as long
    as a worker has the run. On SIGINT or SIGTERM it raises `KeyboardInterrupt`.
    """
    with ExitStack() as stack:
        instance = instance or stack.enter_context(open_instance())
        run, launcher = _run(instance, run_id), launcher_of(instance)
        claims = Claims(instance, Heartbeats.of_runs(instance, launcher.settings))
        owner = claims.owner(run_id)
        if run.status not in FINISHED_STATUSES:
            who = f"worker {owner.worker_id} has it" if owner is not None else "no worker has it yet"
            raise DagsterTaskiqError(f"run {run_id} is {run.status.value}, and {who}; cancel it, and wait for its end")
        record = cleanup_record(instance, run_id)
        cancelled = run.status is DagsterRunStatus.CANCELED
        if not record.failures and not (cancelled and record.due):
            return False
        if cancelled and record.due and owner is not None and owner.in_doubt:
            time.sleep(claims.heartbeats.confirm_s)  # one look cannot tell that a worker is dead
            owner = claims.owner(run_id)
        if cancelled and record.due and owner is not None and owner.alive:
            raise DagsterTaskiqError(f"worker {owner.worker_id} is cleaning up after run {run_id}; wait for its end")
        with capture_interrupts():
            outcome = Cleanup(instance, run, f"by hand, {this_user()}", anew=True, tell=tell).run()
        if outcome.stopped:
            raise KeyboardInterrupt
        if outcome.failures:
            raise CleanupFailed(outcome.failures)
        if run.status is DagsterRunStatus.FAILURE:
            instance.report_run_canceled(run, "The cleanup was made up for by hand, so the run is canceled.")
        return True


def _run(instance: DagsterInstance, run_id: str) -> DagsterRun:
    run = instance.get_run_by_id(run_id)
    if run is None:
        raise RunNotFound(f"there is no run {run_id} in this Dagster instance; is DAGSTER_HOME the right one?")
    return run


def launcher_of(instance: DagsterInstance) -> TaskiqRunLauncher:
    """The launcher of that instance. Raises `DagsterTaskiqError` when it is another one."""
    launcher = instance.run_launcher
    if not isinstance(launcher, TaskiqRunLauncher):
        raise DagsterTaskiqError(
            f"the run launcher of this instance is {type(launcher).__name__}; this is for runs of TaskiqRunLauncher;"
            " is DAGSTER_HOME the right one?"
        )
    return launcher
