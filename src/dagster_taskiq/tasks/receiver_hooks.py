"""What whoever embeds a receiver adds to it: callables, and two numbers. Knows cancellations, not how they come."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from taskiq import TaskiqMessage

from dagster_taskiq.cancellation.model import Cancellation


@dataclass(frozen=True, slots=True)
class ReceiverHooks:
    """The defaults are right for a plain taskiq worker."""

    tasks_await_signal: bool = False
    """Whether the task functions look at `current_task().signal` by themselves, instead of being interrupted."""
    cancel_ttl_s: float = 120
    """A cancel message that is older, and still nobody's, is deleted."""
    is_over: Callable[[str], Awaitable[bool]] | None = None
    """Tells of a task id whether its work is known to be finished; lets cancels for nobody end early."""
    still_ours: Callable[[str], Awaitable[bool]] | None = None
    """Asked when a lease is lost: is the work nevertheless ours, so that it should go on?"""
    on_delivered: Callable[[Cancellation], None] | None = None
    """Called when a task that runs here is cancelled, by whatever channel; once."""
    describe: Callable[[TaskiqMessage], Mapping[str, str]] | None = None
    """What lines of the log about a task have in `extra`, beside its id."""
