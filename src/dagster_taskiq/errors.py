"""Every exception that leaves this package. Knows nothing about what raises them.

A message is one line that says what is wrong and what to do next, because the command line prints it as it is.
"""

from collections.abc import Sequence


class DagsterTaskiqError(Exception):
    """Base class of the errors of this package; the text is written for people."""


class SettingsError(DagsterTaskiqError):
    """A setting is missing, unknown, out of range, or contradicts another one."""


class QueryError(DagsterTaskiqError):
    """What is to say which runs are meant cannot be understood, or contradicts itself."""


class DriverMissing(DagsterTaskiqError):
    """The URL of Dagster's database asks for a driver that is not installed."""


class QueueError(DagsterTaskiqError):
    """An SQS request could not be carried out; the text names the queue, the cause and the next step."""


class QueueMissing(QueueError):
    """The queue does not exist (or not in this region, or not for this account)."""


class UnknownRoute(QueueMissing):
    """A run or step is to go to a route that has no queues."""

    def __init__(self, route: str, existing: Sequence[str]) -> None:
        """`existing`: the routes that there are, as far as that is known."""
        self.route = route
        self.existing = tuple(existing)
        super().__init__(
            f"route {route!r} does not exist; routes that exist: {', '.join(existing) or 'not known'};"
            f" create it with `dagster-taskiq queue create --route {route}`"
        )


class QueueUnreachable(QueueError):
    """The endpoint did not answer, refused, or throttled: it may work later."""


class AccessDenied(QueueError):
    """Credentials are missing, wrong, or lack a permission."""


class LeaseLost(QueueError):
    """The message is no longer ours: its receipt expired, or it was deleted, or another receiver has it."""


class MessageUnreadable(DagsterTaskiqError):
    """A message that does not belong on its queue. Never fatal: it is logged once, and stays until it expires."""


class MessageTooLarge(DagsterTaskiqError):
    """A payload over the SQS limit of 1,048,576 bytes."""


class PayloadUnavailable(DagsterTaskiqError):
    """A payload in S3 could not be written or read; the text names the object and the cause."""


class ChildStartFailed(DagsterTaskiqError):
    """The process in which Dagster should work could not be started."""


class StateError(DagsterTaskiqError):
    """The new value in `token.state` is not JSON, or too large; or it is not known whose state it would be.

    Raised by the assignment, or already by `token.state`. Nothing is stored.
    """


class CleanupFailed(DagsterTaskiqError):
    """Cleanup handlers have used up all their attempts. `reasons`: one line for each, with its last error.

    Raised by `clean_up_run`, and the error in the result of a taskiq task whose handlers failed.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("cleanup failed: " + "; ".join(self.reasons))


class RunNotFound(DagsterTaskiqError):
    """There is no run with that id in this Dagster instance."""


class TaskCancelled(DagsterTaskiqError):
    """The error in the result of a cancelled task. `reason` was given with the cancellation, or is None."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        super().__init__(reason)

    def __str__(self) -> str:
        return f"cancelled: {self.reason}" if self.reason else "cancelled"
