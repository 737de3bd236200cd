"""What becomes of a received message: one table. Knows neither SQS nor what the work was."""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from dagster_taskiq.cancellation.model import CancelKind


class Settlement(enum.Enum):
    """The three ways to be rid of a leased message."""

    DELETE = "delete"
    """The work is over; nobody shall receive it again."""
    HAND_BACK = "hand back"
    """Visible again (at once, or after a delay) for somebody else."""
    LEAVE = "leave"
    """No longer ours to decide; whatever the queue does with it is right."""


AFTER_CANCEL: Final[Mapping[CancelKind, Settlement]] = MappingProxyType(
    {
        CancelKind.REQUESTED: Settlement.DELETE,
        CancelKind.SHUTDOWN: Settlement.HAND_BACK,
        CancelKind.LEASE_LOST: Settlement.LEAVE,
    }
)
