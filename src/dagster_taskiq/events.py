"""The wording of every engine event of this package, in one place. Knows no storage.

A terminated run reads: picked up by worker … · Requested Taskiq task cancellation. · cancellation reached worker …
· interrupting pid …: SIGTERM · process tree gone after … s · RUN_CANCELED.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dagster_taskiq.cancellation import CancelChannel, Cancellation

STAGE_KEY: Final = "dagster-taskiq/stage"
WORKER_KEY: Final = "dagster-taskiq/worker"
TASK_ID_KEY: Final = "dagster-taskiq/task_id"

UNKNOWN_AUTHOR: Final = "Dagster UI or API"
TASK_ID_MISSING: Final = "Taskiq task ID missing; unable to cancel run task."
CANCELLATION_REQUESTED: Final = "Requested Taskiq task cancellation."


class Stage(enum.StrEnum):
    """What an event tells, for programs; in the event's metadata under `dagster-taskiq/stage`."""

    SUBMITTED = "submitted"
    PICKED_UP = "picked_up"
    RELEASED = "released"
    REQUESTED = "requested"
    NOT_REQUESTED = "not_requested"
    REACHED = "reached"
    INTERRUPTING = "interrupting"
    KILLED = "killed"
    TREE_GONE = "tree_gone"
    FINISHED_ALL_THE_SAME = "finished_all_the_same"
    LEFT_BEHIND = "left_behind"
    MENDED = "mended"
    SHUT_DOWN = "shut_down"


@dataclass(frozen=True, slots=True)
class Note:
    """One engine event to be. `at` is in seconds since the epoch; None: when it is written."""

    stage: Stage
    message: str
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    at: float | None = None
    error: str | None = None


def submitted(task_id: str, queue: str) -> Note:
    """The launcher has sent the run to its queue."""
    return Note(
        Stage.SUBMITTED, f"Submitted to queue {queue} as task {task_id}", {TASK_ID_KEY: task_id, "queue": queue}
    )


def picked_up(worker_id: str, task_id: str, where: str) -> Note:
    """The claim: its place in the event log decides who owns the run."""
    return Note(
        Stage.PICKED_UP, f"picked up by worker {worker_id} ({where})", {WORKER_KEY: worker_id, TASK_ID_KEY: task_id}
    )


def released(worker_id: str, task_id: str, why: str) -> Note:
    """The worker gives its claim up."""
    return Note(Stage.RELEASED, f"released by worker {worker_id}: {why}", {WORKER_KEY: worker_id, TASK_ID_KEY: task_id})


def requested(task_id: str) -> Note:
    """The cancel message is on its way."""
    return Note(Stage.REQUESTED, CANCELLATION_REQUESTED, {TASK_ID_KEY: task_id, "requested by": UNKNOWN_AUTHOR})


def request_failed(error: str, status_poll_s: float) -> Note:
    """The cancel message could not be sent; the other channel does the work."""
    return Note(
        Stage.NOT_REQUESTED,
        "The cancel message could not be sent; the worker will see the run's status in the database within"
        f" {status_poll_s:g} s of its own polling: {error}",
        error=error,
    )


def no_task_id() -> Note:
    """Nothing of ours can be running this."""
    return Note(Stage.NOT_REQUESTED, TASK_ID_MISSING)


def cancellation_disabled() -> Note:
    """The configuration says that there is no cancellation."""
    return Note(
        Stage.NOT_REQUESTED,
        "Cancellation is disabled (enable_cancellation: false); the run goes on. Enable it in the run launcher's"
        " config_source, or remove DAGSTER_TASKIQ_ENABLE_CANCELLATION from the environment.",
    )


def reached(worker_id: str, cancellation: Cancellation) -> Note:
    """The worker that runs it has heard of it."""
    after = ""
    if cancellation.requested_at is not None:
        after = f" after {max(0, round((cancellation.received_at - cancellation.requested_at) * 1000))} ms"
    how = f"attempt {cancellation.attempt}"
    if cancellation.channel is not CancelChannel.CANCEL_QUEUE:
        how = f"by {cancellation.channel.value}"
    facts: dict[str, str | int | float] = {WORKER_KEY: worker_id, "kind": cancellation.kind.name}
    if cancellation.reason:
        facts["reason"] = cancellation.reason
    if cancellation.requested_by:
        facts["requested by"] = cancellation.requested_by
    what = "cancellation" if cancellation.kind.name == "REQUESTED" else f"{cancellation.kind.name.lower()}"
    return Note(Stage.REACHED, f"{what} reached worker {worker_id}{after} ({how})", facts, cancellation.received_at)


def interrupting(pid: int, grace_s: float, at: float) -> Note:
    """SIGTERM."""
    return Note(Stage.INTERRUPTING, f"interrupting pid {pid}: SIGTERM, then {grace_s:g} s of grace", {"pid": pid}, at)


def killed(pid: int, waited_s: float, at: float) -> Note:
    """SIGKILL."""
    return Note(
        Stage.KILLED,
        f"pid {pid} did not end within {waited_s:g} s: SIGKILL to its whole process tree",
        {"pid": pid},
        at,
    )


def tree_gone(after_s: float, killed_processes: tuple[str, ...], at: float) -> Note:
    """Proof of stop."""
    what = f"; had to kill {', '.join(killed_processes)}" if killed_processes else ""
    return Note(Stage.TREE_GONE, f"process tree gone after {after_s:.3f} s{what}", {"seconds": after_s}, at)


def left_behind(killed_processes: tuple[str, ...]) -> Note:
    """The run ended and left processes that did not."""
    return Note(Stage.LEFT_BEHIND, f"the run left processes behind, which were killed: {', '.join(killed_processes)}")


def finished_all_the_same() -> Note:
    """The cancellation came too late to stop anything."""
    return Note(
        Stage.FINISHED_ALL_THE_SAME, "the run had finished its work before the interrupt could take hold: SUCCESS"
    )


def mended(what: str) -> Note:
    """A late writer had overwritten the final state."""
    return Note(Stage.MENDED, f"{what}: restoring the final state")
