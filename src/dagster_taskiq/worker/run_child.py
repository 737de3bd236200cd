"""One child of a worker, from its start to the proof that its tree is gone: for runs, steps and cleanups alike.

Knows the worker's settings and `supervise`; not what a child does, and not what its end means.
"""

import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dagster_taskiq._shield import shielded
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.dagster_compat.api import serialize_value
from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.process.child_handle import ChildSpec
from dagster_taskiq.process.step_timers import StepObserver
from dagster_taskiq.process.supervise import ChildEnd, Observer, supervise
from dagster_taskiq.worker.context import WorkerContext

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ChildWork:
    """What one child is started for. `target` and `argument` as in `ChildSpec`; the instance is added to the latter."""

    target: str
    argument: Mapping[str, Any]
    task_id: str
    grace_s: Callable[[Cancellation | None], float]
    """Seconds between interrupt and kill; asked with None for the case that the worker disappears."""
    exit_patience_s: float
    """Seconds that threads have to end when the work is over."""
    is_one_step: bool = False


@dataclass(frozen=True, slots=True)
class NotStarted:
    """There was no process: the work may be tried again, after `delay_s`, by whichever worker."""

    why: str
    delay_s: int


async def run_child(
    context: WorkerContext,
    work: ChildWork,
    signal: CancelSignal,
    observer: Observer,
    steps: StepObserver | None = None,
) -> ChildEnd | NotStarted | None:
    """Start the child and see it through. None: it was cancelled, for good, before there was a process.

    Must run inside `see_through`, or another `shielded`. `steps`: see `supervise`.
    """
    if signal.is_set:
        return _not_even_started(signal)
    spec = ChildSpec(
        target=work.target,
        argument={
            **work.argument,
            "instance_ref": serialize_value(context.instance.get_ref()),
            "log_level": logger.getEffectiveLevel(),
        },
        mark=work.task_id,
        # Without its worker a child must be gone before anybody else can begin with the same work.
        grace_s=min(work.grace_s(None), context.settings.dead_after_s),
        exit_patience_s=work.exit_patience_s,
        cancelled_exit_patience_s=context.settings.cancelled_exit_patience_seconds,
        hung_after_s=context.settings.hung_after_s,
        is_one_step=work.is_one_step,
    )
    try:
        end = await supervise(context.processes, spec, signal, observer, work.grace_s, steps)
    except ChildStartFailed as error:
        # Not the fault of the work: another worker, or this one later, may have better luck.
        logger.error("%s", error, extra={"task_id": work.task_id})  # noqa: TRY400 - the text is our own and complete
        return NotStarted(str(error), context.settings.visibility_timeout_seconds)
    return _not_even_started(signal) if end is None else end


def _not_even_started(signal: CancelSignal) -> NotStarted | None:
    return NotStarted("the worker shuts down", 0) if signal.is_shutdown else None


async def see_through(body: Coroutine[Any, Any, _T], signal: CancelSignal, *, name: str) -> _T:
    """Await the body to its end. A `Task.cancel()` does not tear it: it counts as a shutdown of the worker."""
    shutdown = Cancellation(CancelKind.SHUTDOWN, cause="the worker's task was cancelled")
    return await shielded(body, name=name, on_cancel=lambda: signal.set(shutdown))
