"""Whatever a job does, its steps go as they would go in the process of their run."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dagster import AssetKey, DagsterEventType, DagsterRun, DagsterRunStatus, build_input_context
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.api import create_execution_plan
from dagster._core.execution.plan.state import KnownExecutionState
from dagster._core.storage.fs_io_manager import PickledObjectFilesystemIOManager
from dagster._serdes import serialize_value
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support import parity
from tests.support.platform import Platform
from upath import UPath

# One process for the module: all its runs go at the same time, over one worker.
pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("parity")]

Event = DagsterEventType

THE_EXECUTORS_OWN = {
    Event.ENGINE_EVENT,  # what an executor, a launcher and a worker say about themselves
    Event.STEP_WORKER_STARTING,  # the step has a process of its own
    Event.STEP_WORKER_STARTED,
    Event.RESOURCE_INIT_STARTED,  # once for each process
    Event.RESOURCE_INIT_SUCCESS,
    Event.RESOURCE_INIT_FAILURE,
    Event.LOGS_CAPTURED,  # once for each process
}
"""Events that rightly differ between steps in one process and steps in processes of their own."""

OF_ONE_RUN_ONLY = {
    "duration_ms",
    "timestamp",
    "storage_id",
    "stack",  # of an error: begins in the executor
}
"""Keys of an event's data that differ between two runs of the same job, whatever executes them."""

TAGS_OF_ONE_RUN_ONLY = re.compile(r"dagster/(input_event_pointer|input_data_version|data_version)")
"""Tags of an asset's event that name other events, or, without a code version, the run."""

DURATION = re.compile(r"\b[\d.]+(ms|s|m)\b")

STEPS_IN_ORDER_OF_FAILURE = re.compile(r"(?<=Steps failed: \[).*(?=\])")


def in_order_of_name(names: re.Match[str]) -> str:
    return ", ".join(sorted(names[0].split(", ")))


@dataclass(frozen=True)
class Case:
    """A job of `tests/support/parity.py`, how it is run, and what it has to show."""

    job: str
    shows: tuple[DagsterEventType, ...] = ()
    """What the reference run has to contain: otherwise the job does not show what its name says."""
    fails: bool = False
    ops: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    op_selection: tuple[str, ...] = ()
    asset_selection: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    one_at_a_time: bool = False
    """No two steps at the same time, so that the order between the steps can be compared too."""
    again: bool = False
    """Re-execute the run from its failure, and compare that too."""
    reference: str = "reference"
    in_any_order: bool = False
    """The lines of a step, that is: Dagster keeps the hooks of an op in a set."""
    end_of_the_run: bool = True
    """Compare how the run says that it failed."""


_MATERIALIZED = (Event.ASSET_MATERIALIZATION,)
_CHECKED = (Event.ASSET_MATERIALIZATION, Event.ASSET_CHECK_EVALUATION)
_RETRIED = (Event.STEP_UP_FOR_RETRY, Event.STEP_RESTARTED)

CASES = [
    Case("several_inputs_and_outputs", (Event.STEP_INPUT, Event.LOADED_INPUT, Event.STEP_OUTPUT, Event.HANDLED_OUTPUT)),
    Case("values_with_metadata"),
    Case("events_of_a_step", (Event.STEP_EXPECTATION_RESULT, Event.ASSET_OBSERVATION, Event.ASSET_MATERIALIZATION)),
    Case(
        "op_config",
        ops={"greets": {"config": {"name": "Ada", "nested": {"a": [1, 2]}}, "inputs": {"end": {"value": "!"}}}},
    ),
    Case("nested_graphs"),
    Case("conditional_branch", (Event.STEP_SKIPPED,)),
    Case("fan_in_with_skips", (Event.STEP_SKIPPED,)),
    Case("dynamic_mapping_and_collect"),
    Case("dynamic_mapping_of_two_ops_in_chain"),
    Case("empty_dynamic_output", ops={"numbers": {"config": {"size": 0}}}),
    Case("dynamic_mapping_with_a_failure", (Event.STEP_FAILURE,), fails=True),
    Case("dynamic_mapping_with_retries", _RETRIED),
    Case("retry_policy_that_helps", _RETRIED),
    Case("retry_policy_that_exhausts", (*_RETRIED, Event.STEP_FAILURE), fails=True),
    Case("retry_policy_of_the_job", (*_RETRIED, Event.STEP_FAILURE), fails=True),
    Case("retry_requested", (*_RETRIED, Event.STEP_FAILURE), fails=True),
    Case("failure_that_allows_no_retries", (Event.STEP_FAILURE,), fails=True),
    Case("failure_beside_an_independent_branch", (Event.STEP_FAILURE, Event.STEP_SUCCESS), fails=True),
    Case("wrong_and_missing_outputs", (Event.STEP_FAILURE,), fails=True),
    Case("hooks_of_the_job", (Event.HOOK_COMPLETED, Event.HOOK_SKIPPED), fails=True, in_any_order=True),
    Case("hooks_of_ops", (Event.HOOK_COMPLETED, Event.HOOK_SKIPPED), fails=True, in_any_order=True),
    Case("hook_that_fails", (Event.HOOK_ERRORED,)),
    Case("resources_with_teardown", (Event.STEP_FAILURE,), fails=True),
    # In one process this is the failure of the run, before any step; so the reference has processes for its steps.
    # That one fails the step and then raises, where Dagster's step-delegating executor fails the step only, as ours.
    Case(
        "resource_that_fails_to_initialise",
        (Event.STEP_FAILURE,),
        fails=True,
        reference="in_processes",
        end_of_the_run=False,
    ),
    Case("concurrency_pool"),
    Case("nothing_dependencies"),
    Case("priorities", one_at_a_time=True),
    Case("log_messages"),
    Case("re_execution_from_failure", (Event.STEP_FAILURE,), fails=True, again=True),
    Case("re_execution_of_a_dynamic_mapping", (Event.STEP_FAILURE,), fails=True, again=True),
    Case(
        "op_selection",
        op_selection=("divide", "add_one"),
        ops={"divide": {"inputs": {"dividend": {"value": 9}, "divisor": {"value": 4}}}},
    ),
    Case("assets_with_dependencies", _MATERIALIZED),
    Case("asset_selection", _MATERIALIZED, asset_selection=("raw", "report")),
    Case("asset_without_a_value", (Event.STEP_SKIPPED,)),
    Case("multi_asset", _MATERIALIZED),
    Case("subset_of_a_multi_asset", _MATERIALIZED, asset_selection=("north", "west")),
    Case("partitioned_assets", _MATERIALIZED, tags={"dagster/partition": "tuesday"}),
    Case("asset_checks", _CHECKED, fails=True),
    Case("blocking_asset_check", (*_CHECKED, Event.STEP_FAILURE), fails=True),
    Case("asset_of_a_graph", _MATERIALIZED),
    Case("asset_with_retries", (*_RETRIED, *_MATERIALIZED)),
    Case("observation_of_sources", (Event.ASSET_OBSERVATION,)),
]


EVERY_NIGHT = {
    *("values_with_metadata", "nested_graphs", "dynamic_mapping_of_two_ops_in_chain", "empty_dynamic_output"),
    *("dynamic_mapping_with_a_failure", "retry_policy_that_helps", "retry_policy_of_the_job", "nothing_dependencies"),
    *("failure_that_allows_no_retries", "hooks_of_ops", "hook_that_fails", "re_execution_of_a_dynamic_mapping"),
    *("asset_selection", "asset_without_a_value", "multi_asset", "asset_checks", "asset_with_retries"),
    "observation_of_sources",
}
"""Cases that have a sibling above: of each kind, one is enough for a commit."""


@dataclass
class Performance:
    """One run of a case, and what it leaves: events, values, marks."""

    platform: Platform
    case: Case
    repository: str
    run_id: str = ""
    parent: "Performance | None" = None

    @property
    def folder(self) -> Path:
        return self.platform.home / "parity" / self.repository / self.case.job

    @property
    def values_folder(self) -> Path:
        return self.folder / "values"

    @property
    def marks_file(self) -> Path:
        return self.folder / ("marks-again" if self.parent else "marks")

    def launch(self) -> "Performance":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run_id = self._create().run_id
        self.platform.instance.launch_run(self.run_id, workspace=None)  # type: ignore[arg-type]
        return self

    def launch_again(self) -> "Performance":
        return Performance(self.platform, self.case, self.repository, parent=self).launch()

    def _create(self) -> DagsterRun:
        case, instance = self.case, self.platform.instance
        whole = ReconstructableRepository.for_file(parity.__file__, self.repository).get_reconstructable_job(case.job)
        assets = {AssetKey(name) for name in case.asset_selection} or None
        job = whole.get_subset(op_selection=case.op_selection, asset_selection=assets)
        config = self._config()
        steps: Any = None
        if self.parent is not None:
            parent_run = self.platform.run(self.parent.run_id)
            keys, known = KnownExecutionState.build_resume_retry_reexecution(instance, parent_run)
            steps = create_execution_plan(job, config, step_keys_to_execute=keys, known_state=known)
        return instance.create_run_for_job(
            job.get_definition(),
            execution_plan=steps,
            run_config=config,
            tags={parity.MARKS_TAG: str(self.marks_file), **case.tags},
            op_selection=list(case.op_selection) or None,
            resolved_op_selection=set(case.op_selection) or None,
            asset_selection=assets,
            root_run_id=self.parent.run_id if self.parent else None,
            parent_run_id=self.parent.run_id if self.parent else None,
            job_code_origin=whole.get_python_origin(),
        )

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"resources": {"io_manager": {"config": {"base_dir": str(self.values_folder)}}}}
        if self.case.ops:
            config["ops"] = dict(self.case.ops)
        if self.case.one_at_a_time and self.repository != "reference":
            config["execution"] = {"config": {"max_concurrent": 1}}
        return config

    def entries(self) -> list[EventLogEntry]:
        """What tells how the steps went, in the order in which it happened."""
        return [
            entry
            for entry in self.platform.instance.all_logs(self.run_id)
            if entry.dagster_event is None or entry.dagster_event.event_type not in THE_EXECUTORS_OWN
        ]

    def types(self) -> set[DagsterEventType]:
        return {entry.dagster_event.event_type for entry in self.entries() if entry.dagster_event is not None}

    def story(self) -> dict[str, list[str]]:
        """For each step, what happened in it. What belongs to no step is the run's."""
        story: dict[str, list[str]] = defaultdict(list)
        for entry in self.entries():
            if self.case.end_of_the_run or entry.dagster_event is None or not entry.dagster_event.is_run_failure:
                story[entry.step_key or "the run"].append(self._line(entry))
        return {step: sorted(lines) if self.case.in_any_order else lines for step, lines in story.items()}

    def _line(self, entry: EventLogEntry) -> str:
        event = entry.dagster_event
        if event is None:
            return self._neutral(f"log {entry.level}: {entry.user_message}")
        message = STEPS_IN_ORDER_OF_FAILURE.sub(in_order_of_name, DURATION.sub("<time>", event.message or ""))
        told = f"{event.event_type.value}: {message}"
        if entry.step_key is not None:
            told += f" {json.dumps(without_what_is_of_one_run(json.loads(serialize_value(event.event_specific_data))))}"
        return self._neutral(told)

    def _neutral(self, text: str) -> str:
        for what, name in ((self.folder, "<folder>"), (self.run_id, "<run>")):
            text = text.replace(str(what), name)
        return text if self.parent is None else text.replace(self.parent.run_id, "<parent>")

    def order(self) -> list[str]:
        return [
            entry.step_key or ""
            for entry in self.entries()
            if entry.dagster_event is not None and entry.dagster_event.event_type is Event.STEP_START
        ]

    def values(self) -> dict[str, object]:
        """What the I/O manager has kept, by the path below its folder."""
        manager = PickledObjectFilesystemIOManager(str(self.values_folder))  # type: ignore[no-untyped-call]
        return {
            self._neutral(str(path.relative_to(self.values_folder))): manager.load_from_path(
                build_input_context(), UPath(path)
            )
            for path in sorted(self.values_folder.rglob("*"))
            if path.is_file()
        }

    def marks(self) -> list[str]:
        return self.marks_file.read_text().splitlines() if self.marks_file.exists() else []


def without_what_is_of_one_run(data: Any) -> Any:
    if isinstance(data, list):
        return [without_what_is_of_one_run(item) for item in data]
    if isinstance(data, dict):
        return {
            key: without_what_is_of_one_run(value)
            for key, value in sorted(data.items())
            if key not in OF_ONE_RUN_ONLY and not TAGS_OF_ONE_RUN_ONLY.match(key)
        }
    return data


Pair = tuple[Performance, Performance]


@pytest.fixture(scope="module")
def performances(endpoint: str, request: pytest.FixtureRequest) -> Iterator[dict[str, Pair]]:
    """Every case that is asked for, launched twice on one platform: as the reference, and under the executor."""
    wanted = {
        item.callspec.id
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
    }
    # Few at a time: there are more tests than these on the machine.
    source = {**UNHURRIED, "max_concurrent_runs": 2, "max_concurrent_steps": 2}
    with open_platform(endpoint, source=source) as platform:
        platform.instance.event_log_storage.set_concurrency_slots("narrow", 1)
        with platform.worker("-n", "w"):
            yield {
                case.job: (
                    Performance(platform, case, case.reference).launch(),
                    Performance(platform, case, "delegating").launch(),
                )
                for case in CASES
                if case.job in wanted
            }


def assert_alike(reference: Performance, tested: Performance, ends: DagsterRunStatus) -> None:
    platform = reference.platform
    assert platform.finished(reference.run_id, within=240) is ends, platform.story(reference.run_id)
    assert platform.finished(tested.run_id, within=240) is ends, platform.story(tested.run_id)
    assert tested.story() == reference.story()
    assert tested.values() == reference.values()
    for performance in (reference, tested):  # a resource is set up and torn down in each process that needs it
        assert performance.marks().count("set up") == performance.marks().count("torn down")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.job, marks=pytest.mark.nightly if case.job in EVERY_NIGHT else ()) for case in CASES],
)
def test_the_steps_go_alike(performances: dict[str, Pair], case: Case) -> None:
    reference, tested = performances[case.job]
    assert_alike(reference, tested, DagsterRunStatus.FAILURE if case.fails else DagsterRunStatus.SUCCESS)
    assert set(case.shows) <= reference.types()
    if case.one_at_a_time:
        assert tested.order() == reference.order()
    if case.again:
        assert_alike(reference.launch_again(), tested.launch_again(), DagsterRunStatus.SUCCESS)
