"""`run reexecute`: a run that was terminated in the middle goes on, and no finished step runs again."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from dagster import DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.storage.tags import ROOT_RUN_ID_TAG
from tests.support import unfinished_jobs
from tests.support.platform import Platform
from tests.support.waiting import wait_until

from dagster_taskiq.dagster_compat.api import PARENT_RUN_ID_TAG
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, TASK_ID_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

JOBS = Path(unfinished_jobs.__file__)
STATUS = DagsterRunStatus


def launch(platform: Platform, job: str, folder: Path, stays: str) -> DagsterRun:
    """A run whose step `stays` waits for somebody to terminate it."""
    (folder / "stay").write_text(stays)
    recon = ReconstructableJob.for_file(str(JOBS), job)
    run = platform.instance.create_run_for_job(
        recon.get_definition(),
        tags={unfinished_jobs.FOLDER_TAG: str(folder), "team": "blue"},
        job_code_origin=recon.get_python_origin(),
    )
    platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    return run


def marks(folder: Path) -> Counter[str]:
    file = folder / "marks"
    return Counter(file.read_text().split() if file.exists() else ())


def launch_as_the_daemon_does(platform: Platform, parent_id: str) -> DagsterRun:
    """The run that goes on from that one, from Dagster's queue."""

    def queued() -> Sequence[DagsterRun]:
        return platform.instance.get_runs(RunsFilter(tags={PARENT_RUN_ID_TAG: parent_id}, statuses=[STATUS.QUEUED]))

    wait_until(lambda: bool(queued()), "the new run is queued", within=60)
    (run,) = queued()
    platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    return run


def terminated(platform: Platform, job: str, folder: Path, at: str) -> str:
    """The id of a run that was stopped in this step."""
    run_id = launch(platform, job, folder, at).run_id
    wait_until(lambda: bool(marks(folder)[at]), "it is there", within=90, seen=lambda: platform.story(run_id))
    refused = platform.command("run", "reexecute", run_id)
    assert refused.returncode == 1
    assert f"run {run_id} is STARTED; cancel it, and wait for its end: dagster-taskiq run cancel" in refused.stderr
    assert platform.command("run", "cancel", run_id, "--reason", "wrong vintage").returncode == 0
    assert platform.finished(run_id) is STATUS.CANCELED
    (folder / "stay").unlink()
    return run_id


def test_a_terminated_run_goes_on(working_steps: Platform, tmp_path: Path) -> None:
    platform, stays = replace(working_steps, jobs=JOBS), "transform[k1]"
    finished = ["extract", "fan_out", "transform[k0]"]
    left = [stays, "transform[k2]", "transform[k3]", "report"]
    parent_id = terminated(platform, "fanned_steps", tmp_path, stays)
    asked = json.loads(platform.command("run", "reexecute", parent_id[:8], "--dry-run", "--json").stdout)
    assert (sorted(asked["finished"]), sorted(asked["to_run"])) == (finished, sorted(left))
    assert asked["run_id"] is None
    with ThreadPoolExecutor(1) as pool:
        arguments = ("run", "reexecute", parent_id[:8], "-f", str(JOBS), "--wait", "--tag", "ticket=OPS-7", "--json")
        waits = pool.submit(platform.command, *arguments)
        launch_as_the_daemon_does(platform, parent_id)
        ended = waits.result()
    assert ended.returncode == 0, ended
    run = platform.run(json.loads(ended.stdout)["run_id"])
    assert run.status is STATUS.SUCCESS
    assert marks(tmp_path) == Counter([*finished, *left, stays])
    assert (run.parent_run_id, run.root_run_id) == (parent_id, parent_id)
    assert (run.tags["team"], run.tags["ticket"]) == ("blue", "OPS-7")
    assert run.tags.keys() & {CANCEL_REASON_TAG, CANCELLED_BY_TAG} == set()
    assert run.tags[TASK_ID_TAG] != platform.task_id(parent_id)
    assert parent_id in platform.wait_for_stage(run.run_id, Stage.REEXECUTED)
    again = platform.command("run", "reexecute", run.run_id)
    assert again.returncode == 1
    assert "has succeeded, nothing of it is left to do" in again.stderr
    everything = platform.command("run", "reexecute", run.run_id, "--all-steps")
    assert everything.returncode == 0, f"its code is where the run says: {everything}"
    first, second = everything.stdout.splitlines()
    assert re.fullmatch(rf"{run.run_id}: goes on as run [0-9a-f-]{{36}}, it is QUEUED", first)
    assert second == "  all steps run"


def test_one_that_was_killed_before_it_had_submitted_its_run_bars_no_later_one(working_steps: Platform) -> None:
    platform = replace(working_steps, jobs=JOBS)
    recon = ReconstructableJob.for_file(str(JOBS), "straight")
    definition, origin = recon.get_definition(), recon.get_python_origin()
    parent = platform.instance.create_run_for_job(definition, job_code_origin=origin)
    platform.instance.report_run_canceled(parent)
    left = platform.instance.create_run_for_job(
        definition,
        job_code_origin=origin,
        parent_run_id=parent.run_id,
        root_run_id=parent.run_id,
        tags={PARENT_RUN_ID_TAG: parent.run_id, ROOT_RUN_ID_TAG: parent.run_id},
    )
    again = ("run", "reexecute", parent.run_id, "--all-steps", "-f", str(JOBS))
    refused = platform.command(*again)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"run {left.run_id} goes on from run {parent.run_id} already, and was never submitted; if" in refused.stderr
    command = refused.stderr.strip().rpartition(": dagster-taskiq ")[2]
    ended = platform.command(*shlex.split(command))
    assert ended.returncode == 0, ended
    assert platform.status(left.run_id) is STATUS.CANCELED
    done = platform.command(*again)
    assert done.returncode == 0, done
    assert ", it is QUEUED\n" in done.stdout


@pytest.mark.long
def test_under_the_executor_that_is_dagsters_default(working_steps: Platform, tmp_path: Path) -> None:
    platform = replace(working_steps, jobs=JOBS)
    parent_id = terminated(platform, "straight_processes", tmp_path, "transform")
    workspace = tmp_path / "workspace.yaml"
    workspace.write_text(f"load_from: [{{python_file: {JOBS}}}]")
    done = platform.command("run", "reexecute", parent_id, "-w", str(workspace))
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[1:] == [
        "  1 step finished, and does not run again",
        "  2 steps to run: transform, load",
    ]
    run = launch_as_the_daemon_does(platform, parent_id)
    assert platform.finished(run.run_id, within=150) is STATUS.SUCCESS
    assert marks(tmp_path) == {"extract": 1, "transform": 2, "load": 1}
