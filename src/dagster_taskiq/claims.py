"""Who works on a run or a step? Claims, which are engine events in the run's own log.

Knows Dagster's event log and the workers' heartbeats; not SQS, not processes. All calls block on the database.

Two receivers of one message both append their claim before they read the log, so at least one of them sees the other.
Their order in the log alone does not decide: PostgreSQL gives ids before it commits, so an earlier claim can become
visible after a later one has been read, and acted upon. Therefore nobody starts beside a rival: the later one gives
way to the earlier one, and the earlier one waits until it has (`rival`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun

from dagster_taskiq import dagster_internals as core
from dagster_taskiq.events import (
    ENDED_KEY,
    FAILED_KEY,
    STAGE_KEY,
    TASK_ID_KEY,
    WORKER_KEY,
    Note,
    Stage,
    picked_up,
    released,
)
from dagster_taskiq.heartbeats import Heartbeats

_STAGES: Final = frozenset(Stage)


@dataclass(frozen=True, slots=True)
class Owner:
    """The worker that holds the claim on a run."""

    worker_id: str
    alive: bool
    in_doubt: bool = False
    """Its heartbeat is old, but it is too early to call it dead."""
    beside: tuple[str, ...] = field(default=(), compare=False)
    """Others that have claimed it, too, and not released it."""


@dataclass(frozen=True, slots=True)
class StepRef:
    """One attempt of one step: the key of the step and the task id of the attempt."""

    step_key: str
    task_id: str


def write_note(instance: DagsterInstance, run: DagsterRun, note: Note, step_key: str | None = None) -> None:
    """Append one engine event to the run's log, with the time at which it happened."""
    error = core.error_info(note.error) if note.error else None
    data = core.EngineEventData(metadata={STAGE_KEY: note.stage.value, **note.facts}, error=error)
    event = DagsterEvent(
        event_type_value=DagsterEventType.ENGINE_EVENT.value,
        job_name=run.job_name,
        message=note.message,
        event_specific_data=data,
        step_key=step_key,
    )
    instance.report_dagster_event(event, run.run_id, timestamp=note.at)


def note_in(event: DagsterEvent) -> tuple[Stage, dict[str, Any]] | None:
    """Stage and metadata, if the event is one of this package's."""
    metadata = getattr(event.event_specific_data, "metadata", None) if event.is_engine_event else None
    if not metadata or STAGE_KEY not in metadata or metadata[STAGE_KEY].value not in _STAGES:
        return None
    values = {key: value.value for key, value in metadata.items()}
    return Stage(values[STAGE_KEY]), values


def notes(
    instance: DagsterInstance, run_id: str, step: StepRef | None = None
) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Stage and metadata of this package's engine events in the run's log, in order: the run's own, or one step's."""
    if step is not None:
        for event in core.events_of_step(instance, run_id, step.step_key, [DagsterEventType.ENGINE_EVENT]):
            note = note_in(event)
            if note is not None and note[1].get(TASK_ID_KEY) == step.task_id:
                yield note
        return
    for entry in instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT):
        event_ = core.event_of(entry)
        note = note_in(event_) if event_ is not None and event_.step_key is None else None
        if note is not None:
            yield note


@dataclass(frozen=True, slots=True)
class CleanupRecord:
    """What a run's log says of its cleanup handlers."""

    due: bool = False
    """Whether there are some that, should the run have been cancelled, have not been seen through."""
    failures: tuple[str, ...] = ()
    """One line for each handler that had no attempt left."""


NO_CLEANUP: Final = CleanupRecord()


def cleanup_record(instance: DagsterInstance, run_id: str) -> CleanupRecord:
    """Read it."""
    record = NO_CLEANUP
    for stage, facts in notes(instance, run_id):
        if stage is Stage.CLEANUP_HANDLERS:
            record = CleanupRecord(due=True)
        elif stage is Stage.CLEANUP_ENDED:
            record = CleanupRecord(failures=tuple(str(facts[FAILED_KEY]).splitlines()) if FAILED_KEY in facts else ())
    return record


@dataclass(slots=True)
class _Attempt:
    step_key: str
    claimants: dict[str, None] = field(default_factory=dict)
    """Workers that have claimed it and not released it, in the order of their claims."""
    over_on: set[str] = field(default_factory=set)
    """Workers that are done with it."""


class OpenSteps:
    """Which attempts of a run's steps are at work on which worker, as its event log tells it.

    An attempt is at work until its worker says that its processes are gone. The step's last event comes before that:
    hooks, and resources that are given back, come after it. In whichever order the log is read, the outcome is the
    same, for PostgreSQL may show an earlier event after a later one.
    """

    def __init__(self) -> None:
        self._attempts: dict[str, _Attempt] = {}
        self._open: dict[str, _Attempt] = {}

    @property
    def workers(self) -> dict[str, str]:
        """Task id to worker: the first claimant, for a later one gives way."""
        return {task_id: next(iter(attempt.claimants)) for task_id, attempt in self._open.items()}

    @property
    def step_keys(self) -> dict[str, str]:
        """Task id to step key."""
        return {task_id: attempt.step_key for task_id, attempt in self._open.items()}

    def hear(self, event: DagsterEvent) -> None:
        """Take in the next event of the log."""
        note = note_in(event) if event.step_key is not None else None
        if note is None or event.step_key is None:
            return
        stage, facts = note
        worker_id, task_id = str(facts.get(WORKER_KEY)), str(facts.get(TASK_ID_KEY))
        attempt = self._attempts.setdefault(task_id, _Attempt(event.step_key))
        if stage is Stage.PICKED_UP:
            attempt.claimants.setdefault(worker_id)
        elif stage is Stage.RELEASED:
            attempt.claimants.pop(worker_id, None)
        elif stage is Stage.STEP_LOST or (stage is Stage.TREE_GONE and facts.get(ENDED_KEY)):
            attempt.over_on.add(worker_id)
        else:
            return
        at_work_on = next(iter(attempt.claimants), None)
        if at_work_on is None or at_work_on in attempt.over_on:
            self._open.pop(task_id, None)
        else:
            self._open[task_id] = attempt

    def close(self, task_id: str) -> None:
        """It is no longer at work: its worker is dead."""
        attempt = self._open.pop(task_id, None)
        if attempt is not None:
            attempt.over_on.update(attempt.claimants)


def open_steps(instance: DagsterInstance, run_id: str) -> OpenSteps:
    """The steps of a run that are at work, as far as its log knows: the worker of one may have died since."""
    found = OpenSteps()
    for entry in instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT):
        event = core.event_of(entry)
        if event is not None:
            found.hear(event)
    return found


def _beside(claimants: dict[str, None], owner: str) -> tuple[str, ...]:
    return tuple(worker_id for worker_id in claimants if worker_id != owner)


class Claims:
    """Read and write claims; whether a claimant is alive is for `heartbeats` to say."""

    def __init__(self, instance: DagsterInstance, heartbeats: Heartbeats) -> None:
        self.instance = instance
        self.heartbeats = heartbeats

    def claim(self, run: DagsterRun, worker_id: str, task_id: str, where: str, step_key: str | None = None) -> None:
        """Append the claim. Whether it counts is for `owner` or `first_claimant`, and `rival`, to say afterwards."""
        write_note(self.instance, run, picked_up(worker_id, task_id, where), step_key)

    def release(self, run: DagsterRun, worker_id: str, task_id: str, why: str, step_key: str | None = None) -> None:
        """Give the claim up, so that another worker's counts although this one is alive."""
        write_note(self.instance, run, released(worker_id, task_id, why), step_key)

    def is_waiting(self, run_id: str) -> bool:
        """Whether the run was submitted (launched, or resumed) and nobody has claimed that task."""
        submitted, claimed = None, set()
        for stage, facts in notes(self.instance, run_id):
            if stage is Stage.SUBMITTED:
                submitted = facts.get(TASK_ID_KEY)
            elif stage is Stage.PICKED_UP:  # the worker may be quicker than the launcher's note
                claimed.add(facts.get(TASK_ID_KEY))
        return submitted is not None and submitted not in claimed

    def first_claimant(self, run_id: str, step: StepRef) -> str | None:
        """The worker whose claim on a step counts, alive or not: an attempt is never started a second time."""
        return next(iter(self._claimants(run_id, step)), None)

    def owner(self, run_id: str, me: str | None = None) -> Owner | None:
        """The first claimant that is alive; if none is, the last one; None when nobody has claimed the run.

        `me` is alive by definition.
        """
        claimants = self._claimants(run_id)
        if not claimants:
            return None
        if me is not None and next(iter(claimants)) == me:
            return Owner(me, alive=True, beside=_beside(claimants, me))
        alive, in_doubt = self.heartbeats.look(worker_id for worker_id in claimants if worker_id != me)
        for worker_id in claimants:
            if worker_id == me or worker_id in alive:
                return Owner(worker_id, alive=True, beside=_beside(claimants, worker_id))
            if worker_id in in_doubt:
                return Owner(worker_id, alive=True, in_doubt=True)
        return Owner([*claimants][-1], alive=False)

    def rival(self, run_id: str, me: str, step: StepRef | None = None) -> str | None:
        """Another worker that has claimed the same and not given way.

        One that is dead is none, except for a step: it may have executed it.
        """
        others = [worker_id for worker_id in self._claimants(run_id, step) if worker_id != me]
        counting = self.heartbeats.alive(others) if step is None else others
        return next((worker_id for worker_id in others if worker_id in counting), None)

    def bury(self, run: DagsterRun, me: str, task_id: str) -> None:
        """Release what dead workers have claimed, in their name, now that this one has taken over.

        One of them may only have hung. When it comes to, it finds that its claim is gone.
        """
        others = [worker_id for worker_id in self._claimants(run.run_id) if worker_id != me]
        alive = self.heartbeats.alive(others)
        for worker_id in others:
            if worker_id not in alive:
                self.release(run, worker_id, task_id, f"it is dead, and {me} takes over")

    def _claimants(self, run_id: str, step: StepRef | None = None) -> dict[str, None]:
        """Workers that have claimed and not released, in the order of their claims."""
        claimants: dict[str, None] = {}
        for stage, facts in notes(self.instance, run_id, step):
            worker_id = str(facts.get(WORKER_KEY))
            if stage is Stage.PICKED_UP:
                claimants.setdefault(worker_id)
            elif stage is Stage.RELEASED:
                claimants.pop(worker_id, None)
        return claimants
