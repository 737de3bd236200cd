"""The wording of every engine event of this package, in one place. Knows no storage.

A terminated run reads: picked up by worker … · Requested Taskiq task cancellation. · cancellation reached worker …
· interrupting pid …: SIGTERM · process tree gone after … s · RUN_CANCELED.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from dagster_taskiq.cancellation import CancelChannel, Cancellation

STAGE_KEY: Final = "dagster-taskiq/stage"
WORKER_KEY: Final = "dagster-taskiq/worker"
TASK_ID_KEY: Final = "dagster-taskiq/task_id"
PATIENCE_KEY: Final = "dagster-taskiq/patience_s"
WHY_KEY: Final = "why"
RETRY_KEY: Final = "may be tried again"
_NAMED_STEPS: Final = 10

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
    FORWARDING = "forwarding"
    STEPS_STOPPED = "steps_stopped"
    STEP_LOST = "step_lost"


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
        f"pid {pid} did not end within {waited_s:.3g} s: SIGKILL to its whole process tree",
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


def step_submitted(task_id: str, queue: str) -> Note:
    """The executor has sent a step to its queue."""
    return Note(
        Stage.SUBMITTED, f"Submitted to queue {queue} as task {task_id}", {TASK_ID_KEY: task_id, "queue": queue}
    )


def forwarding(steps: Sequence[str], patience_s: float) -> Note:
    """The run is being stopped, and its executor passes it on to the steps that are at work."""
    which = f" ({', '.join(steps[:_NAMED_STEPS])}{', …' if len(steps) > _NAMED_STEPS else ''})" if steps else ""
    return Note(
        Stage.FORWARDING,
        f"forwarding the interrupt to {len(steps)} steps{which}; waiting for them to stop, at most {patience_s:g} s",
        {"steps": len(steps), PATIENCE_KEY: patience_s},
    )


def steps_stopped(steps: int, after_s: float) -> Note:
    """All steps that were at work have stopped."""
    return Note(Stage.STEPS_STOPPED, f"{steps} steps stopped after {after_s:.3f} s", {"steps": steps})


def steps_not_stopped(steps: Sequence[str], waited_s: float) -> Note:
    """The bound was hit."""
    return Note(
        Stage.STEPS_STOPPED,
        f"{len(steps)} steps had not stopped after {waited_s:.1f} s and are no longer waited for; their workers stop"
        f" them as soon as they see that the run is over: {', '.join(steps[:_NAMED_STEPS])}",
        {"steps": len(steps)},
        error="not all steps have stopped",
    )


def step_lost(worker_id: str, task_id: str, why: str, *, retry: bool) -> Note:
    """The step's process is gone and has not said how the step ended; its run decides what follows."""
    facts: dict[str, str | int | float] = {WORKER_KEY: worker_id, TASK_ID_KEY: task_id, WHY_KEY: why, RETRY_KEY: retry}
    return Note(Stage.STEP_LOST, f"step lost on worker {worker_id}: {why}", facts)
