"""The table of op kinds by ways of being cancelled: all runs at once, on one platform, and what is seen of each."""

import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG
from tests.support import op_kinds
from tests.support.kinds_table import YES, all_finished, in_markdown, in_pool, is_gone, launch, open_pool, was_killed
from tests.support.monitoring import dagster_daemon
from tests.support.platform import Platform
from tests.support.waiting import wait_until

KINDS_FILE = Path(op_kinds.__file__)
TERMINATE, STATUS, WORKER_KILLED = "terminate", "status only", "worker killed"
WAYS = (TERMINATE, STATUS, WORKER_KILLED)
NO_LIMIT = {"DAGSTER_RUN_STATUS_SENSOR_PROCESS_LIMIT": "1000"}
COLUMNS = (
    *("kind", "executor", "way", "finally", "handler", "state", "tidied", "killed", "tree gone", "status", "sensor"),
    "pool free",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a kind of op under an executor, and how it is cancelled."""

    kind: str
    executor: str
    way: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.executor}, {self.way}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of it."""

    finally_ran: int = 1
    handler_ran: int = 1
    state: str = "kept"
    killed: bool | None = False
    """Whether the log says that the op's process had to be killed; None: there was no worker to say so."""
    tree_gone: bool = True
    status: str = "CANCELED"
    sensor_told: int = 1
    pool_free: bool = True
    tidied: int = 0
    """Programs and scopes that end in a way of their own."""


@dataclass
class Table:
    """The runs of all cases, cancelled in a batch for each way."""

    platform: Platform
    cases: tuple[Case, ...]
    short_grace: Mapping[str, float]
    runs: dict[Case, str] = field(default_factory=dict)
    seen: dict[Case, Seen] = field(default_factory=dict)

    def fill(self) -> None:
        """See them all through."""
        platform = self.platform
        open_pool(platform)
        deadly = [case for case in self.cases if case.way == WORKER_KILLED]
        others = [case for case in self.cases if case.way != WORKER_KILLED]
        with dagster_daemon(platform, "-f", str(KINDS_FILE), environment=NO_LIMIT) as log:
            with platform.worker("-n", "dies", "--runs-only", "--max-runs", str(len(deadly))) as dies:
                self._launch(deadly)
                self._all_started(deadly)
                # It sees only what ends from its first look on.
                wait_until(lambda: self._ticks() > 0, "the sensor has looked", within=120, seen=log.read_text)
                dies.process.send_signal(signal.SIGKILL)
                dies.process.wait(20)
                self._cancel(deadly)
            many = ("--max-runs", "100", "--max-steps", "20")
            with platform.worker("-n", "a", *many), platform.worker("-n", "b", *many):
                self._launch(others)
                self._all_started(others)
                self._pool_is_taken(others)
                self._cancel(others)
                all_finished(platform, self.runs, within=120)
                wait_until(
                    lambda: set(self.runs.values()) <= self._told().keys(),
                    "the sensor was told",
                    within=120,
                    seen=log.read_text,
                )
                looked = self._ticks()
                wait_until(
                    lambda: self._ticks() > looked + 1, "the sensor has looked again", within=60, seen=log.read_text
                )
                told = self._told()
                self.seen = {case: self._look(case, told) for case in self.cases}

    def _launch(self, cases: Iterable[Case]) -> None:
        self.runs |= launch(self.platform, KINDS_FILE, {case: self._job(case) for case in cases})

    def _job(self, case: Case) -> tuple[str, Mapping[str, str]]:
        tags = dict(op_kinds.ASSETS[case.kind][1]) if case.kind in op_kinds.ASSETS else {}
        if case.kind in self.short_grace:
            tags[GRACE_SECONDS_TAG] = str(self.short_grace[case.kind])
        return op_kinds.job_name(case.kind, case.executor), tags

    def _all_started(self, cases: Iterable[Case]) -> None:
        for case in cases:
            self.platform.wait_started(self.runs[case], self.steps(case))

    @staticmethod
    def steps(case: Case) -> int:
        """How many steps are at work at the same time."""
        return 2 if case.kind == "dynamic" and case.executor != "in-process" else 1

    def _pool_is_taken(self, cases: Iterable[Case]) -> None:
        """Or else it says nothing that it is free in the end."""
        without = {self.runs[case] for case in cases if case.kind == "observable_source"}
        assert {self.runs[case] for case in cases} - without <= in_pool(self.platform)

    def _cancel(self, cases: Iterable[Case]) -> None:
        platform = self.platform
        for case in cases:
            if case.way == STATUS:
                platform.instance.report_run_canceling(platform.run(self.runs[case]))
            else:
                assert platform.launcher.terminate(self.runs[case])

    def _look(self, case: Case, told: Counter[str]) -> Seen:
        run_id, platform = self.runs[case], self.platform
        marks = [mark.split() for mark in platform.marks(run_id)]
        counts = Counter(mark[0] for mark in marks)
        states = {mark[1] for mark in marks if mark[0] == "undone"}
        steps = self.steps(case)
        return Seen(
            finally_ran=counts["finally"] // steps if counts["finally"] % steps == 0 else -1,
            handler_ran=counts["undone"] // steps if counts["undone"] % steps == 0 else -1,
            state=" ".join(states),
            killed=was_killed(platform, run_id) if case.way != WORKER_KILLED else None,
            tree_gone=is_gone(platform, run_id, marks),
            status=platform.status(run_id).value,
            sensor_told=told[run_id],
            pool_free=run_id not in in_pool(platform),
            tidied=counts["tidied"],
        )

    def _told(self) -> Counter[str]:
        path = self.platform.home / "canceled"
        return Counter(path.read_text().split()) if path.exists() else Counter()

    def _ticks(self) -> int:
        """How often the sensor has looked to the end."""
        storage = self.platform.instance.schedule_storage
        assert storage is not None
        states = [state for state in self.platform.instance.all_instigator_state() if state.name == "counts_canceled"]
        return sum(
            tick.is_completed
            for state in states
            for tick in storage.get_ticks(state.instigator_origin_id, state.selector_id)
        )

    def lines(self) -> Iterator[str]:
        """As a page in Markdown."""
        rows = [
            (
                *(case.kind, case.executor, case.way, str(seen.finally_ran), str(seen.handler_ran)),
                *(seen.state, str(seen.tidied)),
                *(YES[seen.killed], YES[seen.tree_gone], seen.status, str(seen.sensor_told), YES[seen.pool_free]),
            )
            for case, seen in self.seen.items()
        ]
        yield from in_markdown(COLUMNS, rows)
