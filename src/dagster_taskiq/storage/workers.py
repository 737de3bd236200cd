"""Which workers are there, and what does each one work on? From heartbeats, and from the claims that are newer.

Knows heartbeats, claims and Dagster's runs; not SQS, not processes. All calls block on the database.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final, TypeAlias

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord, RunsFilter

from dagster_taskiq._text import one_line
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.claims import Claim, held_claims
from dagster_taskiq.storage.code_locations import by_location, heard
from dagster_taskiq.storage.heartbeats import Heartbeat, Heartbeats
from dagster_taskiq.storage.routing import route_of_run, served_routes

ALIVE: Final = "alive"
SILENT: Final = "silent"
DEAD: Final = "dead"
GONE: Final = "gone"
DRAINING: Final = "draining"
_IMPLICIT_JOB: Final = "__ASSET_JOB"
_NAMED_ASSETS: Final = 2
_Entry: TypeAlias = tuple[str, str | None, float, str | None]
"""Run, step, since when; and the route of a step, where the worker says it."""


@dataclass(frozen=True, slots=True)
class WorkInfo:
    """One run, or one step, that a worker is working on. `since`: in seconds since the epoch."""

    run_id: str
    job: str | None
    """None when the run was deleted."""
    status: str | None
    step_key: str | None
    since: float
    assets: str = ""
    """What a run of selected assets materializes, in words; its job has no name of its own."""
    route: str = DEFAULT_ROUTE
    """Where it has waited."""


@dataclass(frozen=True, slots=True)
class StopInfo:
    """Since when a worker stops, and why. Times are by its own clock, in seconds since the epoch."""

    at: float
    by: str
    """A person, `a signal` (SIGTERM), or `a deployment`."""
    reason: str | None
    until: float | None
    """When what still runs is interrupted; None: never, it is finished."""

    def described(self) -> str:
        """Who has stopped it, and why, in one line."""
        return f"{one_line(self.by)}: {one_line(self.reason)}" if self.reason else one_line(self.by)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker, by its last heartbeat. Times are by its own clock, in seconds since the epoch."""

    worker_id: str
    state: str
    """`alive`; `silent`: too early to call it dead; `dead`; `gone`: it has reported its end."""
    where: str
    since: float | None
    heard: float
    """Time of its last heartbeat."""
    runs: int | None
    """Slots for runs."""
    steps: int | None
    """Slots for steps."""
    work: tuple[WorkInfo, ...]
    queue: str | None = None
    """Name of the work queue of the unnamed route, from which those of the others are derived."""
    routes: tuple[str, ...] = (DEFAULT_ROUTE,)
    """What it serves, in order of preference."""
    stopping: StopInfo | None = None
    """It takes nothing new, and ends."""
    held: float | None = None
    """The hold on the fleet that it has heard of: since when that is."""
    code: Mapping[str, str] = field(default_factory=dict)
    """By code location that it has looked for, why it cannot load it, or nothing when it can."""

    @property
    def shown_state(self) -> str:
        """`draining` for one that is alive and stops."""
        return DRAINING if self.stopping is not None and self.state == ALIVE else self.state


def list_workers(instance: DagsterInstance, settings: Settings, *, everybody: bool = False) -> list[WorkerInfo]:
    """The workers that are alive or silent, the oldest first; with `everybody` those of the last week.

    One look cannot distinguish a dead worker from one whose heartbeat is late. So a worker is `dead` when it has been
    silent for longer than it takes to confirm a death.
    """
    now = time.time()
    heartbeats = Heartbeats.of_runs(instance, settings)
    given_up = settings.dead_after_s + settings.death_confirmed_after_s
    found = []
    for last in sorted(heartbeats.last(), key=lambda beat: (beat.facts.get("since", 0), beat.worker_id)):
        state = _state(last, now, settings.dead_after_s, given_up)
        if everybody or state in (ALIVE, SILENT):
            found.append((last, state))
    work = _work(instance, [last for last, _ in found])
    run_ids = {run_id for entries in work.values() for run_id, *_ in entries}
    records = instance.get_run_records(RunsFilter(run_ids=sorted(run_ids))) if run_ids else ()
    runs = {record.dagster_run.run_id: record for record in records}
    return [_worker_info(last, state, work[last.worker_id], runs) for last, state in found]


def _state(last: Heartbeat, now: float, silent_after_s: float, dead_after_s: float) -> str:
    if last.gone:
        return GONE
    age = abs(now - last.at)
    return ALIVE if age < silent_after_s else SILENT if age < dead_after_s else DEAD


def describe_assets(run: DagsterRun) -> str:
    """The assets of a run of selected assets: "orders, raw/prices and 3 more"; empty for a run of a job with a name."""
    selected = sorted(key.to_user_string() for key in run.asset_selection or ())
    if not run.job_name.startswith(_IMPLICIT_JOB) or not selected:
        return ""
    more = f" and {len(selected) - _NAMED_ASSETS} more" if len(selected) > _NAMED_ASSETS else ""
    return ", ".join(selected[:_NAMED_ASSETS]) + more


def _work(instance: DagsterInstance, beats: Sequence[Heartbeat]) -> dict[str, list[_Entry]]:
    """What each worker is at: as its heartbeat says, and the runs that it has picked up since then."""
    claims: dict[str, list[Claim]] = {}
    for claim in held_claims(instance) if beats else ():
        claims.setdefault(claim.worker_id, []).append(claim)
    found: dict[str, list[_Entry]] = {}
    for last in beats:
        routes = last.facts.get("work_routes", ())
        entries: list[_Entry] = [
            (*entry, route) for entry, route in zip_longest(last.facts.get("work", ()), routes) if entry is not None
        ]
        known = {run_id for run_id, step_key, *_ in entries if step_key is None}
        # Both times are by the clock of that worker.
        newer = [one for one in claims.get(last.worker_id, ()) if one.since > last.at and one.run_id not in known]
        entries += [(claim.run_id, None, claim.since, None) for claim in newer]
        found[last.worker_id] = entries
    return found


def _worker_info(last: Heartbeat, state: str, entries: Sequence[_Entry], runs: Mapping[str, RunRecord]) -> WorkerInfo:
    facts: dict[str, Any] = dict(last.facts)
    slots = facts.get("slots", (None, None))
    served, work = served_routes(facts), []
    for run_id, step_key, since, told in entries:
        record = runs.get(run_id)
        of_step = (told or _only(served)) if step_key is not None else None
        if record is None:
            route = of_step or _only(served) or DEFAULT_ROUTE
            work.append(WorkInfo(run_id, None, None, step_key, since, route=route))
        elif not _has_ended_since(record, last, is_alive=state == ALIVE):
            run = record.dagster_run
            route = of_step or route_of_run(run)
            work.append(WorkInfo(run_id, run.job_name, run.status.value, step_key, since, describe_assets(run), route))
    return WorkerInfo(
        worker_id=last.worker_id,
        state=state,
        where=str(facts.get("where", "")),
        since=facts.get("since"),
        heard=last.at,
        runs=slots[0],
        steps=slots[1],
        work=tuple(work),
        queue=facts.get("queue"),
        routes=served,
        stopping=_stopping(facts.get("stopping")),
        held=facts.get("held"),
        code=by_location(heard(facts)),
    )


def _only(served: Sequence[str]) -> str | None:
    """The route of all work of a worker that serves one."""
    return served[0] if len(served) == 1 else None


def _stopping(facts: Mapping[str, Any] | None) -> StopInfo | None:
    if facts is None:
        return None
    return StopInfo(facts["at"], str(facts.get("by") or ""), facts.get("reason"), facts.get("until"))


def _has_ended_since(record: RunRecord, last: Heartbeat, *, is_alive: bool) -> bool:
    """Whether the run has ended after this heartbeat named it. One that was cancelled by force may still be at work.

    A worker that stops says at once when something is at work no more, so it is believed.
    """
    if is_alive and last.facts.get("stopping") is not None:
        return False
    status = record.dagster_run.status
    ended_at = record.end_time or 0.0
    return status is DagsterRunStatus.SUCCESS or (status in FINISHED_STATUSES and ended_at > last.at)
