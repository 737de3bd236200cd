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
    DEADLINE = 2
    """It has taken longer than it may: it has failed."""
    REQUESTED = 3
    """Somebody asked for it: the work is over."""
    LEASE_LOST = 4
    """The message is no longer ours: somebody else may be at work; nothing is ours to decide."""

    def __str__(self) -> str:
        """Its name, as people log it: `DEADLINE`."""
        return self.name

    def __format__(self, spec: str) -> str:
        """As `str`."""
        return format(self.name, spec)

    @property
    def ends_the_work(self) -> bool:
        """Whether nobody goes on with the work afterwards: its cleanup handlers are due."""
        return self in {CancelKind.DEADLINE, CancelKind.REQUESTED}


class CancelChannel(enum.StrEnum):
    """How this worker learnt of a cancellation."""

    CANCEL_QUEUE = "cancel queue"
    STATUS_WATCH = "status watch"
    WORKER = "worker"
    LEASE = "lease"


class CancelOutcome(enum.Enum):
    """What came of somebody's request to cancel a run, in words."""

    ASKED = "asked to stop"
    MARKED = "the cancel message could not be sent"
    """The run's status has to carry the cancellation alone."""
    WITHDRAWN = "stopped before a worker had it"
    NOTHING = "nothing to stop"
    NOT_OURS = "nothing to stop: no worker of this launcher can have it"
    SWITCHED_OFF = "not stopped: cancellation is switched off (enable_cancellation)"

    @property
    def stops(self) -> bool:
        """Whether the run is being stopped, or is stopped."""
        return self in {CancelOutcome.ASKED, CancelOutcome.MARKED, CancelOutcome.WITHDRAWN}


@dataclass(frozen=True, slots=True)
class Cancellation:
    """One request to stop one piece of work, as the child learns of it before any signal.

    Times are seconds since the epoch. `attempt` counts the deliveries of the cancel message, this one included.
    `deadline`: when the process of the work is killed, as far as its own process knows.
    `reason`: what a person said, or None; of a DEADLINE which limit it is, in our words. Code of the user's sees it.
    `cause`: why, in our words, for logs alone.
    """

    kind: CancelKind
    reason: str | None = None
    requested_by: str | None = None
    requested_at: float | None = None
    channel: CancelChannel = CancelChannel.WORKER
    attempt: int = 1
    received_at: float = field(default_factory=time, compare=False)
    deadline: float | None = None
    cause: str | None = None
    status_follows: bool = False
    """Whether whoever has asked also marks the run as CANCELING: then that is in the database, or will be soon."""


def stronger(current: Cancellation | None, new: Cancellation) -> Cancellation:
    """The one of the two that decides: the stronger kind, and of equals the first."""
    return new if current is None or new.kind > current.kind else current
