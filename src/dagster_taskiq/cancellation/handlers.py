"""What is to be done when work was cancelled: the handlers that `on_cancel` has declared, and finding them again.

Knows functions, and Dagster's definitions by what they hold; neither runs nor processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

ATTRIBUTE: Final = "__dagster_taskiq_on_cancel__"
_OBSERVED: Final = "observe_fn"
"""What Dagster's function that observes a source asset calls the user's function."""


class RetryPolicyLike(Protocol):
    """As far as needed, a `dagster.RetryPolicy`."""

    @property
    def max_retries(self) -> int:
        """After the first try."""

    def calculate_delay(self, attempt_num: int) -> float:
        """Seconds before that retry; 1 for the first."""


@dataclass(frozen=True, slots=True)
class Handler:
    """One cleanup handler, as it was declared."""

    call: Callable[..., Any]
    name: str
    """For people; unique among those that `handlers_of` has found together."""
    retry_policy: RetryPolicyLike | None
    timeout_s: float
    place: str = ""
    """What it was declared on, and as which of the handlers there: with the name what identifies it in the log."""

    @property
    def identity(self) -> str:
        """The same in every process that has loaded the same code. Another handler never has it."""
        return f"{self.place} {getattr(self.call, '__name__', type(self.call).__name__)}"


def handlers_of(target: object) -> tuple[Handler, ...]:
    """The handlers of a function or definition, the innermost first; of a job, with those of its whole graph."""
    found: dict[int, Handler] = {}
    for place in _places(target):
        for handler in own_handlers(place):
            found.setdefault(id(handler), handler)
    return tuple(_with_names_of_their_own(found.values()))


def _with_names_of_their_own(handlers: Iterable[Handler]) -> Iterator[Handler]:
    taken: set[str] = set()
    for handler in handlers:
        name, number = handler.name, 1
        while name in taken:
            number += 1
            name = f"{handler.name}-{number}"
        taken.add(name)
        yield handler if name == handler.name else replace(handler, name=name)


def own_handlers(place: object) -> tuple[Handler, ...]:
    """Those that are kept at this very place."""
    own: tuple[Handler, ...] = getattr(place, "__dict__", {}).get(ATTRIBUTE, ())
    metadata = getattr(place, "metadata", None)
    if isinstance(metadata, Mapping) and ATTRIBUTE in metadata:  # a job of assets
        own = (*(metadata[ATTRIBUTE].instance or ()), *own)
    return own


def home_of(target: object) -> object:
    """Where a function or definition keeps what was declared on it: of an asset the op or the graph that it is."""
    held = _held(target, "node_def")
    return target if held is None else held


def _places(target: object) -> Iterator[object]:
    """Where handlers may be kept, the innermost first."""
    for inner in ("graph", "node_def", "compute_fn", "composition_fn", "parent_graph_def", "decorated_fn"):
        held = _held(target, inner)
        if held is not None and held is not target:
            yield from _places(held)
    # A decorator of the user's between the function and us; of a copy of a job the original.
    for inside in (_held(target, "__wrapped__"), _observed_by(target)):
        if inside is not None:
            yield from _places(inside)
    yield target


def _held(target: object, name: str) -> object:
    """An attribute that is really there: a mock makes one of every name, and each of them has all of them again."""
    there = name in getattr(target, "__dict__", {}) or hasattr(type(target), name)
    return getattr(target, name, None) if there else None


def _observed_by(function: object) -> object:
    """The function of an observable source asset: Dagster makes an op of another function, which calls it."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells or _OBSERVED not in code.co_freevars:
        return None
    return cells[code.co_freevars.index(_OBSERVED)].cell_contents
