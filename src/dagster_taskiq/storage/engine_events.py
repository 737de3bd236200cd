"""What an engine event of this package is, and the wording of those about a run. Knows no storage.

Those about steps are in `step_events`, those about cleanup handlers in `cleanup_events`. A terminated run reads:
picked up by worker … · Requested Taskiq task cancellation. By … · cancellation reached worker …, by … · interrupting
pid …: SIGTERM · process tree gone after … · RUN_CANCELED.

Durations are in words in a message ("318 ms"), and in the metadata a number of seconds, in whole milliseconds; the
label says so. What is for programs rather than people has a label that begins with `dagster-taskiq/`.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from dagster_taskiq._text import duration
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.cancellation.words import asked, by_whom, what_stops

STAGE_KEY: Final = "dagster-taskiq/stage"
WORKER_KEY: Final = "dagster-taskiq/worker"
ROUTE_KEY: Final = "route"
TASK_ID_KEY: Final = "dagster-taskiq/task_id"
UNTIL_KEY: Final = "dagster-taskiq/until"
PATIENCE_KEY: Final = "waits at most (s)"
WHY_KEY: Final = "why"
REASON_KEY: Final = "reason"
BY_KEY: Final = "requested by"
PARENT_KEY: Final = "goes on from run"
HANDLER_KEY: Final = "handler"
IDENTITY_KEY: Final = "declared on"
ATTEMPT_KEY: Final = "attempt"
ATTEMPTS_KEY: Final = "attempts at most"
NEXT_KEY: Final = "next attempt after (s)"
FAILED_KEY: Final = "failed"
OF_KEY: Final = "of"
RETRY_KEY: Final = "may be tried again"
INTERRUPTED_KEY: Final = "interrupted by the end of its worker"
INTERRUPTION_KEY: Final = "interruption"
MOST_INTERRUPTIONS_KEY: Final = "interruptions at most"
STAYS_KEY: Final = "what still runs"
ENDED_KEY: Final = "step has said how it ended"
GRACE_KEY: Final = "grace (s)"
TOOK_KEY: Final = "took (s)"
LOG_KEY: Final = "log of the worker"
PROCESSES_KEY: Final = "killed processes"
_NAMED: Final = 10

TASK_ID_MISSING: Final = "Taskiq task ID missing; unable to cancel run task."
CANCELLATION_REQUESTED: Final = "Requested Taskiq task cancellation."
TERMINATING: Final = "Sending run termination request."
"""As Dagster says it."""


class Stage(enum.StrEnum):
    """What an event reports, for programs; in the event's metadata under `dagster-taskiq/stage`."""

    REEXECUTED = "reexecuted"
    IGNORED_TAGS = "ignored_tags"
    SUBMITTED = "submitted"
    WAITING = "waiting"
    PICKED_UP = "picked_up"
    RELEASED = "released"
    REQUESTED = "requested"
    NOT_REQUESTED = "not_requested"
    WAITING_FOR_CODE = "waiting_for_code"
    WAITING_FOR_TAKEOVER = "waiting_for_takeover"
    REACHED = "reached"
    INTERRUPTING = "interrupting"
    WAITING_FOR_THREADS = "waiting_for_threads"
    TIMED_OUT = "timed_out"
    KILLED = "killed"
    TREE_GONE = "tree_gone"
    FINISHED_ALL_THE_SAME = "finished_all_the_same"
    LEFT_BEHIND = "left_behind"
    MENDED = "mended"
    FORWARDING = "forwarding"
    STEPS_STOPPED = "steps_stopped"
    WAITING_FOR_STEPS = "waiting_for_steps"
    STEP_LOST = "step_lost"
    STEP_INTERRUPTED = "step_interrupted"
    GOES_ON_ELSEWHERE = "goes_on_elsewhere"
    RUN_INTERRUPTED = "run_interrupted"
    CHILDREN = "children"
    CLEANUP_HANDLERS = "cleanup_handlers"
    CLEANUP_BEGAN = "cleanup_began"
    CLEANUP = "cleanup"
    CLEANUP_ENDED = "cleanup_ended"


class Link(str):
    """An address, which Dagster's UI shows as a link."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One engine event, before it is written. `at` is in seconds since the epoch; None: the time of writing.

    `warns`: it has the level WARNING in the run's log.
    """

    stage: Stage
    message: str
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    at: float | None = None
    error: str | None = None
    warns: bool = False


def with_facts(event: EngineEvent, facts: Mapping[str, str | int | float]) -> EngineEvent:
    """The same event with additional facts."""
    return replace(event, facts={**event.facts, **facts})


def listed(names: Sequence[str]) -> str:
    """The first ten of them."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def counted(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def reexecuted(parent_run_id: str, by: str, finished: Sequence[str], to_run: Sequence[str]) -> EngineEvent:
    """The run goes on from another one. `to_run`: its steps; empty: all of them."""
    what = f"runs {counted(len(to_run), 'step')} ({listed(to_run)})" if to_run else "runs all steps"
    kept = f"; finished there, and not run again: {listed(finished)}" if finished else ""
    return EngineEvent(
        Stage.REEXECUTED,
        f"Goes on from run {parent_run_id}, as {by} has asked: {what}{kept}",
        {PARENT_KEY: parent_run_id, BY_KEY: by},
    )


def submitted(task_id: str, queue: str) -> EngineEvent:
    """The launcher has sent the run to its queue."""
    return EngineEvent(
        Stage.SUBMITTED, f"Submitted to queue {queue} as task {task_id}", {TASK_ID_KEY: task_id, "queue": queue}
    )


def ignored_tags(tags: Sequence[str], instead: str) -> EngineEvent:
    """The run, or its steps, have tags for dagster-celery, which mean nothing here."""
    message = f"Without effect, because they are dagster-celery's: {'; '.join(tags)}. Instead: {instead}"
    return EngineEvent(Stage.IGNORED_TAGS, message, warns=True)


def ignored_time_limit(why: str) -> EngineEvent:
    """The run has a tag with a time limit that nobody can read."""
    return EngineEvent(Stage.IGNORED_TAGS, f"Without effect: the tag {why}", warns=True)


def waiting(waited_s: float, older: int, why: str) -> EngineEvent:
    """No worker has it yet. `older`: runs that wait and were created before it."""
    waited = duration(waited_s) if waited_s >= 1 else "0 s"
    message = f"waiting for a worker for {waited}, older runs that wait: {older}; {why}"
    return EngineEvent(Stage.WAITING, message, {"older runs": older, WHY_KEY: why})


def waits_for_route(why: str, route: str) -> EngineEvent:
    """The run is to be stopped, which takes its code, and nobody is there who has it."""
    message = f"waiting: {why}; start one with `dagster-taskiq worker start -q {route}`"
    return EngineEvent(Stage.WAITING, message, {WHY_KEY: why}, warns=True)


def waiting_for_code(until: float, task_id: str, why: str) -> EngineEvent:
    """No living worker has the code of the run, or of the step, and one that has it may come."""
    at = f"{datetime.fromtimestamp(until, UTC):%H:%M:%S} UTC"
    message = f"waiting until {at} for a worker that has the code, and fails then: {why}"
    facts: dict[str, str | int | float] = {WHY_KEY: why, TASK_ID_KEY: task_id, UNTIL_KEY: until}
    return EngineEvent(Stage.WAITING_FOR_CODE, message, facts, warns=True)


def goes_on_elsewhere(most: int) -> EngineEvent:
    """At the start of a run of `taskiq_executor`, where `interrupted_steps` is `retry`: its worker may stop or die."""
    message = f"when its worker stops or dies, this run goes on elsewhere, at most {counted(most, 'time')}"
    return EngineEvent(Stage.GOES_ON_ELSEWHERE, message, {MOST_INTERRUPTIONS_KEY: most})


def run_interrupted(why: str, number: int, most: int) -> EngineEvent:
    """The run's worker was stopped, or has died, and another one goes on with it. `number`: of the interruption.

    Dagster's run monitoring does not count it.
    """
    return EngineEvent(
        Stage.RUN_INTERRUPTED,
        f"the run was interrupted: {why}; it goes on here (interruption {number} of at most {most})",
        {WHY_KEY: why, INTERRUPTION_KEY: number, MOST_INTERRUPTIONS_KEY: most},
    )


def no_log(_: str) -> None:
    """Of a worker whose log nobody can link to."""


def picked_up(worker_id: str, task_id: str, where: str, log_url: str | None = None) -> EngineEvent:
    """A worker has the run, or the step. `log_url`: where the worker's log of it is to be read."""
    facts = {WORKER_KEY: worker_id, TASK_ID_KEY: task_id}
    if log_url is not None:
        facts[LOG_KEY] = Link(log_url)
    return EngineEvent(Stage.PICKED_UP, f"picked up by worker {worker_id} ({where})", facts)


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
    return EngineEvent(Stage.REQUESTED, asked(CANCELLATION_REQUESTED, requested_by, reason), facts)


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


def unclear_at_fence(run_id: str, why: str) -> EngineEvent:
    """The run is launched, because a fence cannot tell whether it means it."""
    message = (
        f"launched, although a fence is up (run cancel --until): it cannot be told whether it is meant: {why}; to stop"
        f" it: dagster-taskiq run cancel {run_id}"
    )
    return EngineEvent(Stage.NOT_REQUESTED, message, warns=True)


def reached(worker_id: str, cancellation: Cancellation) -> EngineEvent:
    """The cancellation has reached the worker that has the run."""
    after = ""
    if cancellation.requested_at is not None:
        after = f" after {duration(cancellation.received_at - cancellation.requested_at)}"
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
    whom = by_whom(cancellation.requested_by, cancellation.reason) or cancellation.cause
    message = f"{what_stops(cancellation)} reached worker {worker_id}{after} ({how}){f', {whom}' if whom else ''}"
    if cancellation.kind is CancelKind.DEADLINE and cancellation.channel is CancelChannel.WORKER:
        message = f"{cancellation.cause or cancellation.reason}; interrupting"
    return EngineEvent(Stage.REACHED, message, facts, cancellation.received_at)


def interrupting(pid: int, grace_s: float, at: float) -> EngineEvent:
    """The leader gets SIGTERM."""
    return EngineEvent(
        Stage.INTERRUPTING,
        f"interrupting pid {pid}: SIGTERM, then {grace_s:g} s of grace",
        {"pid": pid, GRACE_KEY: grace_s},
        at,
    )


def step_timed_out(pid: int, reason: str, grace_s: float, at: float) -> EngineEvent:
    """A step has taken longer than it may, and is interrupted alone. `reason`: which limit it was."""
    return EngineEvent(
        Stage.TIMED_OUT,
        f"{reason}; interrupting it in pid {pid}, then {grace_s:g} s of grace",
        {"pid": pid, WHY_KEY: reason, GRACE_KEY: grace_s},
        at,
        warns=True,
    )


def killed(pid: int, waited_s: float, shield: str | None, at: float) -> EngineEvent:
    """The process tree gets SIGKILL. `shield`: the name of the one in which the op was."""
    inside = f" (inside the shield {shield!r})" if shield is not None else ""
    facts: dict[str, str | int | float] = {"pid": pid}
    if shield is not None:
        facts["shield"] = shield
    return EngineEvent(
        Stage.KILLED,
        f"pid {pid} did not end within {duration(waited_s)}{inside}: SIGKILL to its whole process tree",
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
        f"the work of pid {pid} was over, but after {duration(waited_s)} it still waited for {what}: SIGKILL to its"
        " whole process tree",
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
    after = f" after {duration(after_s)}" if after_s is not None else ""
    what = f"; had to kill {', '.join(killed_processes)}" if killed_processes else ""
    facts: dict[str, str | int | float] = {}
    if after_s is not None:
        facts[TOOK_KEY] = after_s
    if ended is not None:
        facts[ENDED_KEY] = ended
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
