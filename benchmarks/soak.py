"""Does a worker stay as it was? Many short runs and steps on one worker, a fifth of them terminated.

    make soak                       # or: python -m benchmarks.soak 2000

Counts what the worker's process tree holds after each hundred runs: memory (PSS of worker and fork server, in MB),
open files, threads, zombies, children that are left. SQS is moto on loopback, the storage SQLite.
"""

import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields

import psutil
from dagster import DagsterRunStatus
from rich.console import Console
from rich.table import Table
from tests.acceptance.conftest import open_platform
from tests.support.moto import CREDENTIALS, moto_server
from tests.support.platform import FINISHED, STEP_JOBS, Platform
from tests.support.waiting import wait_until

AT_ONCE = 6
TERMINATED = 0.2
EVERY = 100
SETTLED_AFTER = 200
SETTINGS = {
    "wait_time_seconds": 1,
    "visibility_timeout_seconds": 30,
    "grace_seconds": 5,
    "max_concurrent_runs": AT_ONCE,
    "max_concurrent_steps": AT_ONCE,
}


@dataclass(frozen=True)
class Holding:
    """What the tree of one idle worker holds."""

    memory_mb: float
    files: int
    threads: int
    zombies: int
    processes: int


def holding(pid: int) -> Holding:
    """Of the worker and everything below it, while none of that is about to end."""
    worker = psutil.Process(pid)
    tree = [worker, *worker.children(recursive=True)]
    alive = [process for process in tree if process.status() != psutil.STATUS_ZOMBIE]
    return Holding(
        memory_mb=sum(process.memory_full_info().pss for process in alive) / 1e6,
        files=sum(process.num_fds() for process in alive),
        threads=sum(process.num_threads() for process in alive),
        zombies=len(tree) - len(alive),
        processes=len(alive),
    )


def at_rest(pid: int, fewest: int) -> Holding:
    """When the last children have gone: as few processes as at the beginning."""

    def below() -> list[psutil.Process]:
        return psutil.Process(pid).children(recursive=True)

    wait_until(lambda: 1 + len(below()) <= fewest, "its children are gone", seen=below)
    return holding(pid)


def work_off(platform: Platform, many: int, chance: random.Random) -> Counter[str]:
    """Launch so many runs, a few at a time; some are terminated at a random moment of their short life."""
    ended: Counter[str] = Counter()
    going: dict[str, float | None] = {}
    left = many
    while left or going:
        while left and len(going) < AT_ONCE:
            run_id = platform.launch("two_steps", seconds=0.05)
            going[run_id] = time.monotonic() + chance.uniform(0, 1) if chance.random() < TERMINATED else None
            left -= 1
        for run_id, terminate_at in list(going.items()):
            if terminate_at is not None and time.monotonic() > terminate_at:
                ended["asked to stop"] += bool(platform.launcher.terminate(run_id))
                going[run_id] = None
            status = platform.status(run_id)
            if status in FINISHED:
                ended[status.value] += 1
                del going[run_id]
        time.sleep(0.02)
    return ended


def grown(settled: list[Holding]) -> bool:
    """A zombie in the end; or what is counted was never again as low as it had been.

    A file more now and then is a connection of a pool.
    """
    half = len(settled) // 2
    earlier, later = settled[:half], settled[half:]
    return settled[-1].zombies > 0 or any(
        min(getattr(now, counted) for now in later)
        > max((getattr(now, counted) for now in earlier), default=sys.maxsize)
        for counted in ("files", "threads", "processes")
    )


def main() -> int:
    """Returns 1 if a run failed, or if something grew."""
    os.environ.update(CREDENTIALS)
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000
    chance = random.Random(7)  # noqa: S311 - no secret
    console = Console()
    seen: dict[int, Holding] = {}
    ended: Counter[str] = Counter()
    with (
        moto_server() as endpoint,
        open_platform(endpoint, source=SETTINGS) as platform,
    ):
        platform.jobs = STEP_JOBS
        with platform.worker("-n", "soak") as worker:
            fewest = holding(worker.pid).processes
            for done in range(EVERY, wanted + 1, EVERY):
                ended += work_off(platform, EVERY, chance)
                seen[done] = at_rest(worker.pid, fewest)
                console.print(f"{done:6} runs: {seen[done]}, {dict(ended)}")
    table = Table(
        "", f"after {SETTLED_AFTER}", "median", "at the end", title=f"{wanted} runs of three steps, one worker"
    )
    settled = {done: now for done, now in seen.items() if done >= SETTLED_AFTER}
    for field in fields(Holding):
        values = [getattr(now, field.name) for now in settled.values()]
        table.add_row(field.name, *(f"{value:.0f}" for value in (values[0], statistics.median(values), values[-1])))
    console.print(table)
    return int(grown(list(settled.values())) or ended[DagsterRunStatus.FAILURE.value] > 0)


if __name__ == "__main__":
    sys.exit(main())
