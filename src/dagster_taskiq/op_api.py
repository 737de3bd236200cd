"""What the author of an op, or of a taskiq task, writes: `cancellation_token()` and `@on_cancel`.

Imports Dagster only where it is in use.
"""

import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

from dagster_taskiq.cancellation.current import current_token
from dagster_taskiq.cancellation.handlers import (
    ATTRIBUTE,
    Handler,
    RetryPolicyLike,
    handlers_of,
    home_of,
    own_handlers,
)
from dagster_taskiq.cancellation.token import CancellationToken, never
from dagster_taskiq.child.control_channel import invitation

DEFAULT_TIMEOUT_S: Final = 30.0
MAX_TIMEOUT_S: Final = 3_600.0
_FOR_WHAT: Final = "it is for functions, ops, assets, asset checks, graphs, jobs and taskiq tasks"
_Target = TypeVar("_Target")


def _join_worker() -> None:
    """In a process of Dagster's own, this may be the only use of this package: and the steps begin after it."""
    if "dagster" in sys.modules and invitation() is not None:
        from dagster_taskiq.child.child_process import join_worker

        join_worker()


_join_worker()


def cancellation_token() -> CancellationToken:
    """The token of the work that calls this: an op, or a taskiq task (`TaskiqDepends(cancellation_token)`, too).

    In any other place, under any other executor and in tests, a token that is never cancelled and whose state is not
    kept: the same code runs unchanged. Call it once and keep it; what it costs is in the call. For tests of what a
    cancellation does: `fake_token`.
    """
    token = current_token()
    if token is None and "dagster" in sys.modules:
        # It may be an op, in a process that Dagster has started and where nothing of this package has run so far.
        from dagster_taskiq.child.child_process import token_of_op

        token = token_of_op()
    return token or never()


def on_cancel(
    handler: Callable[..., Any], *, retry_policy: RetryPolicyLike | None = None, timeout: float = DEFAULT_TIMEOUT_S
) -> Callable[[_Target], _Target]:
    """Have `handler` called when the work is cancelled, after it has stopped and before its run is CANCELED.

    For ops, assets, multi-assets, asset checks, graphs and graph-backed assets, jobs, and taskiq tasks; above or below
    Dagster's own decorator, below taskiq's. Of two definitions that are made of one function it is for the one that it
    stands on. May be used several times: each handler has attempts of its own, and the errors of all are kept.

    The handler, a function or a coroutine function, is called with a `CleanupContext`; further parameters of it are
    resources of the job, by their names. It may be called more than once, so it has to bear that, and it runs in
    another process than the work, perhaps on another worker: what it needs to know is in `context.state`.

    `retry_policy`: when an attempt fails; default: that of the op. `timeout`: seconds for one attempt, up to an hour.
    When all attempts have failed the run is a FAILURE, "cleanup failed". Raises `ValueError` for what makes no sense,
    and where the handler could never run: on a sensor, a resource, an external asset.
    """
    if not callable(handler):
        raise ValueError(f"on_cancel needs a function, not {handler!r}")  # noqa: TRY004 - one error for all of it
    if not 0 < timeout <= MAX_TIMEOUT_S:
        raise ValueError(f"on_cancel: timeout must be more than 0 and at most {MAX_TIMEOUT_S:g} seconds, not {timeout}")

    def decorate(target: _Target) -> _Target:
        _join_worker()
        if "dagster" in sys.modules:
            from dagster_taskiq.dagster_compat.definitions import let_copies_keep

            let_copies_keep(ATTRIBUTE)
        _refuse_what_never_runs(target)
        home = home_of(target)
        name = str(getattr(handler, "__name__", type(handler).__name__))
        place = f"{_described(home)} #{len(handlers_of(target)) + 1}"
        handlers = (*own_handlers(home), Handler(handler, name, retry_policy, float(timeout), place))
        if type(target).__name__ == "UnresolvedAssetJobDefinition":
            # Dagster puts it together later: its metadata are what survives that.
            from dagster_taskiq.dagster_compat.definitions import with_object_in_metadata

            return with_object_in_metadata(target, ATTRIBUTE, handlers)  # type: ignore[no-any-return]
        setattr(home, ATTRIBUTE, handlers)
        return target

    return decorate


def _described(home: object) -> str:
    """What a handler was declared on, the same in every process."""
    if (name := getattr(home, "name", None)) is not None:
        return f"{type(home).__name__} {name}"
    return f"{getattr(home, '__module__', '')}.{getattr(home, '__qualname__', type(home).__name__)}"


def _refuse_what_never_runs(target: object) -> None:
    """Raise `ValueError` for what is never executed by one of our workers, or hands its function to others."""
    why: str | None = None
    if isinstance(target, type):
        why = f"the class {target.__name__} is never run; {_FOR_WHAT}"
    elif any(kind.__module__.startswith("taskiq.") for kind in type(target).__mro__):
        why = f"write it below the decorator that makes a task of {getattr(target, 'task_name', 'the function')}"
    elif type(target).__module__.startswith(("dagster.", "dagster_shared.")):
        from dagster_taskiq.dagster_compat.definitions import why_it_never_runs

        why = why_it_never_runs(target)
    elif not callable(target):
        why = f"{target!r} is never run; {_FOR_WHAT}"
    if why is not None:
        raise ValueError(f"on_cancel: {why}")
