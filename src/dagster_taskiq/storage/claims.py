"""Who works on a run? One row per run in Dagster's key-value storage, changed only by compare-and-swap.

Knows that storage and the workers' heartbeats; not SQS, not processes. All calls block on the database. The events
"picked up by …" and "released by …" are written after the row: they are for people, and decide nothing.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.key_values import (
    delete_value,
    insert_value,
    read_values,
    replace_value,
    values_and_runs,
)
from dagster_taskiq.dagster_compat.storage import delete_values, values_under
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.engine_events import EngineEvent, no_log, picked_up, released
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.stored import stored_object, stored_time, tell_unreadable
from dagster_taskiq.storage.tags import TASK_ID_TAG, own_tags, was_stopped

logger = logging.getLogger(__name__)

_WAITING: Final = (DagsterRunStatus.NOT_STARTED, DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING)
_PREFIX: Final = "dagster-taskiq/claim/"
"""With a run's id, a UUID, it is shorter than the 64 characters that MySQL's unique index has of a key."""
_BATCH: Final = 500
_CLEANUP_WITHIN_S: Final = 86_400
_NOT_KNOWN: Final = "(unknown)"
"""Who has the run, where its row cannot be read."""


class ClaimState(StrEnum):
    """What a claim's row says."""

    HELD = "held"
    RELEASED = "released"
    """Nobody has the run; the epoch is kept."""
    GIVEN_UP = "given up"
    """Run monitoring was told that the worker is dead, and is about to resume the run or to fail it."""


GIVEN_UP_LASTS_S: Final = 30.0
"""For so long nobody follows the run's message: run monitoring resumes the run, under another task id, or fails it."""
_STATES: Final = frozenset(state.value for state in ClaimState)


@dataclass(frozen=True, slots=True)
class Claim:
    """The row of one run."""

    run_id: str
    epoch: int
    """Higher than that of every earlier claim on the run."""
    worker_id: str
    task_id: str
    state: ClaimState
    since: float
    """When the row was last changed, in seconds since the epoch, by the clock of who changed it."""
    stored: str = field(default="", repr=False, compare=False)
    """The row as it was read: what a change has to find."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The worker that holds the claim on a run."""

    claim: Claim
    alive: bool
    in_doubt: bool = False
    """Its heartbeat is old, but it is too early to call it dead."""

    @property
    def worker_id(self) -> str:
        """The worker's id."""
        return self.claim.worker_id


class Claims:
    """Reads and changes claims, and remembers which of them this process has. `heartbeats` decides who is alive."""

    def __init__(
        self,
        instance: DagsterInstance,
        heartbeats: Heartbeats,
        without_message: Heartbeats | None = None,
        log_of: Callable[[str], str | None] = no_log,
    ) -> None:
        """`without_message`: decides who is alive for those who have not got the message of the run again.

        `log_of`: where this worker's log of a run is to be read.
        """
        self._log_of = log_of
        self.instance = instance
        self.heartbeats = heartbeats
        self.without_message = without_message or heartbeats
        self._mine: dict[str, Claim] = {}
        self._over: dict[str, Claim] = {}
        """Those that are to be deleted, until the database has answered."""

    @classmethod
    def of(cls, instance: DagsterInstance, settings: Settings) -> "Claims":
        """With the times of these settings."""
        return cls(instance, Heartbeats.of_runs(instance, settings), Heartbeats.without_a_message(instance, settings))

    # Reading

    def read(self, run_ids: Iterable[str]) -> dict[str, Claim]:
        """The claims on these runs, released ones included, in one query."""
        keys = {_key(run_id): run_id for run_id in run_ids}
        return {keys[key]: _parsed(value, keys[key]) for key, value in read_values(self.instance, keys).items()}

    def owners(self, run_ids: Iterable[str], *, without_message: bool = False) -> dict[str, Owner]:
        """Who holds the claims on these runs, in two queries. A run that nobody has is not in it.

        `without_message`: as it has to be judged by those who act without the message of the run, before which its
        worker may only lack the database.
        """
        held = {run_id: claim for run_id, claim in self.read(run_ids).items() if claim.state is not ClaimState.RELEASED}
        heartbeats = self.without_message if without_message else self.heartbeats
        alive, in_doubt = heartbeats.look(claim.worker_id for claim in held.values())
        return {
            run_id: Owner(
                claim,
                # One that was given up stays so: monitoring has acted upon it.
                alive=claim.worker_id in alive | in_doubt and claim.state is ClaimState.HELD,
                in_doubt=claim.worker_id in in_doubt and claim.state is ClaimState.HELD,
            )
            for run_id, claim in held.items()
        }

    def owner(self, run_id: str, *, without_message: bool = False) -> Owner | None:
        """Who holds the claim on a run; None: nobody. `without_message`: see `owners`."""
        return self.owners([run_id], without_message=without_message).get(run_id)

    def unfinished(self) -> tuple[dict[str, Claim], set[str], bool]:
        """All claims by run, the runs that are CANCELING, and whether any run waits for its start, in one query."""
        values, canceling, waits = values_and_runs(self.instance, _PREFIX, DagsterRunStatus.CANCELING, _WAITING)
        return {run_id: _parsed(value, run_id) for run_id, value in values.items()}, canceling, waits

    # Changing

    def take(self, run: DagsterRun, worker_id: str, task_id: str, where: str, seen: Claim | None) -> Claim | None:
        """Claim a run whose row is as it was `seen` (None: there was none), under a new epoch.

        None: it was changed meanwhile, so somebody else was quicker.
        """
        claim = self._swap(run.run_id, seen, worker_id, task_id, ClaimState.HELD)
        if claim is None:
            return None
        newer = self._mine.get(run.run_id)
        if newer is None or newer.epoch < claim.epoch:  # or else this is a call that was given up, and came late
            self._mine[run.run_id] = claim
        if seen is not None and seen.state is not ClaimState.RELEASED and seen.worker_id != worker_id:
            self._note(run, released(seen.worker_id, seen.task_id, f"it is dead, and {worker_id} takes over"))
        self._note(run, picked_up(worker_id, task_id, where, self._log_of(run.run_id)))
        return claim

    def release(self, run: DagsterRun, why: str, claim: Claim | None = None) -> bool:
        """Give up this process's claim, so that another worker may have the run although this one is alive.

        False: there was nothing to give up, because it was lost before. `claim`: only this one.
        """
        claim = claim or self._mine.get(run.run_id)
        if claim is None:
            return False
        done = self._swap(run.run_id, claim, claim.worker_id, claim.task_id, ClaimState.RELEASED) is not None
        if self._mine.get(run.run_id) == claim:
            self._mine.pop(run.run_id, None)
        if done:
            self._note(run, released(claim.worker_id, claim.task_id, why))
        return done

    def give_up(self, run_id: str, seen: Claim) -> bool:
        """Before monitoring is told that the worker of a run is dead. False: somebody has taken the run over.

        From here on nobody takes it over with the old message, as long as monitoring needs to resume or to fail it.
        """
        return self._swap(run_id, seen, seen.worker_id, seen.task_id, ClaimState.GIVEN_UP) is not None

    def withhold(self, run: DagsterRun, who: str) -> Claim | None:
        """Keep all workers from a run that none has, for half a minute at most: it is about to be ended by `who`.

        None: somebody has it, or was quicker. As it is for a run that was given up, its message is not followed
        meanwhile. Without an event in the run's log. It lasts until `let_go`.
        """
        seen = self.read([run.run_id]).get(run.run_id)
        if seen is not None and (seen.state is ClaimState.HELD or is_given_up(seen)):
            return None
        task_id = own_tags(run).get(TASK_ID_TAG, who)
        return self._swap(run.run_id, seen, who, task_id, ClaimState.GIVEN_UP)

    def is_withheld(self, run_id: str) -> bool:
        """Whether somebody is ending the run at this moment, or run monitoring has it."""
        seen = self.read([run_id]).get(run_id)
        return seen is not None and is_given_up(seen)

    def let_go(self, withheld: Claim) -> None:
        """The opposite of `withhold`."""
        delete_value(self.instance, _key(withheld.run_id), withheld.stored)

    def forget(self, run_id: str) -> None:
        """Delete this process's claim on a run that is final. When that raises, it may be tried again."""
        # No longer ours before the row is gone, or `lost` would find it lost.
        claim = self._mine.pop(run_id, None) or self._over.get(run_id)
        if claim is not None:
            self._over[run_id] = claim
            delete_value(self.instance, _key(run_id), claim.stored)
            self._over.pop(run_id, None)

    def disown(self, run_id: str) -> None:
        """Know no longer of a claim whose row is another worker's, or gone."""
        self._mine.pop(run_id, None)

    # Is it still ours?

    def mine(self, run_id: str) -> Claim | None:
        """This process's claim on a run, as far as it knows."""
        return self._mine.get(run_id)

    def lost(self) -> dict[str, Claim]:
        """Of this process's claims, by run, those that it has no longer, in one query; none while it has no claim."""
        mine = dict(self._mine)
        now = self.read(mine) if mine else {}
        return {
            run_id: claim
            for run_id, claim in mine.items()
            # What has ended meanwhile, or was claimed anew, is not lost; nor is what this worker is just releasing.
            if self._mine.get(run_id) is claim
            # A row that was deleted belongs to a run that somebody else has brought to its end.
            and (
                run_id not in now
                or now[run_id].worker_id != claim.worker_id
                or now[run_id].state is ClaimState.GIVEN_UP
            )
        }

    def holds(self, run_id: str) -> bool:
        """Whether this process has the claim on a run. To be asked before anything about the run is written."""
        claim = self._mine.get(run_id)
        now = self.read([run_id]).get(run_id) if claim is not None else None
        return claim is not None and now is not None and now.stored == claim.stored

    def _swap(self, run_id: str, seen: Claim | None, worker_id: str, task_id: str, state: ClaimState) -> Claim | None:
        epoch = seen.epoch if seen is not None else 0
        # A release keeps the epoch: whoever reads it knows which claim ended.
        epoch = epoch if state is ClaimState.RELEASED else epoch + 1
        claim = Claim(run_id, epoch, worker_id, task_id, state, time.time())
        facts = {name: value for name, value in asdict(claim).items() if name != "stored"}
        claim = replace(claim, stored=json.dumps(facts))
        key = _key(run_id)
        if seen is None:
            done = insert_value(self.instance, key, claim.stored)
        else:
            done = replace_value(self.instance, key, seen.stored, claim.stored)
        return claim if done else None

    def _note(self, run: DagsterRun, event: EngineEvent) -> None:
        try:
            append_event(self.instance, run, event)
        except Exception:  # the row decides
            logger.exception("engine event could not be written", extra={"run_id": run.run_id})


def is_given_up(claim: Claim) -> bool:
    """Whether workers leave the run alone. When who has given it up dies over it, they do so for half a minute."""
    return claim.state is ClaimState.GIVEN_UP and abs(time.time() - claim.since) < GIVEN_UP_LASTS_S


def held_claims(instance: DagsterInstance) -> list[Claim]:
    """The claims that workers hold, dead ones included, in one query."""
    return [claim for claim in _all(instance) if claim.state is ClaimState.HELD]


def forget_old_claims(instance: DagsterInstance, heartbeats: Heartbeats, now: Callable[[], float] = time.time) -> None:
    """Delete the claims on runs that are finished, or were deleted, and whose worker did not come to do it.

    Those on runs that were stopped are kept for a day: the cleanup of such a run may be outstanding, because it was
    marked by force before its worker died.
    """
    claims = _all(instance)
    alive = heartbeats.alive(claim.worker_id for claim in claims)
    left = [claim for claim in claims if claim.worker_id not in alive or claim.state is not ClaimState.HELD]
    for start in range(0, len(left), _BATCH):
        some = left[start : start + _BATCH]
        runs = instance.get_runs(RunsFilter(run_ids=[claim.run_id for claim in some]))
        going_on = {run.run_id for run in runs if run.status not in FINISHED_STATUSES}
        stopped = {run.run_id for run in runs if was_stopped(run)}
        kept = going_on | {
            claim.run_id for claim in some if claim.run_id in stopped and now() - claim.since < _CLEANUP_WITHIN_S
        }
        delete_values(instance, [_key(claim.run_id) for claim in some if claim.run_id not in kept])


def _key(run_id: str) -> str:
    return _PREFIX + run_id


def _all(instance: DagsterInstance) -> list[Claim]:
    return [_parsed(value, key.removeprefix(_PREFIX)) for key, value in values_under(instance, _PREFIX).items()]


def _parsed(value: str, run_id: str) -> Claim:
    """The claim on that run. One that cannot be read is held, as far as anybody knows, by a worker that is not heard.

    So nobody has the run until it is known that this worker is dead, and then it is taken over as any other.
    """
    try:
        facts = stored_object(value)
        state = str(facts["state"])
        return Claim(
            run_id=run_id,
            epoch=int(str(facts["epoch"])),
            worker_id=str(facts["worker_id"]),
            task_id=str(facts["task_id"]),
            state=ClaimState(state) if state in _STATES else ClaimState.HELD,  # of a newer version: its worker knows
            since=stored_time(facts["since"]),
            stored=value,
        )
    except (KeyError, ValueError) as error:
        tell_unreadable(f"the claim on run {run_id}", error)
        return Claim(run_id, 0, _NOT_KNOWN, _NOT_KNOWN, ClaimState.HELD, 0.0, value)
