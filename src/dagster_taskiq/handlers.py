"""`on_cancel`: what is to be done when work was cancelled, said where the work is defined; and finding it again.

Knows functions, and Dagster's definitions by what they hold; neither runs nor processes.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

DEFAULT_TIMEOUT_S: Final = 30.0
MAX_TIMEOUT_S: Final = 3_600.0
_ATTRIBUTE: Final = "__dagster_taskiq_on_cancel__"
_Target = TypeVar("_Target")
_in_use = False


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


def on_cancel(
    handler: Callable[..., Any], *, retry_policy: RetryPolicyLike | None = None, timeout: float = DEFAULT_TIMEOUT_S
) -> Callable[[_Target], _Target]:
    """Have `handler` called when the work is cancelled, after it has stopped and before its run is CANCELED.

    For ops, assets, multi-assets, graphs and graph-backed assets, jobs, and taskiq tasks; above or below Dagster's own
    decorator. May be used several times: each handler has attempts of its own, and the errors of all are kept.

    The handler, a function or a coroutine function, is called with a `CleanupContext`; further parameters of it are
    resources of the job, by their names. It may be called more than once, so it has to bear that, and it runs in
    another process than the work, perhaps on another worker: what it needs to know is in `context.state`.

    `retry_policy`: when an attempt fails; default: that of the op. `timeout`: seconds for one attempt, up to an hour.
    When all attempts have failed the run is a FAILURE, "cleanup failed". Raises `ValueError` for what makes no sense.
    """
    if not callable(handler):
        raise ValueError(f"on_cancel needs a function, not {handler!r}")  # noqa: TRY004 - one error for all of it
    if not 0 < timeout <= MAX_TIMEOUT_S:
        raise ValueError(f"on_cancel: timeout must be more than 0 and at most {MAX_TIMEOUT_S:g} seconds, not {timeout}")

    def decorate(target: _Target) -> _Target:
        global _in_use
        _in_use = True
        if "dagster" in sys.modules:
            from dagster_taskiq.op_token import join_worker

            join_worker()  # in a process of Dagster's own this may be all that is heard of this package
        job, home = _unresolved(target), _home(target)
        known = job.handlers if job is not None else _own(home)
        base = str(getattr(handler, "__name__", type(handler).__name__))
        taken = [one.name for one in known]
        name = base if base not in taken else f"{base}-{1 + sum(one.startswith(base) for one in taken)}"
        handlers = (*known, Handler(handler, name, retry_policy, float(timeout)))
        if job is not None:
            return job.having(handlers)  # type: ignore[no-any-return]
        setattr(home, _ATTRIBUTE, handlers)
        return target

    return decorate


def in_use() -> bool:
    """Whether this process has seen a handler at all."""
    return _in_use


def handlers_of(target: object) -> tuple[Handler, ...]:
    """The handlers of a function or definition; of a job, with those of its whole graph."""
    found: dict[int, Handler] = {}
    for place in _places(target):
        for handler in _own(place):
            found.setdefault(id(handler), handler)
    metadata = getattr(target, "metadata", None)
    if isinstance(metadata, Mapping) and _ATTRIBUTE in metadata:
        found |= {id(handler): handler for handler in metadata[_ATTRIBUTE].instance or ()}
    return tuple(found.values())


def _places(target: object) -> Iterator[object]:
    """Where handlers may be kept."""
    place: object | None = _home(target)
    while place is not None:
        yield place
        if _own(place):
            break
        # A decorator of the user's between the function and us, or a copy of a job.
        place = getattr(place, "__wrapped__", None)
    graph = getattr(target, "graph", None)
    if graph is not None and graph is not target:
        yield from _places(graph)


def _own(place: object) -> tuple[Handler, ...]:
    own: tuple[Handler, ...] = getattr(place, "__dict__", {}).get(_ATTRIBUTE, ())
    return own


def _home(target: object) -> object:
    """What survives the copies that Dagster makes of a definition: the function it was made from, if there is one."""
    for inner in ("node_def", "compute_fn", "composition_fn", "decorated_fn", "parent_graph_def"):
        held = getattr(target, inner, None)
        if held is not None:
            return _home(held)
    if hasattr(target, "graph"):  # a job: of a copy the original
        while (original := getattr(target, "__wrapped__", None)) is not None:
            target = original
    return target


@dataclass(frozen=True, slots=True)
class _UnresolvedJob:
    """A job of assets that Dagster puts together later: its metadata are what survives that."""

    job: Any

    @property
    def handlers(self) -> tuple[Handler, ...]:
        return handlers_of(self.job)

    def having(self, handlers: tuple[Handler, ...]) -> Any:
        from dagster_taskiq import dagster_internals as core

        return core.with_object_in_metadata(self.job, _ATTRIBUTE, handlers)


def _unresolved(target: object) -> _UnresolvedJob | None:
    return _UnresolvedJob(target) if type(target).__name__ == "UnresolvedAssetJobDefinition" else None
