"""What a run that is not over waits for, until when, and what a person can do about it. Pure."""

from collections.abc import Iterator, Sequence
from typing import Final

from dagster_taskiq.storage.fleet import RELEASE
from dagster_taskiq.story.log import Log
from dagster_taskiq.story.model import Bar, Outcome, Wait
from dagster_taskiq.story.phases import Phases
from dagster_taskiq.story.steps import WAITS
from dagster_taskiq.story.surroundings import ALIVE, SILENT, PoolWait, QueuePlace, StepOwner, Surroundings
from dagster_taskiq.story.text import clock, duration

QUIET_AFTER_S: Final = 60.0
"""A step that has written nothing for so long may hang."""
_DAEMON_LATE_S: Final = 120.0
"""Dagster's daemon writes a heartbeat twice a minute."""
_START_A_WORKER: Final = (
    "start one: dagster-taskiq worker start; is the service scaled to zero? dagster-taskiq worker list"
)
_WHICH_WORK: Final = "see what takes the slots: dagster-taskiq worker list"
_NAMED: Final = 5


def what_it_waits_for(
    status: str, phases: Phases, steps: Sequence[Bar], log: Log, around: Surroundings
) -> Iterator[Wait]:
    """In the order of their importance. Empty for a run that works, or is over."""
    begins = status in ("QUEUED", "NOT_STARTED", "STARTING", "STARTED")
    if around.hold is not None and begins and (around.owner is None or around.owner.state not in (ALIVE, SILENT)):
        yield Wait(around.hold, None, None, (f"to let it begin: {RELEASE}",))
        if around.owner is None:
            return
    if status == "QUEUED":
        yield from _queued(phases, around)
    elif status in ("NOT_STARTED", "STARTING"):
        yield from _starting(phases, around)
    elif status == "CANCELING":
        yield from _canceling(phases, around)
    elif status == "STARTED":
        yield from _started(phases, steps, log, around)


# In Dagster's queue


def _queued(phases: Phases, around: Surroundings) -> Iterator[Wait]:
    since, place = phases.queued_at, around.queue or QueuePlace()
    late_s = around.now - place.daemon_heard if place.daemon_heard is not None else None
    if late_s is None or late_s > _DAEMON_LATE_S:
        heard = "has never run here" if late_s is None else f"has given no sign of life for {duration(late_s)}"
        advice = "start it: dagster-daemon run; its log says why it ended"
        yield Wait(f"Dagster's daemon, which hands runs over, {heard}", since, None, (advice,))
    if place.blocking:
        for limit in place.blocking:
            yield Wait(limit, since, None, ("wait for the others, or raise the limit in dagster.yaml or in the UI",))
        return
    if place.limit is not None and place.in_progress >= place.limit:
        yield _no_room(place, since, around)
        return
    if place.ahead:
        more = "at least " if place.more_ahead else ""
        advice = f"to have it sooner, launch it with a higher tag dagster/priority than {place.priority}"
        yield Wait(
            f"{more}{place.ahead} runs are taken before it (older, or of a higher priority)", since, None, (advice,)
        )
    elif late_s is not None and late_s <= _DAEMON_LATE_S:
        advice = "if it stays: the daemon's log; a code location that does not load is tried again after a minute"
        yield Wait("Dagster's daemon takes it when it looks next; nothing holds it back", since, None, (advice,))


def _no_room(place: QueuePlace, since: float | None, around: Surroundings) -> Wait:
    if place.limit_is_configured:
        what = f"max_concurrent_runs is {place.limit}, and {place.in_progress} runs are in progress"
        return Wait(what, since, None, ("raise it in the config of run_coordinator in dagster.yaml", _WHICH_WORK))
    ahead = f"; {place.ahead} runs are taken before it" if place.ahead else ""
    if not around.workers_alive:
        return Wait(f"no worker that takes runs is alive{ahead}", since, None, (_START_A_WORKER,))
    taken = around.slots - around.free_slots
    what = f"no free slot: {taken} of {around.slots} are taken (workers: {around.workers_alive}){ahead}"
    return Wait(what, since, None, (_WHICH_WORK, "start more workers, or give them more slots: --max-runs"))


# For its first worker


def _starting(phases: Phases, around: Surroundings) -> Iterator[Wait]:
    if around.owner is not None:
        if around.owner.state == ALIVE:
            bar = phases.bars[-1] if phases.bars else None
            advice = "loading the code takes this long? preload_modules; its log: dagster-taskiq worker list names it"
            yield Wait(f"worker {around.owner.worker_id} starts it", bar.began if bar else None, None, (advice,))
        else:
            yield _dead_owner(around)
        return
    since = phases.submitted_at
    if since is None:
        what = "it was not sent to a queue yet; Dagster is about to, or was stopped in between"
        yield Wait(what, phases.starting_at, None, ("if it stays: terminate it, and launch it again",))
        return
    yield _for_a_worker(since, around)
    gone = around.messages is not None and around.messages.trouble is None
    if gone and around.messages is not None and around.messages.visible + around.messages.in_flight == 0:
        do = ["terminate it, and launch it again: nothing else will start it"]
        if around.start_timeout_s:
            do.append(f"Dagster's run monitoring fails it after {duration(around.start_timeout_s)}")
        yield Wait("its message is gone: the queue is empty (purged, expired, dead-letter?)", since, None, tuple(do))


def _for_a_worker(since: float | None, around: Surroundings) -> Wait:
    if not around.workers_alive:
        return Wait("no worker that takes runs is alive", since, None, (_START_A_WORKER,))
    if around.free_slots <= 0:
        what = f"no free slot: {around.slots} of {around.slots} are taken (workers: {around.workers_alive})"
        return Wait(what, since, None, (_WHICH_WORK, "start more workers, or give them more slots: --max-runs"))
    said = _said_of_messages(around)
    what = f"a worker to receive it: {around.free_slots} of {around.slots} slots are free{said}"
    return Wait(what, since, None, ("if it stays: dagster-taskiq doctor, run where a worker runs",))


def _said_of_messages(around: Surroundings) -> str:
    messages = around.messages
    if messages is None:
        return ""
    if messages.trouble is not None:
        return f"; the queue did not answer: {messages.trouble}"
    return f"; in the queue: {messages.visible} messages wait, {messages.in_flight} are with workers"


# A worker that is gone


def _dead_owner(around: Surroundings) -> Wait:
    owner = around.owner
    assert owner is not None  # noqa: S101 - for the type checker: who calls this has looked
    heard = f", last heard of {duration(around.now - owner.heard)} ago" if owner.heard is not None else ""
    if owner.given_up:
        what = f"Dagster's run monitoring, which was told that worker {owner.worker_id} is dead"
        return Wait(what, owner.heard, None, ("is the daemon alive? its log",))
    state = "is dead" if owner.state != SILENT else "is silent"
    by_message = (
        around.now + around.visibility_timeout_s * 4 / 3
        if owner.heard is None
        else (owner.heard + around.visibility_timeout_s * 4 / 3)
    )
    doubt = "if it is dead, " if owner.state == SILENT else ""
    what = (
        f"its worker {owner.worker_id} {state}{heard}; {doubt}another one takes over when the run's message comes again"
    )
    advice = [
        "if its message is lost, the worker that looks for lost runs (every"
        f" {duration(around.reconcile_every_s)}) does it"
    ]
    if not around.workers_alive:
        advice.insert(0, f"no worker is alive to do it; {_START_A_WORKER}")
    return Wait(what, owner.heard, by_message if by_message > around.now else None, tuple(advice))


# To be stopped


def _canceling(phases: Phases, around: Surroundings) -> Iterator[Wait]:
    cancel, owner = phases.cancel, around.owner
    since = cancel.asked_at
    if owner is None:
        what = "a worker to finish its cancellation: nobody has the run"
        advice = f"one does it when its message comes again, or within {duration(around.reconcile_every_s)} or two"
        alive = () if around.workers_alive else (f"no worker is alive; {_START_A_WORKER}",)
        yield Wait(what, since, None, (*alive, advice))
        return
    if owner.state != ALIVE:
        yield _dead_owner(around)
        return
    if phases.cleaning is not None:
        what = f"cleanup on {owner.worker_id}: {_handlers(phases)}"
        yield Wait(what, phases.cleaning[1], None, ("its log lines are in the run's log; it has a timeout of its own",))
    elif cancel.gone_at is not None:
        yield Wait(f"worker {owner.worker_id} to write its end; its processes are gone", cancel.gone_at)
    elif cancel.killed_at is not None:
        advice = f"a process in uninterruptible sleep (a dead NFS mount?) cannot be killed: ps on {phases.where}"
        yield Wait(f"its killed processes to be gone, on {owner.worker_id}", cancel.killed_at, None, (advice,))
    elif cancel.interrupted_at is not None:
        until = cancel.interrupted_at + cancel.grace_s if cancel.grace_s is not None else None
        what = f"pid {cancel.pid} on {owner.worker_id} has SIGTERM and is in its grace; then it is killed"
        yield Wait(what, cancel.interrupted_at, until, ("nothing to do; less: tag dagster-taskiq/grace_seconds",))
    elif cancel.reached_at is None:
        until = (since or around.now) + around.status_poll_s
        advice = "if it stays: permissions on the cancel queue (dagster-taskiq doctor); does its worker hang?"
        what = f"the cancellation to reach worker {owner.worker_id}, by message or by its look at the database"
        yield Wait(what, since, until if until > around.now else None, (advice,))
    if around.steps:
        yield Wait(f"steps that have not stopped: {_steps(around.steps)}", since, cancel.patience_until)


def _handlers(phases: Phases) -> str:
    """Those that have failed and are tried again; before any has, all of them."""
    tried_again = [
        f"attempt {number} of {most} of {label}, at {clock(begins)} UTC"
        for label, (number, most, begins) in phases.next_attempts.items()
    ]
    return "; ".join(tried_again[:_NAMED]) or (phases.cleaning[0] if phases.cleaning is not None else "")


def _steps(steps: Sequence[StepOwner]) -> str:
    told = [
        f"{step.step_key} on {step.worker_id}" + ("" if step.state == ALIVE else f" ({step.state})")
        for step in steps[:_NAMED]
    ]
    return ", ".join(told) + (f" and {len(steps) - _NAMED} more" if len(steps) > _NAMED else "")


# At work


def _started(phases: Phases, steps: Sequence[Bar], log: Log, around: Surroundings) -> Iterator[Wait]:
    if around.owner is None:
        yield _for_a_worker(phases.submitted_at, around)
        return
    if around.owner.state != ALIVE:
        wait = _dead_owner(around)
        then = (
            "then it is resumed" if around.can_resume else "then it becomes FAILURE: run monitoring does not resume it"
        )
        yield Wait(wait.what, wait.since, wait.until, (*wait.advice, then))
        return
    if phases.lingers is not None:
        what, since = phases.lingers
        yield Wait(what, since, None, ("to end it now: dagster-taskiq run cancel",))
        return
    yield from map(_pool, around.pools)
    waiting = [bar for bar in steps if bar.outcome is Outcome.GOING_ON and bar.note == WAITS]
    if waiting and not around.pools:
        yield from _steps_without_worker(waiting, around)
    working = [bar for bar in steps if bar.outcome is Outcome.GOING_ON and bar.note != WAITS]
    for bar in working[:_NAMED]:
        last = max(log.latest.get(bar.label, bar.began), bar.began)
        if around.now - last > QUIET_AFTER_S:
            yield _quiet(bar, last, phases, around)
    if not working and not waiting and log.last_at is not None and around.now - log.last_at > QUIET_AFTER_S:
        advice = (_look_inside(phases.process_pid, phases.where), "its compute logs (stdout, stderr) in Dagster's UI")
        yield Wait("no step is at work, and its log is silent", log.last_at, None, advice)


def _quiet(bar: Bar, last: float, phases: Phases, around: Surroundings) -> Wait:
    owner = next((step for step in around.steps if step.step_key == bar.label), None)
    worker = owner.worker_id if owner else bar.worker or phases.worker
    if owner is not None and owner.state != ALIVE:
        what = f"step {bar.label}: its worker {worker} is {owner.state}; its run fails it, or tries it again"
        return Wait(what, last, None, ("dagster-taskiq worker list --all",))
    where = owner.where if owner else phases.where
    what = f"step {bar.label} on {worker}: no event since {clock(last)} UTC; it works silently, or hangs"
    pid = None if owner else phases.process_pid
    return Wait(what, last, None, (_look_inside(pid, where), "if it hangs, stop it: dagster-taskiq run cancel"))


def _look_inside(pid: int | None, where: str) -> str:
    on = where.partition(" on ")[2] or "its worker's machine"
    return f"look what it does: py-spy dump --pid {pid if pid is not None else 'PID'} on {on}; and its compute logs"


def _steps_without_worker(waiting: Sequence[Bar], around: Surroundings) -> Iterator[Wait]:
    since = min(bar.first for bar in waiting)
    if around.now - since < 2:
        return
    named = ", ".join(bar.label for bar in waiting[:_NAMED])
    which = f"{len(waiting)} steps that were sent ({named}{', …' if len(waiting) > _NAMED else ''})"
    if not around.step_slots:
        yield Wait(f"{which}: no worker that takes steps is alive", since, None, (_START_A_WORKER,))
    elif around.free_step_slots <= 0:
        advice = (_WHICH_WORK, "start more workers, or give them more slots: --max-steps")
        yield Wait(f"{which}: no free slot, {around.step_slots} of {around.step_slots} are taken", since, None, advice)
    else:
        yield Wait(f"{which}: their processes are starting, or a worker is about to receive them", since)


def _pool(wait: PoolWait) -> Wait:
    limit = f", limit {wait.limit}" if wait.limit is not None else ""
    held = f", held by {', '.join(wait.held_by[:_NAMED])}" if wait.held_by else ""
    advice = ("wait for them, or raise the limit of the pool: Deployment > Concurrency in Dagster's UI",)
    if wait.limit == 0:
        advice = ("the pool has no slots: raise its limit in Deployment > Concurrency of Dagster's UI",)
    return Wait(f"step {wait.step_key} waits for a slot of pool {wait.pool}{limit}{held}", wait.since, None, advice)
