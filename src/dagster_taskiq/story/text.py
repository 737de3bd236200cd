"""Durations and times in words."""

from datetime import UTC, datetime


def duration(seconds: float) -> str:
    """`0.168` as "168 ms", `75` as "1 min 15 s", `7400` as "2 h 3 min"."""
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    for unit, below, length, small in (("d", "h", 86_400, 3_600), ("h", "min", 3_600, 60), ("min", "s", 60, 1)):
        if whole >= length:
            rest = whole % length // small
            return f"{whole // length} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def clock(at: float) -> str:
    """The time of day in UTC: "02:14:09"."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"


def date_and_clock(at: float) -> str:
    """ "2026-11-29 02:14:09 UTC"."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def one_line(text: str, at_most: int = 400) -> str:
    """Without line breaks, control characters and superfluous spaces, and not longer than that."""
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return line if len(line) <= at_most else line[: at_most - 1] + "…"
