"""The answer of one check of `doctor`. Knows nothing of what is checked."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer of one check. `repair` is a command or a change that mends it; empty when there is nothing to mend."""

    check: str
    verdict: Verdict
    reason: str
    repair: str = ""


def ok(check: str, reason: str) -> Finding:
    """Nothing to be done."""
    return Finding(check, "ok", reason)


def line(error: object) -> str:
    """The text of an error as one line."""
    return " ".join(str(error).split())[:400]
