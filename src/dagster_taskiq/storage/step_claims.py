"""Who works on one attempt of a step? One row per attempt in Dagster's key-value storage: claimed once, and for ever.

Knows that storage; not SQS, not processes. All calls block on the database. As in `claims`, the
events are written after the row, and decide nothing; the run's executor follows the events.
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Final

from dagster import DagsterInstance, DagsterRun, RunsFilter

from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.key_values import (
    delete_values_between,
    insert_value,
    read_values,
    replace_value,
    values_between,
)
from dagster_taskiq.dagster_compat.storage import delete_values, outages
from dagster_taskiq.queue_names import DEFAULT_ROUTE, is_route
from dagster_taskiq.storage.engine_events import EngineEvent, no_log, picked_up, released
from dagster_taskiq.storage.event_log import StepRef, append_event
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.stored import tell_unreadable

logger = logging.getLogger(__name__)

_PREFIX: Final = "dagster-taskiq/step/"
_DIGEST_BYTES: Final = 10
"""Two of these, in hexadecimal, and the prefix fit into the 64 characters that MySQL's unique index has of a key."""
_AFTER_HEX: Final = "g"
_LOOKED_AT_ONCE: Final = 2_000
_BATCH: Final = 500


class StepState(StrEnum):
    """What the row of an attempt says."""

    HELD = "held"
    OVER = "over"
    """Its process tree is gone. Nobody else ever has this attempt."""
    LOST = "lost"
    """As OVER, because its worker was found dead. Whoever found it may not have written the event yet."""
    RELEASED = "released"
    """It has not been begun, and another worker may have it."""


@dataclass(frozen=True, slots=True)
class StepClaim:
    """The row of one attempt of one step."""

    run_id: str
    step_key: str
    task_id: str
    worker_id: str
    state: StepState
    route: str = DEFAULT_ROUTE
    """Whose workers have it, and listen to its cancel queue."""

    @property
    def stored(self) -> str:
        """As it is in the storage; of the unnamed route as older versions write it, which compare the whole text."""
        facts = asdict(self)
        if self.route == DEFAULT_ROUTE:
            del facts["route"]
        return json.dumps(facts)


class StepClaims:
    """Reads and changes the claims on steps."""

    def __init__(self, instance: DagsterInstance, log_of: Callable[[str], str | None] = no_log) -> None:
        """`log_of`: where this worker's log of a run is to be read."""
        self._instance = instance
        self._log_of = log_of

    def claim(self, run: DagsterRun, step: StepRef, worker_id: str, where: str) -> StepClaim:
        """Claim an attempt that nobody has. The claim as it is now: this worker's, or that of who has it, or had it.

        An earlier try of this worker, whose answer was lost, is gone on with. Raises what the database raises also when
        only the event could not be written, for which the run's executor waits: then try again.
        """
        mine = _held(run.run_id, step, worker_id)
        key = _key(run.run_id, step.task_id)
        while not insert_value(self._instance, key, mine.stored):
            found = self.read(run.run_id, [step.task_id]).get(step.task_id)
            if found is None:
                continue  # deleted in between
            if found == mine:
                break  # the event may be missing; twice does no harm
            if found.state is not StepState.RELEASED:
                return found
            if replace_value(self._instance, key, found.stored, mine.stored):
                break
        self._note(run, step, picked_up(worker_id, step.task_id, where, self._log_of(run.run_id)))
        return mine

    def find(self, run_id: str, step: StepRef) -> StepClaim | None:
        """The claim of who has, or had, the attempt, alive or not: it is never started a second time."""
        found = self.read(run_id, [step.task_id]).get(step.task_id)
        return found if found is not None and found.state is not StepState.RELEASED else None

    def release(self, run: DagsterRun, step: StepRef, worker_id: str, why: str) -> None:
        """Give up an attempt that was not begun, so that another worker may have it.

        Raises what the database raises also when only the event could not be written: then try again.
        """
        if self._change(run.run_id, step, worker_id, StepState.RELEASED) or self._has_released(run, step, worker_id):
            self._note(run, step, released(worker_id, step.task_id, why))

    def end(self, run_id: str, step: StepRef, worker_id: str) -> bool:
        """The process tree of that worker's attempt is gone. False: it had not got it, or this was known."""
        return self._change(run_id, step, worker_id, StepState.OVER)

    def lose(self, run_id: str, step: StepRef, worker_id: str) -> bool:
        """That worker, which has the attempt, is dead. False: it has not got it any more."""
        return self._change(run_id, step, worker_id, StepState.LOST)

    def read(self, run_id: str, task_ids: Iterable[str]) -> dict[str, StepClaim]:
        """The claims on these attempts, by task id, in one query."""
        found = map(_parsed, read_values(self._instance, [_key(run_id, task_id) for task_id in task_ids]).values())
        return {claim.task_id: claim for claim in found}

    def running(self, run_id: str) -> dict[str, StepClaim]:
        """The attempts of a run whose process trees are not known to be gone, by task id, in one query.

        The worker of one of them may be dead.
        """
        found = map(_parsed, values_between(self._instance, *_range(run_id)).values())
        return {claim.task_id: claim for claim in found if claim.state is StepState.HELD}

    def forget(self, run_id: str) -> None:
        """Delete all claims on the steps of a run that is final."""
        delete_values_between(self._instance, *_range(run_id))

    def _change(self, run_id: str, step: StepRef, worker_id: str, state: StepState) -> bool:
        held, key = _held(run_id, step, worker_id), _key(run_id, step.task_id)
        if replace_value(self._instance, key, held.stored, replace(held, state=state).stored):
            return True
        # Who says it may not know the step's route.
        found = self.read(run_id, [step.task_id]).get(step.task_id)
        if found is None or replace(found, route=held.route) != held:
            return False
        return replace_value(self._instance, key, found.stored, replace(found, state=state).stored)

    def _has_released(self, run: DagsterRun, step: StepRef, worker_id: str) -> bool:
        """At an earlier try, of which the answer or the event was lost."""
        found = self.read(run.run_id, [step.task_id]).get(step.task_id)
        return found is not None and (found.worker_id, found.state) == (worker_id, StepState.RELEASED)

    def _note(self, run: DagsterRun, step: StepRef, event: EngineEvent) -> None:
        try:
            append_event(self._instance, run, event, step.step_key)
        except outages():
            raise  # it is worth another try: the run's executor waits for it
        except Exception:  # the row decides
            logger.exception("engine event could not be written", extra={"run_id": run.run_id})


def forget_old_step_claims(instance: DagsterInstance, heartbeats: Heartbeats) -> None:
    """Delete the claims on steps of runs that are finished, or were deleted, and that nobody works on any more.

    For runs that no worker of ours has ended: those of another run launcher, and those whose worker died. Looks at a
    part of the rows, where there are many.
    """
    values = values_between(instance, _PREFIX + "0", _PREFIX + _AFTER_HEX, _LOOKED_AT_ONCE)
    if len(values) == _LOOKED_AT_ONCE:  # or else what goes on there would hide the others
        start = _PREFIX + secrets.token_hex(2)
        values |= values_between(instance, start, _PREFIX + _AFTER_HEX, _LOOKED_AT_ONCE)
    claims = dict(_readable(values))
    alive = heartbeats.alive({claim.worker_id for claim in claims.values() if claim.state is StepState.HELD})
    left = {
        key: claim.run_id
        for key, claim in claims.items()
        if claim.state is not StepState.HELD or claim.worker_id not in alive
    }
    run_ids = sorted(set(left.values()))
    for start_at in range(0, len(run_ids), _BATCH):
        some = run_ids[start_at : start_at + _BATCH]
        runs = instance.get_runs(RunsFilter(run_ids=some))
        over = set(some) - {run.run_id for run in runs if run.status not in FINISHED_STATUSES}
        delete_values(instance, [key for key, run_id in left.items() if run_id in over])


def _held(run_id: str, step: StepRef, worker_id: str) -> StepClaim:
    return StepClaim(run_id, step.step_key, step.task_id, worker_id, StepState.HELD, step.route)


def _range(run_id: str) -> tuple[str, str]:
    """The keys of a run's steps are between these two."""
    start = f"{_PREFIX}{_digest(run_id)}/"
    return start, start + _AFTER_HEX


def _key(run_id: str, task_id: str) -> str:
    return f"{_range(run_id)[0]}{_digest(task_id)}"


def _digest(text: str) -> str:
    return hashlib.blake2s(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _readable(values: Mapping[str, str]) -> Iterator[tuple[str, StepClaim]]:
    for key, value in values.items():
        try:
            yield key, _parsed(value)
        except (KeyError, TypeError, ValueError, RecursionError) as error:  # the others can be seen to all the same
            tell_unreadable(f"the claim on a step, {key}", error)


def _parsed(value: str) -> StepClaim:
    facts = json.loads(value)
    names = ("run_id", "step_key", "task_id", "worker_id")
    run_id, step_key, task_id, worker_id = (str(facts[name]) for name in names)
    route = facts.get("route")
    state = StepState(facts["state"])
    return StepClaim(run_id, step_key, task_id, worker_id, state, route if is_route(route) else DEFAULT_ROUTE)
