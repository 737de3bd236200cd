"""What all work of one worker shares. Knows who works where; not what is worked on."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from time import time
from typing import Any

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.metrics import DELIVERED, FORCED_KILLS, LEASES_LOST, TO_DELIVERED, TO_STOPPED, Metrics
from dagster_taskiq.process.supervise import Cancelled, ChildEnd, Processes
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.tags import grace_of


@dataclass(frozen=True, slots=True)
class ActiveTask:
    """One run, or one step, that this worker is at."""

    run_id: str
    step_key: str | None = None
    since: float = field(default_factory=time)


@dataclass(slots=True)
class WorkerContext:
    """One per worker."""

    instance: DagsterInstance
    settings: Settings
    claims: Claims
    heartbeats_of_steps: Heartbeats
    """The workers of steps are called dead later than those of runs."""
    processes: Processes
    worker_id: str
    where: str
    """The worker's process, in words."""
    cancel_tasks: Callable[[Iterable[str]], Awaitable[Any]]
    """Sends a cancel message for each task id; what fails does not raise."""
    metrics: Metrics = field(default_factory=lambda: Metrics([], ""))
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the worker's drain is over: whatever still goes on here has to end."""
    active: dict[str, ActiveTask] = field(default_factory=dict)
    """By task id, the work that has passed its admit_run."""

    def active_by_kind(self) -> dict[str, int]:
        """How many runs, and how many steps."""
        runs = sum(piece.step_key is None for piece in self.active.values())
        return {"runs": runs, "steps": len(self.active) - runs}

    def measure_delivery(self, cause: Cancellation) -> None:
        """Work that runs here was cancelled."""
        if cause.kind is CancelKind.LEASE_LOST:
            self.metrics.count(LEASES_LOST)
        elif cause.kind is CancelKind.REQUESTED:
            self.metrics.count(DELIVERED, Channel=cause.channel.value)
            if cause.requested_at is not None:
                self.metrics.put({TO_DELIVERED: max(0.0, cause.received_at - cause.requested_at)})

    def measure_end(self, end: ChildEnd | None) -> None:
        """How long it took a process tree to stop that was interrupted, and whether it had to be killed."""
        if end is not None and end.interrupted_at is not None:
            self.metrics.put({TO_STOPPED: max(0.0, end.gone_at - end.interrupted_at)})
            if end.kill_at is not None:
                self.metrics.count(FORCED_KILLS)

    def watched(self) -> dict[str, str]:
        """Task id to run id: what the status watch looks at."""
        return {task_id: piece.run_id for task_id, piece in self.active.items()}

    def grace_s(self, run: DagsterRun) -> float:
        """The run's own grace, if it is tagged with a sensible one."""
        return grace_of(run.tags, self.settings.grace_seconds)

    def grace_now_s(self, run: DagsterRun, cancelled: Cancelled) -> float:
        """What a child of the run gets between interrupt and kill, now that its work is cancelled."""
        grace_s = self.grace_s(run)
        shutting_down = cancelled.cause.kind is CancelKind.SHUTDOWN
        return min(grace_s, self.settings.shutdown_grace_s) if shutting_down else grace_s
