"""Which code locations can each worker load? What workers say of it in their heartbeats, and who else is there.

Knows heartbeats and runs; not how a worker finds it out. docs/routes.md says it for people.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._text import clean_text
from dagster_taskiq.dagster_compat.code_origin import describe_code, pointer_of
from dagster_taskiq.dagster_compat.storage import put_value
from dagster_taskiq.messages import is_run_id
from dagster_taskiq.queue_names import DEFAULT_ROUTE, is_route, queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage.heartbeats import Heartbeat, Heartbeats
from dagster_taskiq.storage.routing import code_location_of, route_of_run, served_routes
from dagster_taskiq.storage.stored import Unreadable, stored_object, tell_unreadable

FACT: Final = "code"
"""What it is called in a heartbeat."""
ASK_KEY: Final = "dagster-taskiq/code-asked"
NEXT_STEP: Final = "a worker must have the code of what it serves: install it there, or give the location its own route"
_MOST_TOLD: Final = 20
_LONGEST: Final = 200
_MARK_BYTES: Final = 4
_MOST_NAMED: Final = 5
_RECENT_RUNS: Final = 100

WorkSlots = Literal["runs", "steps"]


@dataclass(frozen=True, slots=True)
class Code:
    """The code that a run is loaded from."""

    location: str
    """The name of its code location; of one that was launched without any, the module or the file."""
    mark: str
    """Another one when the location is loaded from elsewhere."""


def code_of(run: DagsterRun) -> Code | None:
    """None for a run that does not say where its code is."""
    pointer = pointer_of(run)
    if pointer is None:
        return None
    location = code_location_of(run) or describe_code(pointer)
    mark = hashlib.blake2s(repr(pointer).encode(), digest_size=_MARK_BYTES).hexdigest()
    return Code(_short(location), mark)


def told(known: Mapping[Code, str]) -> list[list[str]]:
    """For a heartbeat: what is known of code locations, the newest at the end; why not, or nothing."""
    return [[code.location, code.mark, _short(why)] for code, why in [*known.items()][-_MOST_TOLD:]]


def heard(facts: Mapping[str, Any]) -> dict[Code, str]:
    """What a worker says of code locations, by the facts of its heartbeat; empty for one that has not looked yet."""
    entries = facts.get(FACT, ())
    return {Code(_short(location), _short(mark)): _short(why) for location, mark, why in entries[-_MOST_TOLD:]}


def by_location(known: Mapping[Code, str]) -> dict[str, str]:
    """The same for people: by location, why it cannot be loaded, or nothing. What was seen last counts."""
    return {code.location: why for code, why in known.items()}


def ask_for(instance: DagsterInstance, run: DagsterRun, route: str) -> None:
    """Have the workers of that route say whether they have the code of that run: they read it with their heartbeats."""
    put_value(instance, ASK_KEY, json.dumps({"run_id": run.run_id, "route": route}))


def asked_for(text: str | None) -> tuple[str, str] | None:
    """Which run, and of which route, is asked for by what is stored at `ASK_KEY`; None: nothing that can be read."""
    try:
        stored = stored_object(text) if text is not None else {}
    except Unreadable as error:
        tell_unreadable("a question for the code of a run", error)
        return None
    run_id, route = stored.get("run_id"), stored.get("route")
    if not is_run_id(run_id) or not isinstance(route, str) or not is_route(route):
        return None
    return run_id, route


def who_serves(
    beats: Iterable[Heartbeat], queue: str, route: str, slots: WorkSlots, *, but: str | None = None
) -> list[Heartbeat]:
    """Of living workers those that take runs, or steps, of that route. `queue`: of the unnamed route of their fleet."""
    return [beat for beat in beats if beat.worker_id != but and _serves(beat.facts, queue, route, slots)]


def _serves(facts: Mapping[str, Any], queue: str, route: str, slots: WorkSlots) -> bool:
    number = facts.get("slots") or (1, 1)
    has_slots = number[0 if slots == "runs" else 1] > 0
    return (
        has_slots and "stopping" not in facts and facts.get("queue", queue) == queue and route in served_routes(facts)
    )


def nobody_can(code: Code, route: str, refusals: Mapping[str, str]) -> str:
    """The error of a run or a step whose code no worker has. `refusals`: why, by worker."""
    of_route = "" if route == DEFAULT_ROUTE else f" of route {route!r}"
    whys = [f"{clean_text(worker)}: {why}" for worker, why in [*refusals.items()][:_MOST_NAMED]]
    more = f"; and {len(refusals) - _MOST_NAMED} more" if len(refusals) > _MOST_NAMED else ""
    return f"no living worker{of_route} can load code location {code.location!r}: {'; '.join(whys)}{more}; {NEXT_STEP}"


def who_has_it(known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """In lines: which code locations every worker has, and who has each of the others. `known`: by worker, by location.

    A worker that has not looked for a location is not named with it.
    """
    by_code: dict[str, dict[str, str]] = {}
    for worker, code in known.items():
        for location, why in code.items():
            by_code.setdefault(location, {})[worker] = why
    everywhere = sorted(location for location, whys in by_code.items() if not any(whys.values()))
    lines = [f"code locations that the workers have: {_some(everywhere)}"] if everywhere else []
    for location, whys in sorted(by_code.items()):
        without = [f"{worker} ({why})" for worker, why in whys.items() if why]
        having = [worker for worker, why in whys.items() if not why]
        if without:
            who = f"on {_some(having)}, not on" if having else "on no worker:"
            lines.append(f"code location {location}: {who} {_some(without)}")
    return lines[:_MOST_TOLD]


def without_a_worker(instance: DagsterInstance, settings: Settings) -> list[str]:
    """Code of recent runs that no living worker of their route can load, each in a line. Blocks on the database."""
    beats = Heartbeats.of_runs(instance, settings).living()
    found = []
    for code, route in recent_code(instance):
        refusals = _refusals(beats, queue_name(settings.queue_url), code, route)
        if refusals and all(refusals.values()):
            found.append(nobody_can(code, route, refusals))
    return found[:_MOST_TOLD]


def why_it_waits(instance: DagsterInstance, settings: Settings, run: DagsterRun) -> str | None:
    """Which living workers, to whom its message may come, do not have a run's code; None: none of them says so.

    Blocks on the database.
    """
    code = code_of(run)
    if code is None:
        return None
    beats = Heartbeats.of_runs(instance, settings).living()
    refusals = _refusals(beats, queue_name(settings.queue_url), code, route_of_run(run))
    without = [f"{worker} ({why})" for worker, why in refusals.items() if why]
    return f"a worker that has the code of {code.location}; not {_some(without)}" if without else None


def _refusals(beats: Sequence[Heartbeat], queue: str, code: Code, route: str) -> dict[str, str]:
    """By worker that takes runs of that route, why not, or nothing."""
    return {
        clean_text(beat.worker_id): heard(beat.facts).get(code, "") for beat in who_serves(beats, queue, route, "runs")
    }


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def recent_code(instance: DagsterInstance, routes: Sequence[str] | None = None) -> dict[tuple[Code, str], DagsterRun]:
    """Of the latest hundred runs, by their code and their route, the newest one each; the oldest first.

    `routes`: of these only.
    """
    found: dict[tuple[Code, str], DagsterRun] = {}
    for run in reversed(instance.get_runs(limit=_RECENT_RUNS)):
        code, route = code_of(run), route_of_run(run)
        if code is not None and (routes is None or route in routes):
            found.pop((code, route), None)
            found[code, route] = run
    return found


def _short(text: str) -> str:
    return clean_text(text)[:_LONGEST]
