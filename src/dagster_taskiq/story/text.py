"""Durations and times in words."""

from datetime import UTC, datetime
from typing import Final

from dagster_taskiq._text import duration, one_line

__all__ = ["BEGINS_AGAIN", "RESUMES", "clock", "date_and_clock", "duration", "one_line"]

RESUMES: Final = (
    "run_monitoring: {enabled: true, max_resume_run_attempts: 3} in dagster.yaml, or, for runs of taskiq_executor,"
    " interrupted_steps: retry in config_source"
)
"""What has runs go on whose worker was stopped, or has died."""
BEGINS_AGAIN: Final = (
    "interrupted_steps: retry in config_source, or the tag dagster-taskiq/interrupted_steps: retry on an op that may be"
    " begun twice"
)
"""What has steps begin again whose worker was stopped, or has died."""


def clock(at: float) -> str:
    """The time of day in UTC: "02:14:09"."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"


def date_and_clock(at: float) -> str:
    """ "2026-11-29 02:14:09 UTC"."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
