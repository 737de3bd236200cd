"""What a cancellation is: its kind, reason, author and way. Knows neither queues nor processes nor Dagster."""

import enum
from dataclasses import dataclass, field
from time import time


class CancelKind(enum.IntEnum):
    """Why work is cancelled; the larger value is the stronger kind.

    A weaker kind never overwrites a stronger one: a shutdown does not revive what a person stopped.
    """

    SHUTDOWN = 1
    """The worker stops; the work is not over and may go on elsewhere."""
    REQUESTED = 2
    """Somebody asked for it: the work is over."""
    LEASE_LOST = 3
    """The message is no longer ours: somebody else may be at work; nothing is ours to decide."""


class CancelChannel(enum.StrEnum):
    """How this worker learnt of a cancellation."""

    CANCEL_QUEUE = "cancel queue"
    STATUS_WATCH = "status watch"
    WORKER = "worker"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Cancellation:
    """One request to stop one piece of work, as the child learns of it before any signal.

    Times are seconds since the epoch. `attempt` counts the deliveries of the cancel message, this one included.
    `deadline`: when the process of the work is killed, as far as its own process knows.
    """

    kind: CancelKind
    reason: str | None = None
    requested_by: str | None = None
    requested_at: float | None = None
    channel: CancelChannel = CancelChannel.WORKER
    attempt: int = 1
    received_at: float = field(default_factory=time, compare=False)
    deadline: float | None = None


def stronger(current: Cancellation | None, new: Cancellation) -> Cancellation:
    """The one of the two that decides: the stronger kind, and of equals the first."""
    return new if current is None or new.kind > current.kind else current
