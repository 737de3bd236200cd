"""How long a run may take, and what is said of one that has taken longer. Knows tags and settings; not who ends it."""

import math
from dataclasses import dataclass
from typing import Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.run_monitoring import max_runtime
from dagster_taskiq.dagster_compat.storage import remove_run_tags
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.storage.status_repair import repair_late_canceling
from dagster_taskiq.storage.tags import TIMED_OUT_TAG, TIMEOUT_TAG, add_own_tags

TIMED_OUT: Final = "Run timed out"
"""So begins what Dagster's event CANCELING of such a run says."""
_LONGEST_S: Final = 315_360_000.0
"""Ten years."""


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """So many seconds, and where that is set."""

    seconds: float
    where: str

    def exceeded(self, what: str) -> str:
        """`run timed out: longer than its limit of 5 s (dagster-taskiq/timeout_seconds)`. `what`: run, step."""
        return f"{what} timed out: longer than its limit of {in_seconds(self.seconds)} ({self.where})"


def in_seconds(seconds: float) -> str:
    """`5 s`, `0.5 s`: as it was written, not rounded as a duration."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + " s"


def seconds_from_tag(value: str) -> float:
    """A number of seconds from a tag. Raises `SettingsError`."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if seconds > _LONGEST_S:
        raise SettingsError(f"must be ten years at most ({_LONGEST_S:.0f} seconds), not {value[:50]!r}")
    if not seconds >= 0.001:
        raise SettingsError(f"must be a number of seconds greater than 0, not {value[:50]!r}")
    return seconds


def limit_of_run(instance: DagsterInstance, run: DagsterRun) -> tuple[TimeLimit | None, str | None]:
    """The shorter one of our limit and Dagster's; and why a tag of the run is ignored, if it is. Without a query."""
    limits, ignored = [], None
    if TIMEOUT_TAG in run.tags:
        try:
            limits.append(TimeLimit(seconds_from_tag(run.tags[TIMEOUT_TAG]), TIMEOUT_TAG))
        except SettingsError as error:
            ignored = f"{TIMEOUT_TAG} {error}"
    if (of_dagster := max_runtime(instance, run)) is not None and of_dagster[0] <= _LONGEST_S:
        limits.append(TimeLimit(*of_dagster))
    return min(limits, key=lambda limit: limit.seconds, default=None), ignored


def mark_timed_out(instance: DagsterInstance, run_id: str, why: str) -> bool:
    """Say in the database that the run is being stopped because of its limit, for whoever has to finish it.

    It is CANCELING then, so that no further step begins, and a tag says that it ends as a FAILURE. False: it is over,
    or somebody else is stopping it. Blocks on the database.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.status in {*FINISHED_STATUSES, DagsterRunStatus.CANCELING}:
        return False
    add_own_tags(instance, run, {TIMED_OUT_TAG: why})
    instance.report_run_canceling(run, f"{why[:1].upper()}{why[1:]}")
    late = repair_late_canceling(instance, run_id) is not None
    if late:
        remove_run_tags(instance, run_id, {TIMED_OUT_TAG})
    return not late
