"""What all work of one worker shares. Knows who is working where; not what is worked on."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any, TypeAlias, TypeVar

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._lane import Lane
from dagster_taskiq._retry import DATABASE_RETRY_S, retry_async
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.dagster_compat.storage import outages
from dagster_taskiq.metrics import (
    DELIVERED,
    FORCED_KILLS,
    LEASES_LOST,
    TIMED_OUT,
    TO_DELIVERED,
    TO_STOPPED,
    WAITED,
    Metrics,
)
from dagster_taskiq.process.supervise import ChildEnd, Processes
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.sqs.unusable import UnusableMessage
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import grace_of
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.worker.code_check import FindCode, Turns, is_here

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
CancelRuns: TypeAlias = Callable[[DagsterInstance, Sequence[str], str, str], Mapping[str, str]]
"""Of these runs, with a reason and an author; returns those that could not be cancelled, and why."""


def cancel_none(_: DagsterInstance, run_ids: Sequence[str], reason: str, requested_by: str) -> Mapping[str, str]:
    """For who launches no runs from runs."""
    return dict.fromkeys(run_ids, f"nobody here can cancel them ({reason}, {requested_by})")


@dataclass(frozen=True, slots=True)
class ActiveTask:
    """One run, or one step, that this worker is working on."""

    run_id: str
    step_key: str | None = None
    since: float = field(default_factory=time)
    route: str | None = None
    """Of a step the one that it has come on; that of a run is among its tags."""
    lost: CancelSignal = field(default_factory=CancelSignal, compare=False)
    """Set when another worker has taken it over, or soon may."""


@dataclass(slots=True)
class WorkerContext:
    """One per worker."""

    instance: DagsterInstance
    settings: Settings
    claims: Claims
    step_claims: StepClaims
    heartbeats_of_steps: Heartbeats
    """The workers of steps are called dead later than those of runs."""
    processes: Processes
    worker_id: str
    where: str
    """The worker's process, in words."""
    cancel_tasks: Callable[[Mapping[str, str]], Awaitable[Any]]
    """Sends a cancel message for each of these tasks, to its route; what fails does not raise."""
    cancel_runs: CancelRuns = cancel_none
    """As `dagster_taskiq.cancel_runs`. Blocks on the database and on SQS."""
    metrics: Metrics = field(default_factory=lambda: Metrics([], ""))
    shutdown: CancelSignal = field(default_factory=CancelSignal)
    """Set when the worker's drain is over: whatever still goes on here has to end."""
    lane: Lane = field(default_factory=lambda: Lane("the database, for work"))
    """Calls to the database, for work; the heartbeat and others have lanes of their own."""
    held: Callable[[], str | None] = lambda: None
    """Why no run may be begun, in words; None: it may be."""
    unusable: Callable[[], list[UnusableMessage]] = list
    """Messages that this worker has received and that nobody can use, for the heartbeat."""
    find_code: FindCode = is_here
    """Whether the code of a run is here. Blocks on the file system, and on the database when it is not."""
    turns: Turns = field(default_factory=Turns)
    """When a message comes again whose code is not here."""
    told_code: Callable[[], list[list[str]]] = list
    """What is known of that, for the heartbeat."""
    hear_code: Callable[[Mapping[str, str]], None] = lambda _: None
    """Is given what the heartbeat has read: others may ask for it."""
    active: dict[str, ActiveTask] = field(default_factory=dict)
    """By task id, the work that was admitted and has not ended."""
    at_work: dict[str, tuple[RunningTask, asyncio.Event]] = field(default_factory=dict)
    """By run id, the one task of this worker that works on it, and what is set at its end."""
    heard_at: float = field(default_factory=monotonic)
    """When the last heartbeat that was written was begun, by this process's monotonic clock."""
    is_cut_off: bool = False
    """Whether that is so long ago that others may soon take over what runs here."""

    @contextmanager
    def working_on(self, task_id: str, run_id: str, step: StepRef | None = None) -> Iterator[ActiveTask]:
        """As long as this lasts, the heartbeat names that work, and the status poller looks at its run."""
        of_step = (step.step_key, step.route) if step is not None else (None, None)
        active = self.active[task_id] = ActiveTask(run_id, of_step[0], route=of_step[1])
        try:
            yield active
        finally:
            self.active.pop(task_id, None)

    def active_by_kind(self) -> dict[str, int]:
        """How many runs, and how many steps."""
        runs = sum(task.step_key is None for task in self.active.values())
        return {"runs": runs, "steps": len(self.active) - runs}

    def watched(self) -> dict[str, str]:
        """Task id to run id: what the status poller looks at."""
        return {task_id: task.run_id for task_id, task in self.active.items()}

    async def still_ours(self, task_id: str) -> bool:
        """Whether a run whose lease is lost is ours all the same, because no other worker has claimed it since."""
        task = self.active.get(task_id)
        if task is None:
            return False
        try:
            return await self.lane.call(self.claims.holds, task.run_id)
        except Exception:
            # Nothing is killed because only the database, or only SQS, did not answer. If neither does, others see an
            # old heartbeat, and get the message.
            ours = self._was_heard()
            text = "cannot read the claims; %s"
            logger.exception(text, "going on" if ours else "stopping the run", extra={"run_id": task.run_id})
            return ours

    async def step_still_ours(self, _: str) -> bool:
        """Whether an attempt of a step whose lease is lost is ours all the same.

        It is started once, whoever gets its message; but a worker whose heartbeat is old as well has lost it.
        """
        return self._was_heard()

    def _was_heard(self) -> bool:
        """Whether this worker's heartbeat is not old."""
        return monotonic() - self.heard_at < self.settings.dead_after_s

    def lose(self, task_id: str) -> None:
        """Another worker has taken over what runs here under that task id: what goes on for it has to end."""
        task = self.active.get(task_id)
        if task is not None:
            task.lost.set(Cancellation(CancelKind.LEASE_LOST, cause="another worker has taken over"))

    def forget_claims(self, run_id: str) -> None:
        """Delete the claims on a run that is final, and on its steps. Blocks on the database."""
        self.claims.forget(run_id)
        self.step_claims.forget(run_id)

    async def through_outages(self, call: Callable[[], _T], doing: str, *, at_least_s: float = DATABASE_RETRY_S) -> _T:
        """Call it in a thread, until the database answers: for what nobody else can do, because only this worker knows.

        That is as long as an outage takes; when the worker's drain is over, `at_least_s` from the first try on. An
        error that is no outage is raised after `DATABASE_RETRY_S`.
        """
        began = monotonic()

        def may_give_up() -> bool:
            return self.shutdown.is_set and monotonic() - began > at_least_s

        async def wait_for_database() -> _T:
            errors = (*outages(), TimeoutError)
            return await retry_async(lambda: self.lane.call(call), doing=doing, on=errors, until=may_give_up)

        return await retry_async(wait_for_database, doing=doing, for_s=DATABASE_RETRY_S)

    def hand_back_later(self) -> Settled:
        """The message is to come again after its visibility timeout."""
        return Settled(Settlement.HAND_BACK, self.settings.visibility_timeout_seconds)

    async def give_up(self, run: DagsterRun, why: str, *, delay_s: int, step: StepRef | None = None) -> Settled:
        """Release the claim, so that another worker may have the work; then its message is handed back.

        In this order, however long the database is away: a step that is claimed is not started by anybody else.
        """

        def release() -> None:
            if step is None:
                self.claims.release(run, why)
            else:
                self.step_claims.release(run, step, self.worker_id, why)

        await self.through_outages(release, "release a claim", at_least_s=0)
        return Settled(Settlement.HAND_BACK, delay_s)

    # What is measured

    def measure_wait(self, task: RunningTask, kind: str) -> None:
        """How long a task waited in its queue, if this is its first delivery."""
        if task.sent_at and task.receive_count == 1:
            self.metrics.put({WAITED: max(0.0, time() - task.sent_at)}, Kind=kind)

    def measure_delivery(self, cancellation: Cancellation) -> None:
        """Work that runs here was cancelled."""
        if cancellation.kind is CancelKind.LEASE_LOST:
            self.metrics.count(LEASES_LOST)
        elif cancellation.kind is CancelKind.DEADLINE:
            self.metrics.count(TIMED_OUT)
        elif cancellation.kind is CancelKind.REQUESTED:
            self.metrics.count(DELIVERED, Channel=cancellation.channel.value)
            if cancellation.requested_at is not None:
                self.metrics.put({TO_DELIVERED: max(0.0, cancellation.received_at - cancellation.requested_at)})

    def measure_end(self, end: ChildEnd) -> None:
        """How long it took a process tree to stop that was interrupted, and whether it had to be killed."""
        if end.interrupted_at is not None:
            self.metrics.put({TO_STOPPED: max(0.0, end.gone_at - end.interrupted_at)})
            if end.kill_at is not None:
                self.metrics.count(FORCED_KILLS)

    # The time that work has to end

    def grace_s(self, run: DagsterRun, cancellation: Cancellation | None = None) -> float:
        """The run's own grace, if it is tagged with a sensible one; less than that when the work is to go on elsewhere.

        That is in a shutdown of the worker, and when others may have it already.
        """
        settings = self.settings
        grace_s = grace_of(run.tags, settings.grace_seconds)
        if cancellation is not None and cancellation.kind is CancelKind.SHUTDOWN:
            grace_s = min(grace_s, settings.shutdown_grace_s)
        if cancellation is not None and cancellation.kind is CancelKind.LEASE_LOST:
            grace_s = min(grace_s, settings.lost_grace_s)
        return min(grace_s, settings.dead_after_s) if self.is_cut_off else grace_s

    def steps_left(self, workers: dict[str, str]) -> Sequence[str]:
        """Of task ids and their workers, those whose worker lives, or whose children may still be there."""
        alive = self.heartbeats_of_steps.alive(workers.values())
        return [task_id for task_id, worker_id in workers.items() if worker_id in alive]
