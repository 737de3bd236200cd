"""Who works on a run or a step? Claims, which are engine events in the run's own log.

Knows Dagster's event log and the workers' heartbeats; not SQS, not processes. All calls block on the database.

Two receivers of one message both append their claim before they read the log, so at least one of them sees the other.
Their order in the log alone does not decide: PostgreSQL gives ids before it commits, so an earlier claim can become
visible after a later one has been read and acted upon. Therefore no worker starts while there is a rival: the later one
gives way to the earlier one, and the earlier one waits for that (`rival`).
"""

from dataclasses import dataclass, field

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.storage.engine_events import (
    TASK_ID_KEY,
    WORKER_KEY,
    Stage,
    picked_up,
    released,
)
from dagster_taskiq.storage.event_log import StepRef, append_event, read_engine_events
from dagster_taskiq.storage.heartbeats import Heartbeats


@dataclass(frozen=True, slots=True)
class Owner:
    """The worker that holds the claim on a run."""

    worker_id: str
    alive: bool
    in_doubt: bool = False
    """Its heartbeat is old, but it is too early to call it dead."""
    beside: tuple[str, ...] = field(default=(), compare=False)
    """Other workers that have also claimed it and not released it."""


def _beside(claimants: dict[str, None], owner: str) -> tuple[str, ...]:
    return tuple(worker_id for worker_id in claimants if worker_id != owner)


class Claims:
    """Reads and writes claims. `heartbeats` decides whether a claimant is alive."""

    def __init__(self, instance: DagsterInstance, heartbeats: Heartbeats) -> None:
        self.instance = instance
        self.heartbeats = heartbeats

    def claim(self, run: DagsterRun, worker_id: str, task_id: str, where: str, step_key: str | None = None) -> None:
        """Append the claim. Afterwards `owner` or `first_claimant`, and `rival`, show whether it counts."""
        append_event(self.instance, run, picked_up(worker_id, task_id, where), step_key)

    def release(self, run: DagsterRun, worker_id: str, task_id: str, why: str, step_key: str | None = None) -> None:
        """Give up the claim, so that another worker's claim counts although this worker is alive."""
        append_event(self.instance, run, released(worker_id, task_id, why), step_key)

    def is_waiting(self, run_id: str) -> bool:
        """Whether the run was submitted (launched, or resumed) and no worker has claimed that task."""
        submitted, claimed = None, set()
        for stage, facts in read_engine_events(self.instance, run_id):
            if stage is Stage.SUBMITTED:
                submitted = facts.get(TASK_ID_KEY)
            elif stage is Stage.PICKED_UP:  # the worker may be faster than the launcher's event
                claimed.add(facts.get(TASK_ID_KEY))
        return submitted is not None and submitted not in claimed

    def first_claimant(self, run_id: str, step: StepRef) -> str | None:
        """The worker whose claim on a step counts, alive or not: an attempt is never started a second time."""
        return next(iter(self._claimants(run_id, step)), None)

    def owner(self, run_id: str, me: str | None = None) -> Owner | None:
        """The first claimant that is alive; if none is, the last one; None when no worker has claimed the run.

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
        """Another worker that has claimed the same work and not given way.

        A dead worker is not a rival, except for a step: it may have executed the step.
        """
        others = [worker_id for worker_id in self._claimants(run_id, step) if worker_id != me]
        counting = self.heartbeats.alive(others) if step is None else others
        return next((worker_id for worker_id in others if worker_id in counting), None)

    def release_dead_claims(self, run: DagsterRun, me: str, task_id: str) -> None:
        """Release the claims of dead workers, in their name, after this worker has taken over.

        One of them may only hang. When it continues, it finds that its claim is gone.
        """
        others = [worker_id for worker_id in self._claimants(run.run_id) if worker_id != me]
        alive = self.heartbeats.alive(others)
        for worker_id in others:
            if worker_id not in alive:
                self.release(run, worker_id, task_id, f"it is dead, and {me} takes over")

    def _claimants(self, run_id: str, step: StepRef | None = None) -> dict[str, None]:
        """Workers that have claimed and not released, in the order of their claims."""
        claimants: dict[str, None] = {}
        for stage, facts in read_engine_events(self.instance, run_id, step):
            worker_id = str(facts.get(WORKER_KEY))
            if stage is Stage.PICKED_UP:
                claimants.setdefault(worker_id)
            elif stage is Stage.RELEASED:
                claimants.pop(worker_id, None)
        return claimants
