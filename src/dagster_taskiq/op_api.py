"""What the author of an op, or of a taskiq task, writes: `cancellation_token()` and `@on_cancel`.

Imports Dagster only where it is in use.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
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

DEFAULT_TIMEOUT_S: Final = 30.0
MAX_TIMEOUT_S: Final = 3_600.0
_Target = TypeVar("_Target")


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
        if "dagster" in sys.modules:
            from dagster_taskiq.child.child_process import join_worker

            join_worker()  # in a process of Dagster's own this may be the only use of this package
        job, home = _unresolved(target), home_of(target)
        known = job.handlers if job is not None else own_handlers(home)
        base = str(getattr(handler, "__name__", type(handler).__name__))
        taken = [one.name for one in known]
        name = base if base not in taken else f"{base}-{1 + sum(one.startswith(base) for one in taken)}"
        handlers = (*known, Handler(handler, name, retry_policy, float(timeout)))
        if job is not None:
            return job.having(handlers)  # type: ignore[no-any-return]
        setattr(home, ATTRIBUTE, handlers)
        return target

    return decorate


@dataclass(frozen=True, slots=True)
class _UnresolvedJob:
    """A job of assets that Dagster puts together later: its metadata are what survives that."""

    job: Any

    @property
    def handlers(self) -> tuple[Handler, ...]:
        return handlers_of(self.job)

    def having(self, handlers: tuple[Handler, ...]) -> Any:
        from dagster_taskiq.dagster_compat.definitions import with_object_in_metadata

        return with_object_in_metadata(self.job, ATTRIBUTE, handlers)


def _unresolved(target: object) -> _UnresolvedJob | None:
    return _UnresolvedJob(target) if type(target).__name__ == "UnresolvedAssetJobDefinition" else None
