"""What the tables of op kinds have in common: many runs on one platform, and what is seen of each when it is over."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
from dagster._core.definitions.reconstruct import ReconstructableRepository

from dagster_taskiq.storage.engine_events import Stage
from tests.support import op_kinds
from tests.support.platform import FINISHED, Platform
from tests.support.waiting import wait_until

_Case = TypeVar("_Case")
YES: Mapping[bool | None, str] = {True: "yes", False: "no", None: "-"}


def open_pool(platform: Platform) -> None:
    """Room for the steps of all runs."""
    platform.instance.event_log_storage.set_concurrency_slots(op_kinds.POOL, 500)


def in_pool(platform: Platform) -> set[str]:
    """The runs whose steps have slots of the pool, or wait for one."""
    info = platform.instance.event_log_storage.get_concurrency_info(op_kinds.POOL)
    return {slot.run_id for slot in info.claimed_slots} | {step.run_id for step in info.pending_steps}


def launch(
    platform: Platform, kinds_file: Path, jobs: Mapping[_Case, tuple[str, Mapping[str, str]]]
) -> dict[_Case, str]:
    """The ids of new runs, each with a file of its own for what it does. `jobs`: a job's name, and tags."""
    instance, runs = platform.instance, {}
    repository = ReconstructableRepository.for_file(str(kinds_file), "defs")
    for case, (name, tags) in jobs.items():
        job = repository.get_reconstructable_job(name)
        run = instance.create_run_for_job(
            job.get_definition(),
            tags={"marks": str(platform.home / f"marks-{os.urandom(6).hex()}"), **tags},
            job_code_origin=job.get_python_origin(),
        )
        instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        runs[case] = run.run_id
    return runs


def all_finished(platform: Platform, runs: Mapping[_Case, str], *, within: float) -> None:
    """Wait until they are, each for so many seconds at most."""
    for case, run_id in runs.items():
        wait_until(
            lambda run_id=run_id: platform.status(run_id) in FINISHED,  # type: ignore[misc]
            f"{case} is finished",
            within=within,
            seen=lambda run_id=run_id: (platform.marks(run_id), platform.story(run_id)),  # type: ignore[misc]
        )


def was_killed(platform: Platform, run_id: str) -> bool:
    """Whether its log says that a process had to be killed."""
    return Stage.KILLED in platform.stages(run_id) or bool(platform.step_notes(run_id, Stage.KILLED))


def is_gone(platform: Platform, run_id: str, marks: Iterable[Sequence[str]]) -> bool:
    """Whether no process of the run is left, nor of those that its marks name."""
    children = [int(mark[1]) for mark in marks if mark[0] == "child"]
    return not platform.processes(run_id) and not any(map(psutil.pid_exists, children))


def in_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of the table."""
    table = [tuple(columns), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
    table.insert(1, tuple("-" * width for width in widths))
    for row in table:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
