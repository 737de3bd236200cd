"""The demo: two real runs over an embedded SQS, terminated in the middle; what happened, and when.

Knows Dagster's event log and the process table, and reads there what it prints.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus, EventLogEntry, JobDefinition, reconstructable

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.examples.bakery.definitions import defs
from dagster_taskiq.local.dev import Playground, playground
from dagster_taskiq.local.instance_config import InstanceConfig
from dagster_taskiq.local.process_manager import StopRequest, stop_requests
from dagster_taskiq.storage.engine_events import STAGE_KEY
from dagster_taskiq.storage.tags import GRACE_SECONDS_TAG

FINAL: Final = frozenset({DagsterRunStatus.CANCELED, DagsterRunStatus.FAILURE, DagsterRunStatus.SUCCESS})
_STATUS_EVENTS: Final = {
    DagsterEventType.RUN_CANCELING: "CANCELING",
    DagsterEventType.RUN_CANCELED: "CANCELED",
    DagsterEventType.RUN_FAILURE: "FAILURE",
    DagsterEventType.RUN_SUCCESS: "SUCCESS",
}
_TICK_S: Final = 0.02
_WITHIN_S: Final = 120.0
"""For all scenes, which take 20 s."""


class DemoFailed(DagsterTaskiqError):
    """What was promised did not happen."""


def a_day() -> JobDefinition:
    """The bakery's job `day`, as the worker finds it: by the name of this function."""
    return defs.resolve_job_def("day")


def an_oven() -> JobDefinition:
    """The bakery's job `bake`."""
    return defs.resolve_job_def("bake")


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of a timeline; milliseconds are counted from the call of `terminate`."""

    ms: float
    what: str
    text: str


@dataclass(frozen=True, slots=True)
class Scene:
    """One run, what must be in its log before it is terminated, and what must be there in the end."""

    title: str
    job: Callable[[], JobDefinition]
    under_way: str
    grace_s: float
    must_show: tuple[str, ...]
    """Texts or stages that must be in the log exactly once."""
    day: str | None = None
    """The partition."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long its steps take."""


SCENES: Final = (
    Scene(
        title="A job that enters a bakery's sales of one day into its books, in one transaction",
        job=a_day,
        under_way="entered ",
        grace_s=30,
        must_show=("interrupting", "finally: rolled back", "finally: database closed", "tree_gone"),
        day="2025-01-07",
        seconds={"receipts": 0.5, "sales": 20},
    ),
    Scene(
        title="A job that ignores its interrupt, and has a subprocess that does, too",
        job=an_oven,
        under_way="baking stubbornly",
        grace_s=2,
        must_show=("interrupting", "killed", "tree_gone"),
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one run."""

    scene: Scene
    run_id: str
    moments: tuple[Moment, ...]
    complaints: tuple[str, ...]


class Demo:
    """Runs the scenes, one after the other."""

    def __init__(self, ground: Playground, instance: DagsterInstance, wait: Callable[[float], None]) -> None:
        self._ground = ground
        self._instance = instance
        self._wait = wait

    def play(self, scene: Scene, print_line: Callable[[str], None]) -> Outcome:
        """Launch, wait until the op has begun, terminate, wait for the end; then check what is left."""
        idle = self._ground.processes().keys()
        run_id = self._launch(scene)
        print_line(f"launched run {run_id} of {scene.job().name}")
        line = self._until_under_way(scene, run_id)
        busy = self._ground.processes().keys() - idle
        print_line(f"the op says: {line}  ({len(busy)} processes running)")
        terminated_at = time.time()
        accepted = self._instance.run_launcher.terminate(run_id)
        print_line("terminate(run_id) called" if accepted else "terminate(run_id) was refused")
        status = self._until_final(run_id, within_s=scene.grace_s + 30)
        left = self._what_is_left(idle, within_s=1)
        called = Moment(0, "terminate", f"terminate({run_id!r}) called")
        moments = tuple(sorted([called, *self._moments(run_id, terminated_at)], key=lambda moment: moment.ms))
        return Outcome(scene, run_id, moments, tuple(complaints(scene, status, left, moments, accepted=accepted)))

    def _launch(self, scene: Scene) -> str:
        day = {} if scene.day is None else {"dagster/partition": scene.day}
        run = self._instance.create_run_for_job(
            scene.job(),
            run_config={"ops": {step: {"config": {"seconds": seconds}} for step, seconds in scene.seconds.items()}},
            tags={GRACE_SECONDS_TAG: f"{scene.grace_s:g}", **day},
            job_code_origin=reconstructable(scene.job).get_python_origin(),
        )
        no_workspace: Any = None  # the run record is enough: no workspace, no code server
        self._instance.launch_run(run.run_id, no_workspace)
        return run.run_id

    def _until_under_way(self, scene: Scene, run_id: str) -> str:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for entry in self._instance.all_logs(run_id):
                if entry.user_message.startswith(scene.under_way):
                    return entry.user_message
            status = self._status(run_id)
            if status in FINAL:
                raise DemoFailed(f"run {run_id} was {status.value} before it could be terminated")
            self._wait(_TICK_S)
        raise DemoFailed(f"run {run_id} did not begin its work within 30 s; it is {self._status(run_id).value}")

    def _until_final(self, run_id: str, within_s: float) -> DagsterRunStatus:
        end = time.monotonic() + within_s
        while (status := self._status(run_id)) not in FINAL and time.monotonic() < end:
            self._wait(_TICK_S)
        return status

    def _status(self, run_id: str) -> DagsterRunStatus:
        run = self._instance.get_run_by_id(run_id)
        if run is None:
            raise DemoFailed(f"run {run_id} has disappeared")
        return run.status

    def _what_is_left(self, idle: Collection[int], within_s: float) -> Mapping[int, str]:
        """Processes that were not there before the run. Its shim ends a moment later, so this waits for a moment."""
        end = time.monotonic() + within_s
        while True:
            left = {pid: command for pid, command in self._ground.processes().items() if pid not in idle}
            if not left or time.monotonic() > end:
                return left
            self._wait(_TICK_S)

    def _moments(self, run_id: str, zero: float) -> list[Moment]:
        entries = self._instance.all_logs(run_id)
        found = [(entry, described) for entry in entries if (described := _describe(entry))]
        return [Moment((entry.timestamp - zero) * 1000, what, text) for entry, (what, text) in found]


def _describe(entry: EventLogEntry) -> tuple[str, str] | None:
    """The name of an event log entry in the timeline, and its text; None for an entry that is not shown."""
    event = entry.dagster_event
    if event is None:
        kept = entry.user_message.startswith(("finally:", "ignored:"))
        return ("op", entry.user_message) if kept else None
    metadata: Mapping[str, Any] = getattr(event.event_specific_data, "metadata", None) or {}
    if STAGE_KEY in metadata:
        return str(metadata[STAGE_KEY].value), event.message or ""
    if event.event_type is DagsterEventType.STEP_FAILURE:
        return "step", "the op was interrupted (STEP_FAILURE)"
    if event.event_type in _STATUS_EVENTS:
        return "run", _STATUS_EVENTS[event.event_type]
    return None


def complaints(
    scene: Scene, status: DagsterRunStatus, left: Mapping[int, str], moments: tuple[Moment, ...], *, accepted: bool
) -> list[str]:
    """What is not as promised."""
    found = [] if accepted else ["terminate returned False"]
    if status is not DagsterRunStatus.CANCELED:
        found.append(f"the run is {status.value}, not CANCELED")
    if left:
        found.append("still alive: " + ", ".join(f"pid {pid} ({command.strip()})" for pid, command in left.items()))
    for expected in scene.must_show:
        seen = sum(expected == moment.what or moment.text.startswith(expected) for moment in moments)
        if seen != 1:
            found.append(f"{expected!r} happened {seen} times instead of once")
    return found


def run_demo(print_line: Callable[[str], None], show: Callable[[Outcome], None]) -> bool:
    """Run all scenes; True if all was as promised. Raises `DagsterTaskiqError`, or `StopRequested`."""
    # Fast. The grace period is that of the scene.
    config: dict[str, Any] = {"wait_time_seconds": 2, "visibility_timeout_seconds": 10, "status_poll_seconds": 2}
    config["drain_seconds"] = 0
    began = time.monotonic()
    with (
        stop_requests() as request,
        playground(
            lambda temporary: InstanceConfig(temporary, temporary),
            request,
            _without_aws_and_dagster(),
            lambda *_: None,
            quiet=True,
            **config,
        ) as (ground, manager),
    ):
        print_line("starting an embedded AWS endpoint on loopback, and a worker")
        ground.start_aws()
        ground.wait_for_worker(ground.start_worker())
        with DagsterInstance.from_config(str(ground.home)) as instance:
            print_line(f"worker ready after {time.monotonic() - began:.1f} s")
            outcomes = []

            def wait(seconds: float) -> None:
                manager.check()
                _stay_within(request, seconds, began + _WITHIN_S)

            for scene in SCENES:
                print_line(scene.title)
                outcomes.append(Demo(ground, instance, wait).play(scene, print_line))
                show(outcomes[-1])
        print_line(f"stopping the worker and the endpoint; {time.monotonic() - began:.0f} s in all")
        return not any(outcome.complaints for outcome in outcomes)


def _without_aws_and_dagster() -> dict[str, str]:
    """The demo shows the same everywhere: this environment, without anything that leads to another AWS or Dagster."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DAGSTER_"))}


def _stay_within(request: StopRequest, seconds: float, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise DemoFailed("the demo took too long; something hangs")
    request.wait(seconds)
