"""The worker's log about one run or one step: a line when it begins, a line when it ends, and no other.

Knows the wording; not how the work is done. A fleet has many steps, so the beginning of a step is DEBUG.
"""

import logging
from time import monotonic
from typing import Final

from dagster import DagsterRun

from dagster_taskiq.storage.workers import describe_assets

logger = logging.getLogger(__name__)

FAILURE: Final = "FAILURE"
HANDED_BACK: Final = "handed back"


class WorkLog:
    """Made when the work begins, which is logged."""

    def __init__(
        self,
        run: DagsterRun,
        worker_id: str,
        *,
        step_key: str | None = None,
        why: str = "",
        again: bool = False,
    ) -> None:
        """`again`: the run is resumed, for the reason `why`."""
        self._began = monotonic()
        self._what = "run" if step_key is None else "step"
        self._about: dict[str, str | float] = {"job": run.job_name, "run_id": run.run_id, "worker": worker_id}
        if assets := describe_assets(run):
            self._about["assets"] = assets
        if step_key is not None:
            self._about["step_key"] = step_key
        facts: dict[str, str | float] = {"reason": why} if again else {}
        level = logging.INFO if step_key is None else logging.DEBUG
        logger.log(level, "%s %s", self._what, "resumed" if again else "started", extra=self._about | facts)

    def ended(self, outcome: str, reason: str | None = None) -> None:
        """`outcome`: the final status, or what became of the work here. `reason`: one line, if there is one to give."""
        facts: dict[str, str | float] = {"outcome": outcome, "seconds": round(monotonic() - self._began, 3)}
        if reason:
            facts["reason"] = " ".join(reason.split())
        level = logging.WARNING if outcome == FAILURE else logging.INFO
        logger.log(level, "%s ended", self._what, extra=self._about | facts)
