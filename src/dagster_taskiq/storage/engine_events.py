"""The wording of every engine event of this package, in one place. Knows no storage.

A terminated run reads: picked up by worker … · Requested Taskiq task cancellation. · cancellation reached worker …
· interrupting pid …: SIGTERM · process tree gone after … s · RUN_CANCELED.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from dagster_taskiq.cancellation.model import CancelChannel, Cancellation

STAGE_KEY: Final = "dagster-taskiq/stage"
WORKER_KEY: Final = "dagster-taskiq/worker"
TASK_ID_KEY: Final = "dagster-taskiq/task_id"
PATIENCE_KEY: Final = "dagster-taskiq/patience_s"
WHY_KEY: Final = "why"
REASON_KEY: Final = "reason"
BY_KEY: Final = "requested by"
HANDLER_KEY: Final = "handler"
IDENTITY_KEY: Final = "declared on"
ATTEMPT_KEY: Final = "attempt"
ATTEMPTS_KEY: Final = "attempts at most"
NEXT_KEY: Final = "next attempt after_s"
FAILED_KEY: Final = "failed"
OF_KEY: Final = "of"
RETRY_KEY: Final = "may be tried again"
STAYS_KEY: Final = "what still runs"
ENDED_KEY: Final = "step has said how it ended"
GRACE_KEY: Final = "grace_s"
PROCESSES_KEY: Final = "killed processes"
_NAMED_STEPS: Final = 10

UNKNOWN_AUTHOR: Final = "Dagster UI or API"
TASK_ID_MISSING: Final = "Taskiq task ID missing; unable to cancel run task."
CANCELLATION_REQUESTED: Final = "Requested Taskiq task cancellation."


class Stage(enum.StrEnum):
    """What an event reports, for programs; in the event's metadata under `dagster-taskiq/stage`."""

    SUBMITTED = "submitted"
    WAITING = "waiting"
    PICKED_UP = "picked_up"
    RELEASED = "released"
    REQUESTED = "requested"
    NOT_REQUESTED = "not_requested"
    WAITING_FOR_TAKEOVER = "waiting_for_takeover"
    REACHED = "reached"
    INTERRUPTING = "interrupting"
    WAITING_FOR_THREADS = "waiting_for_threads"
    KILLED = "killed"
    TREE_GONE = "tree_gone"
    FINISHED_ALL_THE_SAME = "finished_all_the_same"
    LEFT_BEHIND = "left_behind"
    MENDED = "mended"
    FORWARDING = "forwarding"
    STEPS_STOPPED = "steps_stopped"
    WAITING_FOR_STEPS = "waiting_for_steps"
    STEP_LOST = "step_lost"
    CHILDREN = "children"
    CLEANUP_HANDLERS = "cleanup_handlers"
    CLEANUP_BEGAN = "cleanup_began"
    CLEANUP = "cleanup"
    CLEANUP_ENDED = "cleanup_ended"


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One engine event, before it is written. `at` is in seconds since the epoch; None: the time of writing."""

    stage: Stage
    message: str
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    at: float | None = None
    error: str | None = None


def submitted(task_id: str, queue: str, ignored_tags: Sequence[str] = ()) -> EngineEvent:
    """The launcher has sent the run to its queue. `ignored_tags`: those of the run that are for another launcher."""
    ignored = f"; without effect here: the tags {', '.join(ignored_tags)}" if ignored_tags else ""
    return EngineEvent(
        Stage.SUBMITTED,
        f"Submitted to queue {queue} as task {task_id}{ignored}",
        {TASK_ID_KEY: task_id, "queue": queue},
    )


def waiting(waited_s: float, older: int, why: str) -> EngineEvent:
    """No worker has it yet. `older`: runs that wait and were created before it."""
    message = f"waiting for a worker for {max(0.0, waited_s):.0f} s, older runs that wait: {older}; {why}"
    return EngineEvent(Stage.WAITING, message, {"older runs": older, WHY_KEY: why})


def picked_up(worker_id: str, task_id: str, where: str) -> EngineEvent:
    """The claim: its place in the event log decides who owns the run."""
    return EngineEvent(
        Stage.PICKED_UP, f"picked up by worker {worker_id} ({where})", {WORKER_KEY: worker_id, TASK_ID_KEY: task_id}
    )


def released(worker_id: str, task_id: str, why: str) -> EngineEvent:
    """The worker gives up its claim."""
    return EngineEvent(
        Stage.RELEASED, f"released by worker {worker_id}: {why}", {WORKER_KEY: worker_id, TASK_ID_KEY: task_id}
    )


def requested(task_id: str, reason: str | None, requested_by: str) -> EngineEvent:
    """The cancel message was sent."""
    facts: dict[str, str | int | float] = {TASK_ID_KEY: task_id, BY_KEY: requested_by}
    if reason:
        facts[REASON_KEY] = reason
    return EngineEvent(Stage.REQUESTED, CANCELLATION_REQUESTED, facts)


def cleanup_handlers(names: Sequence[str]) -> EngineEvent:
    """What has to be done if the run is cancelled."""
    return EngineEvent(Stage.CLEANUP_HANDLERS, f"cleanup handlers, should the run be cancelled: {_listed(names)}")


def cleanup_began(worker_id: str, names: Sequence[str]) -> EngineEvent:
    """The work has stopped; the handlers of what was cut short are running."""
    return EngineEvent(
        Stage.CLEANUP_BEGAN, f"cleaning up on worker {worker_id}: {_listed(names)}", {WORKER_KEY: worker_id}
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED_STEPS]) + (", …" if len(names) > _NAMED_STEPS else "")


def cleanup(
    handler: str, identity: str, attempt: int, seconds: float, error: str | None, then: str = ""
) -> EngineEvent:
    """One attempt of one handler. `identity`: see `Handler`. `then`: what happens next when it has failed."""
    facts: dict[str, str | int | float] = {
        HANDLER_KEY: handler,
        IDENTITY_KEY: identity,
        ATTEMPT_KEY: attempt,
        "seconds": round(seconds, 3),
    }
    how = f"(attempt {attempt}, {seconds:.1f} s{f'; {then}' if then else ''})"
    if error is None:
        return EngineEvent(Stage.CLEANUP, f'cleanup "{handler}" succeeded {how}', facts)
    return EngineEvent(
        Stage.CLEANUP, f'cleanup "{handler}" failed {how}: {error}', facts | {FAILED_KEY: error}, error=error
    )


def with_facts(event: EngineEvent, facts: Mapping[str, str | int | float]) -> EngineEvent:
    """The same event with additional facts."""
    return replace(event, facts={**event.facts, **facts})


def cleanup_ended(reasons: Sequence[str]) -> EngineEvent:
    """All handlers have ended. `reasons`: one for each that failed."""
    if not reasons:
        return EngineEvent(Stage.CLEANUP_ENDED, "cleanup finished")
    facts = {FAILED_KEY: "\n".join(reasons)}
    return EngineEvent(Stage.CLEANUP_ENDED, cleanup_failed(reasons), facts, error=cleanup_failed(reasons))


def cleanup_failed(reasons: Sequence[str]) -> str:
    """Why the run is FAILURE and not CANCELED."""
    return f"cleanup failed: {'; '.join(reasons)}"


def request_failed(error: str, status_poll_s: float) -> EngineEvent:
    """The cancel message could not be sent; the second channel has to carry the cancellation."""
    return EngineEvent(
        Stage.NOT_REQUESTED,
        "The cancel message could not be sent; the worker will see the run's status in the database within"
        f" {status_poll_s:g} s of its own polling: {error}",
        error=error,
    )


def waiting_for_takeover(worker_id: str, *, dead: bool) -> EngineEvent:
    """The run is to be stopped, and its worker is dead, or may be: another one has to do it."""
    why = (
        f"its worker {worker_id} is dead;"
        if dead
        else f"the heartbeat of its worker {worker_id} is old; if it is dead,"
    )
    return EngineEvent(
        Stage.WAITING_FOR_TAKEOVER,
        f"{why} another worker finishes the cancellation: the one that receives the run's message, or, if that is"
        " lost, the one that looks for lost runs once a minute",
        {WORKER_KEY: worker_id},
    )


def no_task_id() -> EngineEvent:
    """No worker of ours can have this run."""
    return EngineEvent(Stage.NOT_REQUESTED, TASK_ID_MISSING)


def cancellation_disabled() -> EngineEvent:
    """Cancellation is switched off by the configuration."""
    return EngineEvent(
        Stage.NOT_REQUESTED,
        "Cancellation is disabled (enable_cancellation: false); the run goes on. Enable it in the run launcher's"
        " config_source, or remove DAGSTER_TASKIQ_ENABLE_CANCELLATION from the environment.",
    )


def reached(worker_id: str, cancellation: Cancellation) -> EngineEvent:
    """The cancellation has reached the worker that has the run."""
    after = ""
    if cancellation.requested_at is not None:
        after = f" after {max(0, round((cancellation.received_at - cancellation.requested_at) * 1000))} ms"
    how = f"attempt {cancellation.attempt}"
    if cancellation.channel is not CancelChannel.CANCEL_QUEUE:
        how = f"by {cancellation.channel.value}"
    facts: dict[str, str | int | float] = {WORKER_KEY: worker_id, "kind": cancellation.kind.name}
    if cancellation.reason:
        facts[REASON_KEY] = cancellation.reason
    if cancellation.cause:
        facts[WHY_KEY] = cancellation.cause
    if cancellation.requested_by:
        facts[BY_KEY] = cancellation.requested_by
    what = "cancellation" if cancellation.kind.name == "REQUESTED" else f"{cancellation.kind.name.lower()}"
    return EngineEvent(
        Stage.REACHED, f"{what} reached worker {worker_id}{after} ({how})", facts, cancellation.received_at
    )


def interrupting(pid: int, grace_s: float, at: float) -> EngineEvent:
    """The leader gets SIGTERM."""
    return EngineEvent(
        Stage.INTERRUPTING,
        f"interrupting pid {pid}: SIGTERM, then {grace_s:g} s of grace",
        {"pid": pid, GRACE_KEY: grace_s},
        at,
    )


def killed(pid: int, waited_s: float, shield: str | None, at: float) -> EngineEvent:
    """The process tree gets SIGKILL. `shield`: the name of the one in which the op was."""
    inside = f" (inside the shield {shield!r})" if shield is not None else ""
    facts: dict[str, str | int | float] = {"pid": pid}
    if shield is not None:
        facts["shield"] = shield
    return EngineEvent(
        Stage.KILLED,
        f"pid {pid} did not end within {waited_s:.3g} s{inside}: SIGKILL to its whole process tree",
        facts,
        at,
    )


def waiting_for_threads(pid: int, stays: Sequence[str], patience_s: float, at: float) -> EngineEvent:
    """The work is over, and its process is not. `stays`: the names of what it waits for."""
    what = _what_stays(stays)
    return EngineEvent(
        Stage.WAITING_FOR_THREADS,
        f"the work is over, and pid {pid} waits for {what}; at most {patience_s:g} s (exit_patience_seconds), or until"
        " somebody terminates it",
        {"pid": pid, STAYS_KEY: what},
        at,
    )


def threads_killed(pid: int, waited_s: float, stays: Sequence[str], at: float) -> EngineEvent:
    """The work was over, and the process tree gets SIGKILL all the same: threads of it did not end."""
    what = _what_stays(stays)
    return EngineEvent(
        Stage.KILLED,
        f"the work of pid {pid} was over, but after {waited_s:.3g} s it still waited for {what}: SIGKILL to its whole"
        " process tree",
        {"pid": pid, STAYS_KEY: what},
        at,
    )


def _what_stays(stays: Sequence[str]) -> str:
    # Nothing that has a name: exit handlers, or a thread of a pool that was started by a daemonic one.
    return f"threads that still run: {', '.join(stays)}" if stays else "its exit handlers"


def tree_gone(
    after_s: float | None, killed_processes: tuple[str, ...], at: float, *, ended: bool | None = None
) -> EngineEvent:
    """Proof of stop. `after_s`: since the interrupt, if there was one.

    `ended` is for steps only: whether the step has reported how it ended; if not, `step_lost` follows.
    """
    after = f" after {after_s:.3f} s" if after_s is not None else ""
    what = f"; had to kill {', '.join(killed_processes)}" if killed_processes else ""
    facts: dict[str, str | int | float] = {}
    if after_s is not None:
        facts["seconds"] = after_s
    if ended is not None:
        facts[ENDED_KEY] = int(ended)
    if killed_processes:
        facts[PROCESSES_KEY] = ", ".join(killed_processes)
    return EngineEvent(Stage.TREE_GONE, f"process tree gone{after}{what}", facts, at)


def left_behind(killed_processes: tuple[str, ...]) -> EngineEvent:
    """The run ended, and some of its processes did not."""
    return EngineEvent(
        Stage.LEFT_BEHIND, f"the run left processes behind, which were killed: {', '.join(killed_processes)}"
    )


def finished_all_the_same() -> EngineEvent:
    """The cancellation came too late to stop anything."""
    return EngineEvent(
        Stage.FINISHED_ALL_THE_SAME, "the run had finished its work before the interrupt could take hold: SUCCESS"
    )


def restored(what: str) -> EngineEvent:
    """A late writer had overwritten the final state."""
    return EngineEvent(Stage.MENDED, f"{what}: restoring the final state")


def step_submitted(task_id: str, queue: str) -> EngineEvent:
    """The executor has sent a step to its queue."""
    return EngineEvent(
        Stage.SUBMITTED, f"Submitted to queue {queue} as task {task_id}", {TASK_ID_KEY: task_id, "queue": queue}
    )


def forwarding(steps: Sequence[str], patience_s: float) -> EngineEvent:
    """The run is being stopped, and its executor forwards that to the running steps."""
    which = f" ({_listed(steps)})" if steps else ""
    return EngineEvent(
        Stage.FORWARDING,
        f"forwarding the interrupt to {len(steps)} steps{which}; waiting for them to stop, at most {patience_s:g} s",
        {"steps": len(steps), PATIENCE_KEY: patience_s},
    )


def steps_stopped(steps: int, after_s: float) -> EngineEvent:
    """All running steps have stopped."""
    return EngineEvent(Stage.STEPS_STOPPED, f"{steps} steps stopped after {after_s:.3f} s", {"steps": steps})


def steps_not_stopped(steps: Sequence[str], waited_s: float) -> EngineEvent:
    """Some steps had not stopped within the limit."""
    return EngineEvent(
        Stage.STEPS_STOPPED,
        f"{len(steps)} steps had not stopped after {waited_s:.1f} s and are no longer waited for; their workers stop"
        f" them as soon as they see that the run is over: {', '.join(steps[:_NAMED_STEPS])}",
        {"steps": len(steps)},
        error="not all steps have stopped",
    )


def waiting_for_steps(steps: Sequence[str]) -> EngineEvent:
    """All steps have ended, but not all of their processes."""
    return EngineEvent(
        Stage.WAITING_FOR_STEPS,
        f"waiting for {len(steps)} steps to run their hooks and to give back their resources: {_listed(steps)}",
        {"steps": len(steps)},
    )


def step_lost(worker_id: str, task_id: str, why: str, *, retry: bool) -> EngineEvent:
    """The step's process is gone and has not reported how the step ended; its run decides what follows."""
    facts: dict[str, str | int | float] = {WORKER_KEY: worker_id, TASK_ID_KEY: task_id, WHY_KEY: why, RETRY_KEY: retry}
    return EngineEvent(Stage.STEP_LOST, f"step lost on worker {worker_id}: {why}", facts)


def cancelling_children(run_ids: Sequence[str]) -> EngineEvent:
    """The run is being stopped, and takes the runs with it that it launched."""
    many = "1 run" if len(run_ids) == 1 else f"{len(run_ids)} runs"
    message = f"cancelling {many} that this run launched: {_listed(run_ids)}"
    return EngineEvent(Stage.CHILDREN, message, {"runs": len(run_ids)})


def children_final(runs: int, after_s: float) -> EngineEvent:
    """All of them have ended."""
    return EngineEvent(Stage.CHILDREN, f"all of them final after {after_s:.1f} s", {"runs": runs})


def children_not_final(run_ids: Sequence[str], waited_s: float, why: str | None) -> EngineEvent:
    """Some of them had not ended within the limit. `why`: what is known of one of them."""
    because = f" ({why})" if why else ""
    return EngineEvent(
        Stage.CHILDREN,
        f"{len(run_ids)} runs that this run launched were not final after {waited_s:.1f} s and are no longer waited"
        f" for: {_listed(run_ids)}{because}",
        {"runs": len(run_ids)},
        error="not all runs that it launched have ended",
    )
