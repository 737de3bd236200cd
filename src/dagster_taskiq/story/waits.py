"""What a run that is not over waits for, until when, and what a person can do about it. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.storage.fleet import RELEASE
from dagster_taskiq.story.log import Log
from dagster_taskiq.story.model import Bar, Outcome, Wait
from dagster_taskiq.story.phases import Phases
from dagster_taskiq.story.steps import WAITS
from dagster_taskiq.story.surroundings import ALIVE, SILENT, PoolWait, QueuePlace, StepOwner, Surroundings
from dagster_taskiq.story.text import RESUMES, clock, duration

QUIET_AFTER_S: Final = 60.0
"""A step that has written nothing for so long may hang."""
_DAEMON_LATE_S: Final = 120.0
"""Dagster's daemon writes a heartbeat twice a minute."""
_START_A_WORKER: Final = (
    "start one: dagster-taskiq worker start; is the service scaled to zero? dagster-taskiq worker list"
)
_WHICH_WORK: Final = "see what takes the slots: dagster-taskiq worker list"
_MORE_SLOTS: Final = (_WHICH_WORK, "start more workers, or give them more slots: --max-runs")
_NO_WORKER: Final = "no worker"
_NO_SLOT: Final = "no free slot"
_NAMED: Final = 5


def what_it_waits_for(
    status: str, phases: Phases, steps: Sequence[Bar], log: Log, around: Surroundings
) -> Iterator[Wait]:
    """In the order of their importance. Empty for a run that works, or is over."""
    begins = status in ("QUEUED", "NOT_STARTED", "STARTING", "STARTED")
    if around.hold is not None and begins and (around.owner is None or around.owner.state not in (ALIVE, SILENT)):
        yield Wait(around.hold, None, None, (f"to let it begin: {RELEASE}",), cause="the fleet is held")
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
        yield Wait(
            f"Dagster's daemon, which hands runs over, {heard}", since, None, (advice,), cause="Dagster's daemon"
        )
    if place.blocking:
        for limit in place.blocking:
            advice = "wait for the others, or raise the limit in dagster.yaml or in the UI"
            yield Wait(limit, since, None, (advice,), cause=limit.removeprefix("the "))
        return
    if place.limit is not None and place.in_progress >= place.limit:
        yield _no_room(place, since, around)
        return
    if place.ahead:
        advice = f"to have it sooner, launch it with a higher tag dagster/priority than {place.priority}"
        what = f"{place.ahead} runs are taken before it (older, or of a higher priority)"
        yield Wait(what, since, None, (advice,), cause="its turn")
    elif late_s is not None and late_s <= _DAEMON_LATE_S:
        advice = "if it stays: the daemon's log; a code location that does not load is tried again after a minute"
        what = "Dagster's daemon takes it when it looks next; nothing holds it back"
        yield Wait(what, since, None, (advice,), cause="its turn")


def _no_room(place: QueuePlace, since: float | None, around: Surroundings) -> Wait:
    if place.limit_is_configured and place.limit_of_route:
        what = f"max_concurrent_runs_by_route of {around.route} is {place.limit}, and {place.in_progress} of its runs"
        advice = ("raise it in the config of run_coordinator in dagster.yaml", _WHICH_WORK)
        return Wait(f"{what} are in progress", since, None, advice, cause=f"the limit {place.limit} of {around.route}")
    if place.limit_is_configured:
        what = f"max_concurrent_runs is {place.limit}, and {place.in_progress} runs are in progress"
        advice = ("raise it in the config of run_coordinator in dagster.yaml", _WHICH_WORK)
        return Wait(what, since, None, advice, cause=f"max_concurrent_runs {place.limit}")
    ahead = f"; {place.ahead} runs are taken before it" if place.ahead else ""
    if not around.workers_alive:
        return Wait(f"{_nobody(around)}{ahead}", since, None, (_start_a_worker(around),), cause=_no_worker(around))
    taken = around.slots - around.free_slots
    what = f"no free slot: {taken} of {around.slots} are taken (workers: {around.workers_alive}){ahead}"
    return Wait(what, since, None, _MORE_SLOTS, cause=_NO_SLOT)


# For its first worker


def _starting(phases: Phases, around: Surroundings) -> Iterator[Wait]:
    if around.owner is not None:
        if around.owner.state == ALIVE:
            bar = phases.bars[-1] if phases.bars else None
            advice = "loading the code takes this long? preload_modules; its log: dagster-taskiq worker list names it"
            what, since = f"worker {around.owner.worker_id} starts it", bar.began if bar else None
            yield Wait(what, since, None, (advice,), cause="its start")
        else:
            yield _dead_owner(around)
        return
    since = phases.submitted_at
    if since is None:
        what = "it was not sent to a queue yet; Dagster is about to, or was stopped in between"
        advice = "if it stays: terminate it, and launch it again"
        yield Wait(what, phases.starting_at, None, (advice,), cause="to be sent to the queue")
        return
    yield _for_a_worker(since, around)
    gone = around.messages is not None and around.messages.trouble is None
    if gone and around.messages is not None and around.messages.visible + around.messages.in_flight == 0:
        do = ["terminate it, and launch it again: nothing else will start it"]
        if around.start_timeout_s:
            do.append(f"Dagster's run monitoring fails it after {duration(around.start_timeout_s)}")
        what = "its message is gone: the queue is empty (purged, expired, dead-letter?)"
        yield Wait(what, since, None, tuple(do), cause="its message is gone")


def _nobody(around: Surroundings) -> str:
    of_route = f"of route {around.route} " if around.route != DEFAULT_ROUTE else ""
    return f"no worker {of_route}that takes runs is alive"


def _no_worker(around: Surroundings) -> str:
    """The same in a few words."""
    return _NO_WORKER if around.route == DEFAULT_ROUTE else f"{_NO_WORKER} of {around.route}"


def _start_a_worker(around: Surroundings) -> str:
    if around.route == DEFAULT_ROUTE:
        return _START_A_WORKER
    return _START_A_WORKER.replace("worker start", f"worker start -q {around.route}")


def _for_a_worker(since: float | None, around: Surroundings) -> Wait:
    if not around.workers_alive:
        return Wait(_nobody(around), since, None, (_start_a_worker(around),), cause=_no_worker(around))
    if around.free_slots <= 0:
        what = f"no free slot: {around.slots} of {around.slots} are taken (workers: {around.workers_alive})"
        return Wait(what, since, None, _MORE_SLOTS, cause=_NO_SLOT)
    if around.code is not None:
        advice = "a worker that does not have it hands the run on; give the location its own route: docs/routes.md"
        return Wait(around.code, since, around.code_until, (advice,), cause="a worker with its code")
    said = _said_of_messages(around)
    what = f"a worker to receive it: {around.free_slots} of {around.slots} slots are free{said}"
    advice = "if it stays: dagster-taskiq doctor, run where a worker runs"
    return Wait(what, since, None, (advice,), cause="a worker to receive it")


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
        return Wait(what, owner.heard, None, ("is the daemon alive? its log",), cause="run monitoring")
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
        advice.insert(0, f"no worker is alive to do it; {_start_a_worker(around)}")
    until = by_message if by_message > around.now else None
    return Wait(what, owner.heard, until, tuple(advice), cause=f"its worker {state}")


# To be stopped


def _canceling(phases: Phases, around: Surroundings) -> Iterator[Wait]:
    cancel, owner = phases.cancel, around.owner
    since = cancel.asked_at
    if owner is None:
        what = "a worker to finish its cancellation: nobody has the run"
        advice = f"one does it when its message comes again, or within {duration(around.reconcile_every_s)} or two"
        alive = () if around.workers_alive else (f"no worker is alive; {_start_a_worker(around)}",)
        yield Wait(
            what, since, None, (*alive, advice), cause="a worker to finish it" if around.workers_alive else _NO_WORKER
        )
        return
    if owner.state != ALIVE:
        yield _dead_owner(around)
        return
    if phases.cleaning is not None:
        what = f"cleanup on {owner.worker_id}: {_handlers(phases)}"
        advice = "its log lines are in the run's log; it has a timeout of its own"
        yield Wait(what, phases.cleaning[1], None, (advice,), cause="cleanup")
    elif cancel.gone_at is not None:
        what = f"worker {owner.worker_id} to write its end; its processes are gone"
        yield Wait(what, cancel.gone_at, cause="its end to be written")
    elif cancel.killed_at is not None:
        advice = f"a process in uninterruptible sleep (a dead NFS mount?) cannot be killed: ps on {phases.where}"
        what = f"its killed processes to be gone, on {owner.worker_id}"
        yield Wait(what, cancel.killed_at, None, (advice,), cause="killed processes")
    elif cancel.interrupted_at is not None:
        until = cancel.interrupted_at + cancel.grace_s if cancel.grace_s is not None else None
        what = f"pid {cancel.pid} on {owner.worker_id} has SIGTERM and is in its grace; then it is killed"
        advice = "nothing to do; less: tag dagster-taskiq/grace_seconds"
        yield Wait(what, cancel.interrupted_at, until, (advice,), cause="its grace")
    elif cancel.reached_at is None:
        until = (since or around.now) + around.status_poll_s
        advice = "if it stays: permissions on the cancel queue (dagster-taskiq doctor); does its worker hang?"
        what = f"the cancellation to reach worker {owner.worker_id}, by message or by its look at the database"
        yield Wait(what, since, until if until > around.now else None, (advice,), cause="the cancellation to reach it")
    if around.steps:
        what = f"steps that have not stopped: {_steps(around.steps)}"
        yield Wait(what, since, cancel.patience_until, cause="steps that have not stopped")


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
        then = "then it is resumed"
        if not around.can_resume:
            then = f"then it becomes FAILURE; what would have resumed it: {RESUMES}"
        yield replace(wait, advice=(*wait.advice, then))
        return
    if phases.lingers is not None:
        what, since = phases.lingers
        advice = f"to end it now: dagster-taskiq run cancel {around.run_id[:8]}"
        yield Wait(what, since, None, (advice,), cause="threads and hooks")
        return
    yield from map(_pool, around.pools)
    waiting = [bar for bar in steps if bar.outcome is Outcome.GOING_ON and bar.note == WAITS]
    if waiting and not around.pools:
        yield from _steps_by_route(waiting, around)
    working = [bar for bar in steps if bar.outcome is Outcome.GOING_ON and bar.note != WAITS]
    for bar in working[:_NAMED]:
        last = max(log.latest.get(bar.label, bar.began), bar.began)
        if around.now - last > QUIET_AFTER_S:
            yield _quiet(bar, last, phases, around)
    if not working and not waiting and log.last_at is not None and around.now - log.last_at > QUIET_AFTER_S:
        looks = (_look_inside(phases.process_pid, phases.where), "its compute logs (stdout, stderr) in Dagster's UI")
        what = "no step is at work, and its log is silent"
        yield Wait(what, log.last_at, None, looks, cause="nothing that is known")


def _quiet(bar: Bar, last: float, phases: Phases, around: Surroundings) -> Wait:
    owner = next((step for step in around.steps if step.step_key == bar.label), None)
    worker = owner.worker_id if owner else bar.worker or phases.worker
    if owner is not None and owner.state != ALIVE:
        what = f"step {bar.label}: its worker {worker} is {owner.state}; its run fails it, or tries it again"
        return Wait(
            what, last, None, ("dagster-taskiq worker list --all",), cause=f"its step's worker is {owner.state}"
        )
    where = owner.where if owner else phases.where
    what = f"step {bar.label} on {worker}: no event since {clock(last)} UTC; it works silently, or hangs"
    pid = None if owner else phases.process_pid
    advice = (_look_inside(pid, where), f"if it hangs, stop it: dagster-taskiq run cancel {around.run_id[:8]}")
    return Wait(what, last, None, advice, cause="a silent step")


def _look_inside(pid: int | None, where: str) -> str:
    on = where.partition(" on ")[2] or "its worker's machine"
    return f"look what it does: py-spy dump --pid {pid if pid is not None else 'PID'} on {on}; and its compute logs"


def _steps_by_route(waiting: Sequence[Bar], around: Surroundings) -> Iterator[Wait]:
    """Of very many steps, only those that were read in full have a route: those are the ones to judge by."""
    by_route: dict[str, list[Bar]] = {}
    for bar in [bar for bar in waiting if bar.route is not None] or waiting:
        by_route.setdefault(bar.route or around.route, []).append(bar)
    for route, bars in by_route.items():
        yield from _steps_without_worker(bars, around if route == around.route else around.of_route(route))


def _steps_without_worker(waiting: Sequence[Bar], around: Surroundings) -> Iterator[Wait]:
    """`around`: of the route of these steps."""
    since = min(bar.first for bar in waiting)
    if around.now - since < 2:
        return
    named = ", ".join(bar.label for bar in waiting[:_NAMED])
    were_sent = "step that was sent" if len(waiting) == 1 else "steps that were sent"
    which = f"{len(waiting)} {were_sent} ({named}{', …' if len(waiting) > _NAMED else ''})"
    of_route = f" of route {around.route}" if around.route != DEFAULT_ROUTE else ""
    if not around.step_slots:
        what = f"{which}: no worker{of_route} that takes steps is alive"
        yield Wait(what, since, None, (_start_a_worker(around),), cause=f"{_no_worker(around)} for its steps")
    elif around.free_step_slots <= 0:
        advice = (_WHICH_WORK, "start more workers, or give them more slots: --max-steps")
        what = f"{which}: no free slot{of_route}, {around.step_slots} of {around.step_slots} are taken"
        yield Wait(what, since, None, advice, cause="no free slot for its steps")
    else:
        what = f"{which}: their processes are starting, or a worker{of_route} is about to receive them"
        yield Wait(what, since, None, _messages_gone(since, around), cause="its steps to begin")


def _messages_gone(since: float, around: Surroundings) -> tuple[str, ...]:
    """Nobody sends them again: a run does not see that they are gone."""
    if around.now - since <= QUIET_AFTER_S:
        return ()
    run_id = around.run_id[:8]
    why = "if it stays, their messages are gone (a queue that was purged, or deleted)"
    return (f"{why}: dagster-taskiq run cancel {run_id}, then dagster-taskiq run reexecute {run_id}",)


def _pool(wait: PoolWait) -> Wait:
    limit = f", limit {wait.limit}" if wait.limit is not None else ""
    held = f", held by {', '.join(wait.held_by[:_NAMED])}" if wait.held_by else ""
    advice = ("wait for them, or raise the limit of the pool: Deployment > Concurrency in Dagster's UI",)
    if wait.limit == 0:
        advice = ("the pool has no slots: raise its limit in Deployment > Concurrency of Dagster's UI",)
    what = f"step {wait.step_key} waits for a slot of pool {wait.pool}{limit}{held}"
    return Wait(what, wait.since, None, advice, cause=f"pool {wait.pool}")
