"""How Dagster interrupts code in this process: what it wants done with a signal at this moment, and its coroutines.

Dagster swaps signal handlers at every border between its code and a user's: one that only notes the interrupt, one
that raises it. Here each of them stays what Dagster wants now, behind one handler of ours.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.execution.plan import compute
from dagster._core.execution.plan.active import ActiveExecution
from dagster._utils import interrupts
from dagster._utils.interrupts import (
    capture_interrupts,
    check_captured_interrupt,
    pop_captured_interrupt,
    raise_interrupts_as,
)

__all__ = [
    "DagsterExecutionInterruptedError",
    "capture_interrupts",
    "check_captured_interrupt",
    "interrupt_here",
    "raise_interrupts_as",
    "raise_where_wanted",
    "route_interrupts",
    "run_coroutines_with",
]

_INTERRUPT: Final = signal.SIGINT
"""Dagster keeps its handler there, and copies it to SIGTERM."""
_replace_signal: Final = interrupts._replace_interrupt_signal  # noqa: SLF001 - the one place
_wait_for_a_step: Final = ActiveExecution.sleep_til_ready
_through: Callable[[Callable[[], object]], object] = lambda wanted: wanted()  # noqa: E731
_at_border: Callable[[], object] = lambda: None  # noqa: E731


class _Routed:
    """A handler as Dagster wants it, behind ours."""

    def __init__(self, wanted: Callable[[int, Any], object]) -> None:
        self.wanted = wanted

    def __call__(self, signo: int, frame: Any) -> None:
        _through(lambda: self.wanted(signo, frame))


def route_interrupts(
    through: Callable[[Callable[[], object]], object], at_border: Callable[[], object] = lambda: None
) -> None:
    """From now on each SIGTERM and SIGINT of this process calls `through`, in the signal handler.

    It is given what Dagster wants done at that moment: to note the interrupt, or to raise it. Main thread only.
    `at_border` is called when Dagster wants something else from now on, and may raise an interrupt.
    """
    global _through, _at_border
    _through, _at_border = through, at_border
    interrupts._replace_interrupt_signal = _replace  # type: ignore[assignment]  # noqa: SLF001
    ActiveExecution.sleep_til_ready = _wait_interruptibly  # type: ignore[assignment]
    present = signal.getsignal(_INTERRUPT)
    if callable(present) and not isinstance(present, _Routed):
        _replace_signal(_Routed(present))


def _replace(new: Any) -> None:
    """Put a handler where Dagster wants it. An interrupt that was noted before comes to the new one, as a signal."""
    before = signal.getsignal(_INTERRUPT)
    if not callable(new) or isinstance(new, _Routed):
        _replace_signal(new)
        return
    _replace_signal(routed := _Routed(new))
    try:
        if pop_captured_interrupt():
            routed(_INTERRUPT, None)
        else:
            _at_border()
    except BaseException:
        _replace_signal(before)  # Dagster does so only when this has returned
        raise


def _wait_interruptibly(active: ActiveExecution) -> None:
    """For the next attempt of a step, or for a slot of a pool, when no step is at work in this process.

    Dagster only notes an interrupt there, and goes on to wait. Between two steps nothing can be torn.
    """
    with raise_interrupts_as(DagsterExecutionInterruptedError):
        _wait_for_a_step(active)


def interrupt_here() -> None:
    """Do what a signal would do at this moment, also where the user's code has a handler of its own. Main thread only.

    Raises what Dagster raises, if it does.
    """
    handler = signal.getsignal(_INTERRUPT)
    if not isinstance(handler, _Routed):
        raise DagsterExecutionInterruptedError
    handler(_INTERRUPT, None)


def raise_where_wanted() -> None:
    """Do what a signal would do at this moment, if that is to raise something; what Dagster would note is forgotten.

    Main thread only.
    """
    handler = signal.getsignal(_INTERRUPT)
    if not isinstance(handler, _Routed):
        raise DagsterExecutionInterruptedError
    noted = check_captured_interrupt()
    handler.wanted(_INTERRUPT, None)
    if not noted:
        pop_captured_interrupt()


def run_coroutines_with(run: Callable[[asyncio.AbstractEventLoop, Any], Iterator[Any]]) -> None:
    """Have `run` run an op that is an asynchronous generator, as each op is that is a coroutine function.

    It is given Dagster's event loop, and yields the outputs.
    """
    compute.gen_from_async_gen = lambda context, outputs: run(context.event_loop, outputs)  # type: ignore[assignment]
