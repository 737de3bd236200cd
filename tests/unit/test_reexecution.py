"""A run goes on: which steps run, and which do not. With Dagster's own SQLite storage, code server and executor.

The jobs are in `tests/support/unfinished_jobs.py`; they run in this process.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.execution.api import execute_run
from tests.support import unfinished_jobs
from tests.unit.cleanup.test_by_hand import LAUNCHER

from dagster_taskiq.dagster_compat.execution import KnownExecutionState
from dagster_taskiq.dagster_compat.interrupts import DagsterExecutionInterruptedError
from dagster_taskiq.dagster_compat.reexecution import CodeSource, LoadedJob, create_run, find_job, loaded_job
from dagster_taskiq.dagster_compat.unfinished_steps import steps_left
from dagster_taskiq.errors import DagsterTaskiqError, RunNotFound
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.reexecution import launch, plan, reexecute_run
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats

pytestmark = pytest.mark.slow

JOBS = Path(unfinished_jobs.__file__)
STATUS = DagsterRunStatus


@dataclass
class Shop:
    """An instance, the code server of the jobs, and a folder in which their steps leave marks."""

    instance: DagsterInstance
    folder: Path
    loaded: LoadedJob

    def execute(self, run: DagsterRun, stop: str) -> DagsterRun:
        """Run it in this process, and interrupt these steps. Returns it as it is then."""
        (self.folder / "stop").write_text(stop)
        recon = ReconstructableRepository.for_file(str(JOBS), "defs").get_reconstructable_job(run.job_name)
        if run.asset_selection:
            recon = recon.get_subset(asset_selection=run.asset_selection)
        with suppress(DagsterExecutionInterruptedError):
            execute_run(recon, run, self.instance, raise_on_error=False)
        return self.again(run)

    def again(self, run: DagsterRun) -> DagsterRun:
        read = self.instance.get_run_by_id(run.run_id)
        assert read is not None
        return read

    def first(
        self, job: str, stop: str, *, assets: Sequence[str] = (), tags: Mapping[str, str] | None = None
    ) -> DagsterRun:
        """A run that was launched, and interrupted at these steps."""
        repository = ReconstructableRepository.for_file(str(JOBS), "defs")
        recon = repository.get_reconstructable_job(job)
        keys = frozenset(map(AssetKey, assets)) or None
        if keys:
            recon = recon.get_subset(asset_selection=keys)
        run = self.instance.create_run_for_job(
            recon.get_definition(),
            tags={unfinished_jobs.FOLDER_TAG: str(self.folder), **(tags or {})},
            asset_selection=keys,
            job_code_origin=recon.get_python_origin(),
            remote_job_origin=self.of(job).job.get_remote_origin(),
        )
        return self.execute(run, stop)

    def of(self, job: str) -> LoadedJob:
        (repository,) = self.loaded.location.get_repositories().values()
        return replace(self.loaded, job=repository.get_full_job(job))

    def go_on(self, parent: DagsterRun, stop: str = "") -> DagsterRun:
        left = steps_left(self.instance, parent)
        run = create_run(self.instance, parent, self.of(parent.job_name), left, parent.tags, {})
        return self.execute(run, stop)

    def marks(self) -> Counter[str]:
        return Counter((self.folder / "marks").read_text().split())


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder, home = tmp_path_factory.mktemp("marks"), tmp_path_factory.mktemp("home")
    with DagsterInstance.local_temp(str(home)) as instance:
        run = instance.create_run_for_job(unfinished_jobs.straight)
        with loaded_job(instance, run, CodeSource(python_file=(str(JOBS),))) as loaded:
            yield Shop(instance, folder, loaded)


@pytest.fixture
def shop(opened: Shop) -> Shop:
    for file in opened.folder.iterdir():
        file.unlink()
    return opened


@pytest.mark.parametrize(
    ("stop", "finished", "to_run"),
    [
        ("extract", [], ["extract", "transform", "load"]),
        ("transform", ["extract"], ["transform", "load"]),
        ("load", ["extract", "transform"], ["load"]),
    ],
)
def test_what_was_interrupted_runs_again_and_what_has_finished_does_not(
    shop: Shop, stop: str, finished: list[str], to_run: list[str]
) -> None:
    parent = shop.first("straight", stop)
    assert parent.status is STATUS.FAILURE, "interrupted, and nobody had asked for it"
    left = steps_left(shop.instance, parent)
    assert (list(left.finished), list(left.to_run)) == (finished, to_run)
    assert shop.go_on(parent).status is STATUS.SUCCESS
    assert shop.marks() == {**dict.fromkeys(finished, 1), **dict.fromkeys(to_run, 1), stop: 2}


MAPPED = [f"{op}[k{number}]" for op in ("transform", "load") for number in range(4)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transform[k2]", ""),
        ("transform[k1]", "load[k3]"),
        ("load[k1]", "report"),
        ("fan_out", "transform[k2]"),
    ],
)
def test_mapped_steps_that_had_not_begun_are_left_to_do(shop: Shop, first: str, second: str) -> None:
    """Dagster's own "from failure" leaves them out, and the report is made of a part. Also a second time."""
    run = shop.first("fanned", first)
    stopped = [first]
    if second:
        run = shop.go_on(run, second)
        assert run.status is STATUS.FAILURE, "so far"
        stopped.append(second)
    run = shop.go_on(run)
    assert run.status is STATUS.SUCCESS
    assert (shop.folder / "report").read_text() == "20 30 40 50"
    assert shop.marks() == Counter(["extract", "fan_out", *MAPPED, "report"]) + Counter(stopped)


def test_dagsters_own_answer_leaves_them_out(shop: Shop) -> None:
    """When this fails, Dagster has mended it: then docs/run-reexecute.md is to say so."""
    parent = shop.first("fanned", "transform[k2]")
    steps, _ = KnownExecutionState.build_resume_retry_reexecution(shop.instance, parent)
    assert sorted(steps) == ["load[k2]", "report", "transform[k2]"]


def test_the_outputs_of_a_failed_attempt_are_not_mapped(shop: Shop) -> None:
    parent = shop.first("tried", "load[try1_0]")
    left = steps_left(shop.instance, parent)
    assert left.finished == ("fan_out_at_the_second_try",)
    assert sorted(left.to_run) == ["load[try1_0]", "load[try1_1]", "report"]
    assert shop.go_on(parent).status is STATUS.SUCCESS
    assert (shop.folder / "report").read_text() == "0 10"


def test_a_step_that_was_skipped_stays_so(shop: Shop) -> None:
    """Nothing came out for it, and that has not changed."""
    parent = shop.first("sorted_out", "load_odd")
    left = steps_left(shop.instance, parent)
    assert sorted(left.finished) == ["extract", "load", "sort", "transform"]
    assert shop.go_on(parent).status is STATUS.SUCCESS
    assert shop.marks() == {"extract": 1, "sort": 1, "load_odd": 2}


def test_a_multi_asset_that_was_interrupted_runs_again_with_partition_and_selection(shop: Shop) -> None:
    assets = ["raw", "clean", "summary"]
    parent = shop.first("__ASSET_JOB", "raw_and_clean", assets=assets, tags={"dagster/partition": "b", "team": "blue"})
    assert steps_left(shop.instance, parent).to_run == ("raw_and_clean", "summary")
    loaded, left = find_job(shop.loaded.request, parent), steps_left(shop.instance, parent)
    run = create_run(shop.instance, parent, loaded, left, parent.tags, {"team": "red"})
    assert run.asset_selection == parent.asset_selection
    assert run.tags["dagster/partition"] == "b"
    assert run.tags["team"] == "red"
    assert (run.parent_run_id, run.root_run_id) == (parent.run_id, parent.run_id)
    assert shop.execute(run, "").status is STATUS.SUCCESS
    assert shop.marks() == {"raw_and_clean": 2, "summary": 1}, "and not what was not selected"


def test_outputs_in_memory_are_gone(shop: Shop) -> None:
    parent = shop.first("in_memory", "transform")
    with pytest.raises(DagsterTaskiqError, match=r"in memory \(mem_io_manager\).*--all-steps"):
        shop.go_on(parent)
    everything = create_run(shop.instance, parent, shop.of("in_memory"), None, parent.tags, {})
    assert everything.step_keys_to_execute is None
    assert shop.execute(everything, "").status is STATUS.SUCCESS


def test_a_step_that_is_gone_from_the_code(shop: Shop) -> None:
    parent = shop.first("straight", "transform")
    with pytest.raises(DagsterTaskiqError, match=r"its code or configuration has changed since.*transform"):
        create_run(shop.instance, parent, shop.of("tried"), steps_left(shop.instance, parent), {}, {})


def test_what_is_not_over_or_has_nothing_left_is_refused(shop: Shop) -> None:
    instance = shop.instance
    done = shop.first("straight", "")
    refused = {
        done.run_id: "has succeeded, nothing of it is left to do; to run all its steps again: --all-steps",
        "00000000-0000-0000-0000-000000000000": "there is no run",
    }
    for status, then in ((STATUS.STARTED, "run cancel"), (STATUS.CANCELING, "is being cancelled"), (STATUS.QUEUED, "")):
        origin = shop.of("straight").job.get_remote_origin()
        waits = instance.create_run_for_job(unfinished_jobs.straight, status=status, remote_job_origin=origin)
        refused[waits.run_id] = f"is {status.value}; .*{then}"
    late = shop.first("straight", "")
    instance.report_run_canceled(shop.again(late))
    refused[late.run_id] = "every step of run .* has finished"
    for run_id, why in refused.items():
        with pytest.raises((DagsterTaskiqError, RunNotFound), match=why):
            plan(instance, run_id)
    assert plan(instance, done.run_id, all_steps=True).left is None


def test_code_that_is_not_there(shop: Shop) -> None:
    run = shop.first("straight", "transform")._replace(job_name="renamed")  # a NamedTuple's own way
    with pytest.raises(DagsterTaskiqError, match="has no job renamed now; it was renamed or removed since run"):
        find_job(shop.loaded.request, run)
    nowhere = run._replace(remote_job_origin=None)
    with (
        pytest.raises(DagsterTaskiqError, match=r"location no\.such\.module cannot be loaded: ModuleNotFoundError: "),
        loaded_job(shop.instance, run, CodeSource(module_name=("no.such.module",))),
    ):
        pass
    with (
        pytest.raises(DagsterTaskiqError, match=r"does not say what code location it is of; give .* -w workspace.yaml"),
        loaded_job(shop.instance, nowhere, CodeSource()),
    ):
        pass


def test_one_that_a_worker_is_still_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was marked as CANCELED by force; its steps may still be at work."""
    monkeypatch.setattr("dagster_taskiq.reexecution._LET_GO_WITHIN_S", 0.3)
    with DagsterInstance.local_temp(str(tmp_path), overrides={"run_launcher": LAUNCHER}) as instance:
        launcher = instance.run_launcher
        assert isinstance(launcher, TaskiqRunLauncher)
        run = instance.create_run_for_job(unfinished_jobs.straight)
        worker = Heartbeats.of_runs(instance, launcher.settings)
        claims = Claims(instance, worker)
        assert claims.take(run, "other-1", "task-1", "there", None)
        worker.beat("other-1")
        instance.report_run_canceled(run)
        with pytest.raises(DagsterTaskiqError, match="is CANCELED, but worker other-1 is still stopping it"):
            reexecute_run(run.run_id, instance=instance)
        claims.forget(run.run_id)
        assert plan(instance, run.run_id).left is not None


def test_no_second_run_does_the_same_work_side_by_side(shop: Shop) -> None:
    parent = shop.first("straight", "transform")
    planned = plan(shop.instance, parent.run_id)  # by somebody who takes his time
    left = steps_left(shop.instance, parent)
    quicker = create_run(shop.instance, parent, shop.of("straight"), left, parent.tags, {})
    before = shop.instance.get_runs_count()
    with pytest.raises(DagsterTaskiqError, match=f"run {quicker.run_id} goes on from run {parent.run_id} already"):
        plan(shop.instance, parent.run_id)
    with pytest.raises(DagsterTaskiqError, match=f"cancel it: dagster-taskiq run cancel {quicker.run_id}"):
        launch(shop.instance, planned, {}, CodeSource(python_file=(str(JOBS),)))
    assert shop.instance.get_runs_count() == before, "nothing is left of the second one"
    assert shop.execute(quicker, "load").status is STATUS.FAILURE
    assert plan(shop.instance, parent.run_id).left == left, "it may go on once more"
