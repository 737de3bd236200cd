"""The table of op kinds by executors, each with a limit that it exceeds: all runs at once, and what is seen of each."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dagster import DagsterEventType

from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG, TIMEOUT_TAG
from tests.support import late_kinds
from tests.support.kinds_table import YES, all_finished, in_markdown, in_pool, is_gone, launch, open_pool, was_killed
from tests.support.platform import Platform

KINDS_FILE = Path(late_kinds.__file__)
_ENDS = {DagsterEventType.STEP_SUCCESS, DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY}
_BESIDE = ("z_beside", "z_beside_asset")
COLUMNS = (
    *("kind", "executor", "finally", "handler", "state", "tidied", "killed", "tree gone", "step", "reason in", "run"),
    *("others ran", "again", "pool free"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a kind of op under an executor."""

    kind: str
    executor: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.executor}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of it."""

    finally_ran: int = 1
    handler_ran: int = 1
    state: str = "kept"
    tidied: int = 0
    killed: bool = False
    """Whether the log says that a process had to be killed."""
    tree_gone: bool = True
    step: str = "FAILURE"
    """How its attempts have ended."""
    reason_in: str = "step"
    """Where the reason is read: in the failure of the step, or of the run."""
    status: str = "FAILURE"
    others_ran: bool = True
    again: str = ""
    """What the next attempt, if there was one, has found: the state, and whether it was cancelled."""
    pool_free: bool = True


@dataclass
class Table:
    """The runs of all cases."""

    platform: Platform
    cases: tuple[Case, ...]
    grace: Mapping[str, float]
    runs: dict[Case, str] = field(default_factory=dict)
    seen: dict[Case, Seen] = field(default_factory=dict)

    def fill(self) -> None:
        """See them all through."""
        platform = self.platform
        open_pool(platform)
        many = ("--max-runs", "100", "--max-steps", "100")
        with platform.worker("-n", "a", *many), platform.worker("-n", "b", *many):
            self.runs = launch(platform, KINDS_FILE, {case: self._job(case) for case in self.cases})
            all_finished(platform, self.runs, within=240)
            self.seen = {case: self._look(case) for case in self.cases}

    def _job(self, case: Case) -> tuple[str, Mapping[str, str]]:
        tags = {GRACE_SECONDS_TAG: str(self.grace[case.kind])} if case.kind in self.grace else {}
        return late_kinds.job_name(case.kind, case.executor), tags

    def _look(self, case: Case) -> Seen:
        run_id, platform = self.runs[case], self.platform
        marks = [mark.split() for mark in platform.marks(run_id)]
        counts = Counter(mark[0] for mark in marks)
        events = [entry.dagster_event for entry in platform.instance.all_logs(run_id) if entry.dagster_event]
        ends = [event for event in events if event.event_type in _ENDS and event.step_key not in _BESIDE]
        reasons = [
            event.event_specific_data.error.to_string()  # type: ignore[union-attr]
            for event in ends
            if event.event_type is not DagsterEventType.STEP_SUCCESS
        ]
        failure = next((event.message for event in events if event.event_type is DagsterEventType.RUN_FAILURE), None)
        limit = late_kinds.limit_of(case.kind)[TIMEOUT_TAG]
        said = f"step timed out: longer than its limit of {limit.removesuffix('.0')} s ({TIMEOUT_TAG})"
        return Seen(
            finally_ran=counts["finally"],
            handler_ran=counts["undone"],
            state=" ".join(sorted({mark[1] for mark in marks if mark[0] == "undone"})),
            tidied=counts["tidied"],
            killed=was_killed(platform, run_id),
            tree_gone=is_gone(platform, run_id, marks),
            step=" ".join(event.event_type_value.removeprefix("STEP_") for event in ends),
            reason_in="step" if any(said in text for text in reasons) else "run" if said in str(failure) else "nowhere",
            status=platform.status(run_id).value,
            others_ran=counts["beside"] == 1,
            again=" ".join(" ".join(mark[1:3]) for mark in marks if mark[0] == "again"),
            pool_free=run_id not in in_pool(platform),
        )

    def lines(self) -> Iterator[str]:
        """As a page in Markdown."""
        rows = [
            (
                *(case.kind, case.executor, str(seen.finally_ran), str(seen.handler_ran), seen.state),
                *(str(seen.tidied), YES[seen.killed], YES[seen.tree_gone], seen.step, seen.reason_in, seen.status),
                *(YES[seen.others_ran], seen.again, YES[seen.pool_free]),
            )
            for case, seen in self.seen.items()
        ]
        yield from in_markdown(COLUMNS, rows)
