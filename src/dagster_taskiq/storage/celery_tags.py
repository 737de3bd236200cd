"""Tags by which dagster-celery chooses a priority: what they do here, which is nothing, and what to do instead.

`dagster-celery/queue` is none of them: it is read as the route. Knows no storage. They are not ignored silently: a
run's log has a warning, once for the run and once for its steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from dagster_taskiq.storage.engine_events import EngineEvent, ignored_tags, listed

_INSTEAD: Final[Mapping[str, str]] = {
    "dagster-celery/priority": "set dagster/priority on the op: of one run, steps with a greater number are sent first;"
    " a step that is to overtake those of other runs belongs on a route of its own, which workers prefer:"
    " dagster-taskiq/queue: urgent on the op, and worker start -q urgent -q default",
    "dagster-celery/run_priority": "set dagster/priority on the run: those with a greater number leave Dagster's queue"
    " first",
}


def warning_of_run(tags: Mapping[str, str]) -> EngineEvent | None:
    """For the tags of a run, its job's among them; None: it has none of these."""
    found = {f"{tag}={tags[tag]} of the run": tag for tag in _INSTEAD if tag in tags}
    return _warning(list(found), found.values())


def warning_of_steps(steps: Mapping[str, Mapping[str, str]]) -> EngineEvent | None:
    """For the tags of steps, by step key; None: they have none of these."""
    having = {tag: [key for key, tags in steps.items() if tag in tags] for tag in _INSTEAD}
    found = {f"{tag} of {_which(keys)}": tag for tag, keys in having.items() if keys}
    return _warning(list(found), found.values())


def _warning(what: Sequence[str], tags: Iterable[str]) -> EngineEvent | None:
    return ignored_tags(what, "; ".join(_INSTEAD[tag] for tag in tags)) if what else None


def _which(keys: Sequence[str]) -> str:
    return f"step {keys[0]}" if len(keys) == 1 else f"{len(keys)} steps ({listed(keys)})"
