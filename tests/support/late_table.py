"""The table of op kinds by executors, each with a limit that it exceeds: all runs at once, and what is seen of each."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from dagster import DagsterEventType
from dagster._core.definitions.reconstruct import ReconstructableRepository

from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG, TIMEOUT_TAG
from tests.support import late_kinds, op_kinds
from tests.support.platform import FINISHED, Platform
from tests.support.waiting import wait_until

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
        platform.instance.event_log_storage.set_concurrency_slots(op_kinds.POOL, 500)
        many = ("--max-runs", "100", "--max-steps", "100")
        with platform.worker("-n", "a", *many), platform.worker("-n", "b", *many):
            self._launch()
            for case, run_id in self.runs.items():
                wait_until(
                    lambda run_id=run_id: platform.status(run_id) in FINISHED,  # type: ignore[misc]
                    f"{case} is finished",
                    within=240,
                    seen=lambda run_id=run_id: (platform.marks(run_id), platform.story(run_id)),  # type: ignore[misc]
                )
            self.seen = {case: self._look(case) for case in self.cases}

    def _launch(self) -> None:
        instance = self.platform.instance
        repository = ReconstructableRepository.for_file(str(KINDS_FILE), "defs")
        for case in self.cases:
            job = repository.get_reconstructable_job(late_kinds.job_name(case.kind, case.executor))
            tags = {"marks": str(self.platform.home / f"marks-{os.urandom(6).hex()}")}
            if case.kind in self.grace:
                tags[GRACE_SECONDS_TAG] = str(self.grace[case.kind])
            run = instance.create_run_for_job(job.get_definition(), tags=tags, job_code_origin=job.get_python_origin())
            self.runs[case] = run.run_id
            instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]

    def _look(self, case: Case) -> Seen:
        run_id, platform = self.runs[case], self.platform
        marks = [mark.split() for mark in platform.marks(run_id)]
        counts = Counter(mark[0] for mark in marks)
        children = [int(mark[1]) for mark in marks if mark[0] == "child"]
        left = platform.processes(run_id) + [pid for pid in children if psutil.pid_exists(pid)]
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
        info = platform.instance.event_log_storage.get_concurrency_info(op_kinds.POOL)
        taken = {slot.run_id for slot in info.claimed_slots} | {step.run_id for step in info.pending_steps}
        return Seen(
            finally_ran=counts["finally"],
            handler_ran=counts["undone"],
            state=" ".join(sorted({mark[1] for mark in marks if mark[0] == "undone"})),
            tidied=counts["tidied"],
            killed=Stage.KILLED in platform.stages(run_id) or bool(platform.step_notes(run_id, Stage.KILLED)),
            tree_gone=not left,
            step=" ".join(event.event_type_value.removeprefix("STEP_") for event in ends),
            reason_in="step" if any(said in text for text in reasons) else "run" if said in str(failure) else "nowhere",
            status=platform.status(run_id).value,
            others_ran=counts["beside"] == 1,
            again=" ".join(" ".join(mark[1:3]) for mark in marks if mark[0] == "again"),
            pool_free=run_id not in taken,
        )

    def lines(self) -> Iterator[str]:
        """As a page in Markdown."""
        yes = {True: "yes", False: "no"}
        rows: list[tuple[str, ...]] = [COLUMNS]
        for case, seen in self.seen.items():
            rows.append(
                (
                    *(case.kind, case.executor, str(seen.finally_ran), str(seen.handler_ran), seen.state),
                    *(str(seen.tidied), yes[seen.killed], yes[seen.tree_gone], seen.step, seen.reason_in, seen.status),
                    *(yes[seen.others_ran], seen.again, yes[seen.pool_free]),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        rows.insert(1, tuple("-" * width for width in widths))
        for row in rows:
            yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
