"""A run that was cancelled, or has failed, goes on from its finished steps: for programs, and for the command line.

Knows Dagster's runs; not SQS, not processes. What is left of a run is found out in `dagster_compat.unfinished_steps`.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq._text import clean_text
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, PARENT_RUN_ID_TAG
from dagster_taskiq.dagster_compat.instance import open_instance
from dagster_taskiq.dagster_compat.reexecution import CodeSource, create_run, loaded_job, submit
from dagster_taskiq.dagster_compat.unfinished_steps import Left, steps_left
from dagster_taskiq.errors import DagsterTaskiqError, RunNotFound
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.runs import this_user
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.tags import inheritable_tags

_UNFINISHED: Final = [status for status in DagsterRunStatus if status not in FINISHED_STATUSES]
_LET_GO_WITHIN_S: Final = 10.0
_LOOK_EVERY_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Reexecution:
    """What a re-execution does. `run_id` is None as long as nothing was launched.

    `to_run`: step keys; `mapped[?]` stands for all steps of a mapped op that are not known yet. Empty: all of them.
    """

    parent_run_id: str
    run_id: str | None
    status: str | None
    """Of the new run, once it was submitted: QUEUED or STARTING, as a rule."""
    finished: tuple[str, ...]
    """Steps that do not run again."""
    to_run: tuple[str, ...]
    all_steps: bool


def reexecute_run(
    run_id: str,
    *,
    all_steps: bool = False,
    tags: Mapping[str, str] | None = None,
    workspace: str | None = None,
    requested_by: str | None = None,
    instance: DagsterInstance | None = None,
) -> Reexecution:
    """Launch a run that goes on where a cancelled or failed one was stopped. Steps that have finished do not run again.

    It has the configuration, the partition, the selection and the tags of its parent, and goes through the instance's
    run coordinator and run launcher, so it returns when the new run is queued or launched.
    `all_steps`: everything once more, also of a run that succeeded. `tags`: in addition. `workspace`: the path of a
    `workspace.yaml` with the run's code location; default: where the run itself says that its code is.
    `requested_by`: for the new run's event log; default `this_user()`. `instance`: default that of `$DAGSTER_HOME`.

    Raises `RunNotFound`, and `DagsterTaskiqError` when the run is not over, when another run that goes on from it is
    not over, when nothing of it is left to do, when its code location cannot be loaded, or has no such steps any more.
    """
    source = CodeSource(workspace=(workspace,) if workspace else ())
    with ExitStack() as stack:
        instance = instance or stack.enter_context(open_instance())
        return launch(instance, plan(instance, run_id, all_steps=all_steps), tags or {}, source, requested_by)


@dataclass(frozen=True, slots=True)
class Planned:
    """A re-execution that can be launched."""

    parent: DagsterRun
    left: Left | None
    """None: everything runs."""

    def described(self, run: DagsterRun | None = None) -> Reexecution:
        """For people and programs."""
        return Reexecution(
            parent_run_id=self.parent.run_id,
            run_id=run.run_id if run is not None else None,
            status=run.status.value if run is not None else None,
            finished=self.left.finished if self.left is not None else (),
            to_run=self.left.to_run if self.left is not None else (),
            all_steps=self.left is None,
        )


def plan(instance: DagsterInstance, run_id: str, *, all_steps: bool = False) -> Planned:
    """What is left to do of a run. Reads its event log; loads no code. Raises as `reexecute_run`."""
    run = instance.get_run_by_id(run_id)
    if run is None:
        raise RunNotFound(f"there is no run {run_id} in this Dagster instance; is DAGSTER_HOME the right one?")
    if run.status not in FINISHED_STATUSES:
        raise DagsterTaskiqError(f"run {run_id} is {run.status.value}; {_before_that(run.status, run_id)}")
    _wait_for_its_worker(instance, run)
    _refuse_a_second(instance, run)
    if all_steps:
        return Planned(run, None)
    again = "to run all its steps again: --all-steps"
    if run.status is DagsterRunStatus.SUCCESS:
        raise DagsterTaskiqError(f"run {run_id} has succeeded, nothing of it is left to do; {again}")
    try:
        left = steps_left(instance, run)
    except LookupError as error:
        raise DagsterTaskiqError(f"run {run_id} cannot go on: {error}; {again}") from error
    if not left.to_run:
        raise DagsterTaskiqError(f"every step of run {run_id} has finished, nothing of it is left to do; {again}")
    return Planned(run, left)


def launch(
    instance: DagsterInstance,
    planned: Planned,
    tags: Mapping[str, str],
    source: CodeSource,
    requested_by: str | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Reexecution:
    """Create the new run, and submit it. `tell` is called before what takes seconds. Raises as `reexecute_run`."""
    parent = planned.parent
    tell("loading the run's code location")
    with loaded_job(instance, parent, source) as loaded:
        run = create_run(instance, parent, loaded, planned.left, inheritable_tags(parent), tags)
        try:
            _refuse_a_second(instance, parent, run)
        except DagsterTaskiqError:
            instance.delete_run(run.run_id)  # nobody has seen it
            raise
        by = clean_text(requested_by or this_user())
        what = planned.described(run)
        append_event(instance, run, engine_events.reexecuted(parent.run_id, by, what.finished, what.to_run))
        return planned.described(submit(instance, run.run_id, loaded))


def _before_that(status: DagsterRunStatus, run_id: str) -> str:
    if status is DagsterRunStatus.CANCELING:
        return f"wait for its end, it is being cancelled: dagster-taskiq run explain {run_id}"
    return f"cancel it, and wait for its end: dagster-taskiq run cancel {run_id}"


def _refuse_a_second(instance: DagsterInstance, parent: DagsterRun, mine: DagsterRun | None = None) -> None:
    """Two runs that go on from the same one would do the same work side by side.

    Somebody else, or Dagster's retries, may have been quicker. Of two that were created at the same moment the first
    one in the database goes on.
    """
    # Runs that an op of it has launched name it as well, and are of other jobs.
    going_on = RunsFilter(job_name=parent.job_name, tags={PARENT_RUN_ID_TAG: parent.run_id}, statuses=_UNFINISHED)
    for first in instance.get_runs(going_on, limit=1, ascending=True):
        if mine is None or first.run_id != mine.run_id:
            how_it_is = f"it is {first.status.value}; wait for its end, or cancel it"
            if first.status is DagsterRunStatus.NOT_STARTED:  # whoever has created it may have been killed since
                how_it_is = "and was never submitted; if it is not within a minute, cancel it"
            raise DagsterTaskiqError(
                f"run {first.run_id} goes on from run {parent.run_id} already, {how_it_is}:"
                f" dagster-taskiq run cancel {first.run_id}"
            )


def _wait_for_its_worker(instance: DagsterInstance, run: DagsterRun) -> None:
    """A run that somebody has marked as finished by force may still be at work, and the new one would do it as well."""
    launcher = instance.run_launcher
    if not isinstance(launcher, TaskiqRunLauncher):
        return
    claims, until = Claims.of(instance, launcher.settings), time.monotonic() + _LET_GO_WITHIN_S
    while (owner := claims.owner(run.run_id)) is not None and owner.alive:
        if time.monotonic() > until:
            raise DagsterTaskiqError(
                f"run {run.run_id} is {run.status.value}, but worker {owner.worker_id} is still stopping it; wait, and"
                f" see dagster-taskiq run explain {run.run_id}"
            )
        time.sleep(_LOOK_EVERY_S)
