"""What becomes of a received message: one table. Knows neither SQS nor what the work was."""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from dagster_taskiq.cancellation.model import CancelKind


class Settlement(enum.Enum):
    """The three ways to be rid of a leased message."""

    DELETE = "delete"
    """The work is over; nobody shall receive it again."""
    HAND_BACK = "hand back"
    """Visible again (at once, or after a delay) for somebody else."""
    LEAVE = "leave"
    """No longer ours to decide; whatever the queue does with it is right."""


class Settled(NamedTuple):
    """What is to become of a message. `delay_s`: of a hand-back, until others can receive it."""

    settlement: Settlement
    delay_s: int = 0


AFTER_CANCEL: Final[Mapping[CancelKind, Settled]] = MappingProxyType(
    {
        CancelKind.REQUESTED: Settled(Settlement.DELETE),
        CancelKind.SHUTDOWN: Settled(Settlement.HAND_BACK),
        CancelKind.LEASE_LOST: Settled(Settlement.LEAVE),
    }
)
