"""A run's record and its event log become its story. Pure: what is known elsewhere comes as `Surroundings`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dagster import DagsterEventType as Kind

from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.time_limits import TIMED_OUT
from dagster_taskiq.story.log import Log, Logged
from dagster_taskiq.story.model import Bar, BarKind, Moment, Outcome, Story, with_most_steps
from dagster_taskiq.story.phases import FINAL, FOR_WORKER, IN_QUEUE, Phases
from dagster_taskiq.story.steps import StepBars
from dagster_taskiq.story.surroundings import Surroundings
from dagster_taskiq.story.text import BEGINS_AGAIN, RESUMES, clock, duration
from dagster_taskiq.story.waits import what_it_waits_for

MOST_STEPS: Final = 200
_MOST_MOMENTS: Final = 500
_NOT_ALL: Final = "Its log is longer than what was read of it, so that this is not all that happened."
_QUIET: Final = frozenset({Stage.CLEANUP_HANDLERS})
_LOUD_OF_STEPS: Final = frozenset(
    {Stage.TIMED_OUT, Stage.KILLED, Stage.STEP_LOST, Stage.STEP_INTERRUPTED, Stage.CLEANUP}
)
_BAD: Final = frozenset({Stage.TIMED_OUT, Stage.KILLED, Stage.STEP_LOST, Stage.NOT_REQUESTED, Stage.LEFT_BEHIND})
STATUSES: Final = {
    Kind.RUN_ENQUEUED.value: "QUEUED",
    Kind.RUN_STARTING.value: "STARTING",
    Kind.RUN_START.value: "STARTED",
    Kind.RUN_CANCELING.value: "CANCELING",
    Kind.RUN_CANCELED.value: "CANCELED",
    Kind.RUN_FAILURE.value: "FAILURE",
    Kind.RUN_SUCCESS.value: "SUCCESS",
}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the record of a run says."""

    run_id: str
    job: str
    status: str
    created: float
    started: float | None = None
    ended: float | None = None
    task_id: str | None = None
    route: str = DEFAULT_ROUTE
    reason: str | None = None
    """Why it was cancelled, by its tag."""
    cancelled_by: str | None = None
    begins_until: float | None = None
    """When it ends without a start, by its own limit."""
    may_take_until: float | None = None
    """When it is stopped, by its time limit."""


def tell(run: RunFacts, log: Log, around: Surroundings) -> Story:
    """The story of a run."""
    phases, steps = Phases(), StepBars()
    for event in log.events:
        phases.take(event)
        steps.take(event)
    phases.cancel.by = phases.cancel.by or run.cancelled_by
    phases.cancel.reason = phases.cancel.reason or run.reason
    over_at = phases.final_at if run.status in ("SUCCESS", "FAILURE", "CANCELED") else None
    bars = steps.bars(around.now, over_at, _how_open_steps_ended(phases))
    moments = sorted(_moments(log.events), key=lambda moment: moment.at)
    left_out = max(0, len(moments) - _MOST_MOMENTS)
    around = replace(around, run_id=run.run_id)
    waits = what_it_waits_for(run.status, phases, bars, log, around) if over_at is None else ()
    story = Story(
        run_id=run.run_id,
        job=run.job,
        status=run.status,
        now=around.now,
        created=run.created,
        started=run.started,
        ended=over_at or run.ended,
        task_id=run.task_id,
        route=run.route,
        worker=phases.worker,
        summary=(*_summary(run, phases, bars, around.now), *((_NOT_ALL,) if log.incomplete else ())),
        waits=tuple(waits),
        advice=tuple(_advice(run, phases)) if over_at is not None else (),
        bars=tuple(sorted([*phases.finished_bars(around.now), *bars], key=lambda bar: bar.first)),
        marks=tuple(phases.all_marks()),
        moments=tuple(moments if not left_out else [*moments[: _MOST_MOMENTS // 2], *moments[-_MOST_MOMENTS // 2 :]]),
        hidden_moments=left_out,
        events=log.count,
    )
    return with_most_steps(story, MOST_STEPS)


def _how_open_steps_ended(phases: Phases) -> Outcome:
    if phases.cancel.killed_at is not None or "SIGKILL" in phases.final_text:
        return Outcome.KILLED
    return {Outcome.CANCELLED: Outcome.CANCELLED, None: Outcome.GOING_ON}.get(phases.final, Outcome.INTERRUPTED)


# What happened, moment by moment


def _moments(events: Sequence[Logged]) -> Iterator[Moment]:
    for event in events:
        if event.stage is not None:
            if event.stage not in _QUIET and (event.step_key is None or event.stage in _LOUD_OF_STEPS):
                what = event.stage.value.replace("_", " ")
                yield Moment(event.at, what, event.text, event.step_key, event.stage in _BAD or bool(event.error))
        elif event.kind in STATUSES:
            text = event.text if event.kind in FINAL else ""
            yield Moment(event.at, STATUSES[event.kind], text, bad=event.kind == Kind.RUN_FAILURE.value)
        elif event.kind == Kind.STEP_FAILURE.value and event.interrupted is False:
            yield Moment(event.at, "step", f"failed: {event.error or event.text}", event.step_key, bad=True)
        elif event.kind == Kind.ENGINE_EVENT.value and event.step_key is None and event.error:
            text = event.text if event.error in event.text else f"{event.text}: {event.error}"
            yield Moment(event.at, "engine", text, bad=True)


# What happened, in sentences


def _summary(run: RunFacts, phases: Phases, steps: Sequence[Bar], now: float) -> Iterator[str]:
    waited: dict[str, float] = {}
    for bar in phases.bars:
        if bar.kind is BarKind.WAIT:
            waited[bar.label] = waited.get(bar.label, 0.0) + bar.seconds(now)
    where = {IN_QUEUE: "in Dagster's queue", FOR_WORKER: "for a worker"}
    parts = [f"{duration(waited[label])} {words}" for label, words in where.items() if waited.get(label, 0) >= 0.01]
    if parts:
        yield f"Waited {' and '.join(parts)}."
    workers = [bar for bar in phases.bars if bar.kind is BarKind.WORK]
    if workers:
        told = ", then ".join(f"{bar.worker} for {duration(bar.seconds(now))}" for bar in workers[-3:])
        yield f"Worked on by {told}" + (f" ({phases.where})." if phases.where and len(workers) == 1 else ".")
    if steps:
        yield f"Steps: {_counts(steps)}."
    yield from _limits(run)
    yield from _cancellation(phases)
    if phases.cleanup_failures:
        yield f"Cleanup failed: {'; '.join(phases.cleanup_failures)}."
    elif cleaned := sum(bar.kind is BarKind.CLEANUP and bar.outcome is Outcome.SUCCEEDED for bar in phases.bars):
        yield f"Cleanup: {cleaned} {'handler' if cleaned == 1 else 'handlers'} succeeded."
    if run.status == "FAILURE" and not phases.cleanup_failures:
        yield f"Failed: {phases.final_text or 'no reason was given'}"


def _limits(run: RunFacts) -> Iterator[str]:
    if run.begins_until is not None and run.status in ("QUEUED", "NOT_STARTED", "STARTING"):
        yield f"If it has not begun by {clock(run.begins_until)}, it never begins (dagster-taskiq/queue_ttl_seconds)."
    if run.may_take_until is not None and run.status == "STARTED":
        yield f"If it has not ended by {clock(run.may_take_until)}, it is stopped (its time limit)."


def _counts(steps: Sequence[Bar]) -> str:
    counts: dict[str, int] = {}
    for bar in steps:
        name = bar.note if bar.note in ("never started", "waits to be started") else bar.outcome.value
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _cancellation(phases: Phases) -> Iterator[str]:
    cancel = phases.cancel
    if cancel.timed_out and not cancel.reached:
        yield f"{TIMED_OUT}."
    elif cancel.asked_at is not None and not cancel.timed_out:
        by = cancel.by if cancel.by and cancel.by != UNKNOWN_AUTHOR else "somebody in Dagster's UI or API"
        why = f", because: {cancel.reason}" if cancel.reason else ", without a reason"
        yield f"Cancelled by {by}{why}."
    if cancel.reached:
        yield f"{cancel.reached[0].upper()}{cancel.reached[1:]}."
    elif phases.not_requested:
        yield f"{phases.not_requested}"
    if cancel.interrupted_at is not None:
        grace = f", with {cancel.grace_s:g} s of grace" if cancel.grace_s is not None else ""
        yield f"SIGTERM to pid {cancel.pid}{grace}."
    if cancel.killed_at is not None:
        ignored = "It ignored SIGTERM" if cancel.interrupted_at is not None else "It had to be killed"
        yield f"{ignored}: {cancel.killed}."
    if cancel.killed_processes:
        yield f"Had to be killed: {cancel.killed_processes}."
    if cancel.gone_at is not None:
        since = cancel.asked_at if cancel.asked_at is not None else cancel.interrupted_at
        what = "its time was over" if cancel.timed_out else "the request"
        after = f" {duration(cancel.gone_at - since)} after {what}" if since is not None else ""
        yield f"The last process was gone{after}."


_HINTS: Final[Mapping[str, tuple[str, ...]]] = {
    "likely out of memory": (
        "Look at the memory of the worker's container (on ECS: the task's stopped reason, OutOfMemoryError).",
        "Give it more memory, or let it work on fewer runs at a time: --max-runs, --max-steps.",
    ),
    "was killed by SIG": ("Somebody or something on the worker's machine has sent the signal: look at its log.",),
    "max_interruptions": (
        "Look why workers end so often (Spot, scale-in, deployments), or raise max_interruptions in config_source.",
    ),
    ", which had step ": (
        "Look why the worker ended: its log, and the stopped reason of its container.",
        f"To have such steps begin again elsewhere: {BEGINS_AGAIN}.",
    ),
    ", is gone": (
        "Look why the worker ended: its log, and the stopped reason of its container.",
        f"To have such runs resumed: {RESUMES}.",
    ),
    "shut down": (f"The worker was stopped (deploy, scale-in, spot). To have such runs resumed: {RESUMES}.",),
    "the worker stops": (
        "The worker of the step was stopped (deploy, scale-in, spot).",
        f"To have such steps begin again elsewhere: {BEGINS_AGAIN}.",
    ),
    "and the run's process": (
        "The op went on after its interrupt, in the process of the whole run: have it look at cancellation_token(), or"
        " run the job under multiprocess_executor or taskiq_executor, where only the process of the step is killed.",
    ),
    "step timed out: ": (
        "Look what took so long, or give the op or asset a larger limit: its tag dagster-taskiq/timeout_seconds.",
    ),
    "run timed out: ": (
        "Look what took so long. It may take longer with a larger limit: the tag dagster-taskiq/timeout_seconds, or"
        " Dagster's own that is named above.",
    ),
    "before its work was finished": ("The op's code has ended its process: look at the run's stdout and stderr.",),
}


def _advice(run: RunFacts, phases: Phases) -> Iterator[str]:
    if phases.cleanup_failures:
        yield f"Fix the cause, then run what has failed again: dagster-taskiq run cleanup {run.run_id[:8]}"
        return
    if run.status == "FAILURE":
        yield from next((hints for text, hints in _HINTS.items() if text in phases.final_text), ())
    if phases.cancel.killed_at is not None and run.status == "CANCELED":
        yield (
            "It did not end within its grace: give the job more with the tag dagster-taskiq/grace_seconds, or have its"
            " op look at cancellation_token()."
        )
    if run.status in ("FAILURE", "CANCELED") and run.started is not None:
        yield f"To go on with what had not finished: dagster-taskiq run reexecute {run.run_id[:8]}"
