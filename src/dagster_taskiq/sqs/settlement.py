"""What happens to a received message: one table. Knows neither SQS nor what the work was."""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from dagster_taskiq.cancellation.model import CancelKind


class Settlement(enum.Enum):
    """The three ways to settle a leased message."""

    DELETE = "delete"
    """The work has ended; the message is never received again."""
    HAND_BACK = "hand back"
    """Visible again, at once or after a delay, for another worker."""
    LEAVE = "leave"
    """The message is no longer ours; the queue decides."""


class Settled(NamedTuple):
    """What has to happen to a message. `delay_s`: seconds until others can receive a message that is handed back."""

    settlement: Settlement
    delay_s: int = 0


AFTER_CANCEL: Final[Mapping[CancelKind, Settled]] = MappingProxyType(
    {
        CancelKind.REQUESTED: Settled(Settlement.DELETE),
        CancelKind.DEADLINE: Settled(Settlement.DELETE),
        CancelKind.SHUTDOWN: Settled(Settlement.HAND_BACK),
        CancelKind.LEASE_LOST: Settled(Settlement.LEAVE),
    }
)
