"""What all work of one worker shares. Knows who works where; not what is worked on."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.cancellation import CancelKind
from dagster_taskiq.claims import Claims
from dagster_taskiq.settings import Settings, grace_of
from dagster_taskiq.supervisor import Cancelled, Processes


@dataclass(slots=True)
class Workplace:
    """One per worker."""

    instance: DagsterInstance
    settings: Settings
    claims: Claims
    processes: Processes
    worker_id: str
    where: str
    """The worker's process, in words."""
    cancel_tasks: Callable[[Iterable[str]], Awaitable[Any]]
    """Sends a cancel message for each task id; what fails does not raise."""
    watched: dict[str, str] = field(default_factory=dict)
    """Task id to run id, of the work that has passed its preflight: what the status watch looks at."""

    def grace_s(self, run: DagsterRun) -> float:
        """The run's own grace, if it is tagged with a sensible one."""
        return grace_of(run.tags, self.settings.grace_seconds)

    def grace_now_s(self, run: DagsterRun, cancelled: Cancelled) -> float:
        """What a child of the run gets between interrupt and kill, now that its work is cancelled."""
        grace_s = self.grace_s(run)
        shutting_down = cancelled.cause.kind is CancelKind.SHUTDOWN
        return min(grace_s, self.settings.shutdown_grace_s) if shutting_down else grace_s
