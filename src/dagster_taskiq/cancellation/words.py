"""What is said of a cancellation to people: who has asked for it, and why. Knows only what a cancellation is."""

from typing import Final

from dagster_taskiq.cancellation.model import CancelKind, Cancellation

UNKNOWN_AUTHOR: Final = "Dagster UI or API"
"""Who has asked, where Dagster does not say who it was."""
OURSELVES: Final = "dagster-taskiq"
"""Who has asked, where it was a rule that somebody had set, and no person."""
THE_RUN: Final = "the run of the step"
"""Who has asked for the end of a step, where it is not known who has asked for that of the run."""
_KINDS: Final = {
    CancelKind.REQUESTED: "cancellation",
    CancelKind.DEADLINE: "timeout",
    CancelKind.SHUTDOWN: "shutdown",
    CancelKind.LEASE_LOST: "loss of the lease",
}


def by_whom(requested_by: str | None, reason: str | None) -> str:
    """`by ada: wrong input file`, as the end of a sentence, in one line; empty when nothing is known."""
    who = {None: "", "": "", UNKNOWN_AUTHOR: "from Dagster's UI or API"}.get(requested_by, f"by {requested_by}")
    return " ".join(": ".join(part for part in (who, reason or "") if part).split())


def asked(text: str, requested_by: str | None, reason: str | None) -> str:
    """The text of an event, and then as a sentence of its own by whom it was asked for, and why."""
    whom = by_whom(requested_by, reason)
    return f"{text} {whom[0].upper()}{whom[1:]}" if whom else text


def why_stopped(cancellation: Cancellation | None, what: str) -> str:
    """`stopped: run terminated by ada: wrong input file`, in one line.

    `what` was done when a person asked for it. None: it is not known what has interrupted the work.
    """
    if cancellation is None:
        return "stopped: it was interrupted"
    if cancellation.kind is CancelKind.DEADLINE:
        return f"stopped: {cancellation.reason or cancellation.cause or 'it timed out'}"
    if cancellation.requested_by == THE_RUN:
        return "stopped: its run was stopped"
    whom = by_whom(cancellation.requested_by, cancellation.reason)
    if cancellation.kind is CancelKind.REQUESTED and (whom or not cancellation.cause):
        return f"stopped: {what}{f' {whom}' if cancellation.requested_by else whom and f': {whom}'}"
    return f"stopped: {cancellation.cause or what_stops(cancellation)}"


def what_stops(cancellation: Cancellation) -> str:
    """`cancellation`, `timeout`, `shutdown` or `loss of the lease`."""
    return _KINDS[cancellation.kind]
