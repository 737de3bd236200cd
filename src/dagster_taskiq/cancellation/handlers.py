"""What is to be done when work was cancelled: the handlers that `on_cancel` has declared, and finding them again.

Knows functions, and Dagster's definitions by what they hold; neither runs nor processes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

ATTRIBUTE: Final = "__dagster_taskiq_on_cancel__"


class RetryPolicyLike(Protocol):
    """As far as needed, a `dagster.RetryPolicy`."""

    @property
    def max_retries(self) -> int:
        """After the first try."""

    def calculate_delay(self, attempt_num: int) -> float:
        """Seconds before that retry; 1 for the first."""


@dataclass(frozen=True, slots=True)
class Handler:
    """One cleanup handler. `name` is unique among those of one piece of work."""

    call: Callable[..., Any]
    name: str
    retry_policy: RetryPolicyLike | None
    timeout_s: float


def handlers_of(target: object) -> tuple[Handler, ...]:
    """The handlers of a function or definition; of a job, with those of its whole graph."""
    found: dict[int, Handler] = {}
    for place in _places(target):
        for handler in own_handlers(place):
            found.setdefault(id(handler), handler)
    metadata = getattr(target, "metadata", None)
    if isinstance(metadata, Mapping) and ATTRIBUTE in metadata:
        found |= {id(handler): handler for handler in metadata[ATTRIBUTE].instance or ()}
    return tuple(found.values())


def _places(target: object) -> Iterator[object]:
    """Where handlers may be kept."""
    place: object | None = home_of(target)
    while place is not None:
        yield place
        if own_handlers(place):
            break
        # A decorator of the user's between the function and us, or a copy of a job.
        place = getattr(place, "__wrapped__", None)
    graph = getattr(target, "graph", None)
    if graph is not None and graph is not target:
        yield from _places(graph)


def own_handlers(place: object) -> tuple[Handler, ...]:
    """Those that are kept at this very place."""
    own: tuple[Handler, ...] = getattr(place, "__dict__", {}).get(ATTRIBUTE, ())
    return own


def home_of(target: object) -> object:
    """What survives the copies that Dagster makes of a definition: the function it was made from, if there is one."""
    for inner in ("node_def", "compute_fn", "composition_fn", "decorated_fn", "parent_graph_def"):
        held = getattr(target, inner, None)
        if held is not None:
            return home_of(held)
    if hasattr(target, "graph"):  # a job: of a copy the original
        while (original := getattr(target, "__wrapped__", None)) is not None:
            target = original
    return target
