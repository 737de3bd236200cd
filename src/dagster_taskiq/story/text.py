"""Durations and times in words."""

from datetime import UTC, datetime

from dagster_taskiq._text import duration, one_line

__all__ = ["clock", "date_and_clock", "duration", "one_line"]


def clock(at: float) -> str:
    """The time of day in UTC: "02:14:09"."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"


def date_and_clock(at: float) -> str:
    """ "2026-11-29 02:14:09 UTC"."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
