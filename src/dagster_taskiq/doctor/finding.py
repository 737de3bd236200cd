"""The result of one check of `doctor`. Knows nothing about what is checked."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "unknown", "warning", "error"]
"""`unknown`: it could not be checked here, so nothing is said about it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `repair` is a command or a change that fixes it; empty when nothing is wrong."""

    check: str
    verdict: Verdict
    reason: str
    repair: str = ""


def ok(check: str, reason: str) -> Finding:
    """A finding that all is well."""
    return Finding(check, "ok", reason)


def unknown(check: str, reason: str, repair: str) -> Finding:
    """A finding that something could not be checked; `repair`: how it can be."""
    return Finding(check, "unknown", reason, repair)


def line(error: object) -> str:
    """The text of an error as one line."""
    return " ".join(str(error).split())[:400]
