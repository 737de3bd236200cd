"""A run that goes on from another one: its code location, its plan, its record. As Dagster does it, where it can be.

Private parts of Dagster that only a re-execution needs. Calls block on the database and on the code location.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dagster import DagsterError, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._check import CheckError
from dagster._cli.workspace.cli_target import workspace_opts_to_load_target
from dagster._core.definitions.selector import JobSubsetSelector
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.remote_origin import CodeLocationOrigin, ManagedGrpcPythonEnvCodeLocationOrigin
from dagster._core.remote_representation.code_location import CodeLocation
from dagster._core.remote_representation.external import RemoteJob
from dagster._core.remote_representation.grpc_server_registry import GrpcServerRegistry
from dagster._core.storage.tags import (
    BACKFILL_ID_TAG,
    BACKFILL_TAGS,
    PARENT_RUN_ID_TAG,
    RESUME_RETRY_TAG,
    ROOT_RUN_ID_TAG,
    TAGS_TO_MAYBE_OMIT_ON_RETRY,
)
from dagster._core.workspace.context import WorkspaceProcessContext, WorkspaceRequestContext
from dagster._core.workspace.load_target import WorkspaceLoadTarget
from dagster._grpc.constants import GrpcServerCommand
from dagster._record import copy
from dagster_shared.cli import WorkspaceOpts
from dagster_shared.error import SerializableErrorInfo

from dagster_taskiq.dagster_compat.unfinished_steps import Left
from dagster_taskiq.errors import DagsterTaskiqError

__all__ = ["CodeSource", "LoadedJob", "create_run", "find_job", "loaded_job", "submit"]

_GIVE_IT: Final = "give the workspace of your webserver: -w workspace.yaml"

_WITHOUT_US_S: Final = 45
"""A code server of ours ends by itself, when this process is killed."""


@dataclass(frozen=True, slots=True)
class CodeSource:
    """Where the code of a run is, as `dagster job launch` is told. Empty: where the run itself says that it is."""

    workspace: Sequence[str] = ()
    module_name: Sequence[str] = ()
    python_file: Sequence[str] = ()
    working_directory: str | None = None

    @property
    def is_given(self) -> bool:
        """Whether somebody has said where."""
        return bool(self.workspace or self.module_name or self.python_file)


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """A run's job, as its code location has it now."""

    request: WorkspaceRequestContext
    location: CodeLocation
    job: RemoteJob


class _OfTheRun(WorkspaceLoadTarget):
    """The code location of one run."""

    def __init__(self, origin: CodeLocationOrigin) -> None:
        self._origin = origin

    def create_origins(self) -> Sequence[CodeLocationOrigin]:
        return [self._origin]


@contextmanager
def loaded_job(instance: DagsterInstance, run: DagsterRun, source: CodeSource) -> Iterator[LoadedJob]:
    """The job of a run, with its selection. Starts a code server, unless the location is one.

    Raises `DagsterTaskiqError`.
    """
    target = _target(run, source)
    with ExitStack() as stack:
        servers = stack.enter_context(_code_servers(instance))
        with warnings.catch_warnings():
            # What cannot be loaded is an error here, in one line; Dagster warns of it, with its traceback.
            warnings.filterwarnings("ignore", "Error loading repository location", UserWarning)
            process = stack.enter_context(WorkspaceProcessContext(instance, target, grpc_server_registry=servers))
        yield find_job(process.create_request_context(), run)


def find_job(request: WorkspaceRequestContext, run: DagsterRun) -> LoadedJob:
    """The job of a run in a workspace that is open, with the run's selection. Raises `DagsterTaskiqError`."""
    location = _location(request, run)
    return LoadedJob(request, location, _job(location, run))


def _code_servers(instance: DagsterInstance) -> GrpcServerRegistry:
    """As a webserver has them; but quiet ones, that are waited for at the end."""
    return GrpcServerRegistry(
        instance_ref=instance.get_ref(),
        server_command=GrpcServerCommand.API_GRPC,
        heartbeat_ttl=_WITHOUT_US_S,
        startup_timeout=instance.code_server_process_startup_timeout,
        wait_for_processes_on_shutdown=True,
        log_level="CRITICAL",
    )


def _target(run: DagsterRun, source: CodeSource) -> WorkspaceLoadTarget:
    if source.is_given:
        try:
            return workspace_opts_to_load_target(
                WorkspaceOpts(
                    workspace=list(source.workspace) or None,
                    module_name=list(source.module_name) or None,
                    python_file=list(source.python_file) or None,
                    working_directory=source.working_directory,
                )
            )
        except (CheckError, DagsterError, OSError) as error:
            raise DagsterTaskiqError(f"the workspace cannot be read: {error}") from error
    if run.remote_job_origin is None:
        raise DagsterTaskiqError(f"run {run.run_id} does not say what code location it is of; {_GIVE_IT}")
    origin = run.remote_job_origin.repository_origin.code_location_origin
    if isinstance(origin, ManagedGrpcPythonEnvCodeLocationOrigin):
        origin = _with_an_interpreter_of_ours(origin)
    return _OfTheRun(origin)


def _with_an_interpreter_of_ours(origin: ManagedGrpcPythonEnvCodeLocationOrigin) -> CodeLocationOrigin:
    """The run was launched on another machine, whose Python may be somewhere else."""
    target = origin.loadable_target_origin
    if target.executable_path is None or Path(target.executable_path).exists():
        return origin
    changed: CodeLocationOrigin = copy(origin, loadable_target_origin=copy(target, executable_path=None))
    return changed


def _location(request: WorkspaceRequestContext, run: DagsterRun) -> CodeLocation:
    """That of the run; or the only one, because somebody has said that it is this."""
    names = list(request.code_location_names)
    wanted = _location_name(run)
    name = wanted if wanted in names else names[0] if len(names) == 1 else None
    if name is None:
        raise DagsterTaskiqError(
            f"run {run.run_id} is of code location {wanted or '(unknown)'}, and the workspace has"
            f" {', '.join(names) or 'none'}; {_GIVE_IT}"
        )
    entry = request.get_location_entry(name)
    failed = entry.load_error if entry is not None else None
    if failed is not None:
        raise DagsterTaskiqError(
            f"code location {name} cannot be loaded: {_cause(failed)}; see all of it by 'dagster"
            f" definitions validate', or {_GIVE_IT}"
        )
    return request.get_code_location(name)


def _location_name(run: DagsterRun) -> str | None:
    origin = run.remote_job_origin
    return origin.repository_origin.code_location_origin.location_name if origin is not None else None


def _job(location: CodeLocation, run: DagsterRun) -> RemoteJob:
    origin = run.remote_job_origin
    repositories = location.get_repositories()
    wanted = origin.repository_origin.repository_name if origin is not None else None
    repository = repositories.get(wanted) if wanted is not None else None
    having = [repository] if repository is not None else list(repositories.values())
    found = next((one for one in having if one.has_job(run.job_name)), None)
    if found is None:
        raise DagsterTaskiqError(
            f"code location {location.name} has no job {run.job_name} now; it was renamed or removed since run"
            f" {run.run_id}"
        )
    return location.get_job(
        JobSubsetSelector(
            location_name=location.name,
            repository_name=found.name,
            job_name=run.job_name,
            op_selection=run.op_selection,
            asset_selection=None if run.asset_selection is None else list(run.asset_selection),
            asset_check_selection=None if run.asset_check_selection is None else list(run.asset_check_selection),
        )
    )


def create_run(
    instance: DagsterInstance,
    parent: DagsterRun,
    loaded: LoadedJob,
    left: Left | None,
    parent_tags: Mapping[str, str],
    extra_tags: Mapping[str, str],
) -> DagsterRun:
    """The record of a run that does what is left of its parent; None: all of it once more. See `submit`.

    What `DagsterInstance.create_reexecuted_run` does, with other steps. `parent_tags`: those that may be inherited.
    Raises `DagsterTaskiqError` when the job's code has no such steps any more, or outputs were only in memory.
    """
    job = loaded.job
    steps = list(left.to_run) if left is not None else None
    try:
        plan = loaded.location.get_execution_plan(
            job,
            parent.run_config,
            step_keys_to_execute=steps,
            known_state=left.state if left is not None else None,
            instance=instance,
        )
    except DagsterError as error:
        raise DagsterTaskiqError(
            f"job {job.name} cannot go on from run {parent.run_id}, its code or configuration has changed since:"
            f" {_cause_of(error)}; to run all steps: --all-steps"
        ) from error
    snapshot = plan.execution_plan_snapshot
    if left is not None and not snapshot.artifacts_persisted:
        raise DagsterTaskiqError(
            f"run {parent.run_id} kept the outputs of its finished steps in memory (mem_io_manager), and they are"
            " gone; to run all steps: --all-steps"
        )
    root = parent.root_run_id or parent.run_id
    tags = {
        **job.tags,
        **_inherited(instance, parent, parent_tags),
        **({RESUME_RETRY_TAG: "true"} if left is not None else {}),
        **extra_tags,
        PARENT_RUN_ID_TAG: parent.run_id,
        ROOT_RUN_ID_TAG: root,
    }
    return instance.create_run(
        job_name=parent.job_name,
        run_id=None,
        run_config=parent.run_config,
        status=DagsterRunStatus.NOT_STARTED,
        tags=tags,
        root_run_id=root,
        parent_run_id=parent.run_id,
        step_keys_to_execute=steps,
        execution_plan_snapshot=snapshot,
        job_snapshot=job.job_snapshot,
        parent_job_snapshot=job.parent_job_snapshot,
        asset_selection=job.asset_selection,
        asset_check_selection=job.asset_check_selection,
        resolved_op_selection=parent.resolved_op_selection,
        op_selection=parent.op_selection,
        # Where Dagster's UI knows it, also when somebody has said here that the code is elsewhere.
        remote_job_origin=parent.remote_job_origin or job.get_remote_origin(),
        job_code_origin=job.get_python_origin(),
        asset_graph=loaded.request.asset_graph,
    )


def submit(instance: DagsterInstance, run_id: str, loaded: LoadedJob) -> DagsterRun:
    """Hand a run over to the instance's run coordinator. Raises whatever that, or the launcher, raises."""
    return instance.submit_run(run_id, loaded.request)


def _inherited(instance: DagsterInstance, parent: DagsterRun, tags: Mapping[str, str]) -> dict[str, str]:
    """Without those that Dagster leaves out. A backfill that goes on counts the new run as its own."""
    kept = {name: value for name, value in tags.items() if name not in TAGS_TO_MAYBE_OMIT_ON_RETRY}
    backfill_id = parent.tags.get(BACKFILL_ID_TAG)
    backfill = instance.get_backfill(backfill_id) if backfill_id is not None else None
    if backfill is not None and backfill.status is BulkActionStatus.REQUESTED:
        kept |= {name: parent.tags[name] for name in BACKFILL_TAGS if name in parent.tags}
    return kept


def _cause(error: SerializableErrorInfo) -> str:
    """The innermost error's first line: what is wrong, not where Dagster has noticed it."""
    while error.cause is not None:
        error = error.cause
    lines = [line.strip() for line in error.message.splitlines() if line.strip()]
    return lines[0] if lines else str(error.cls_name)


def _cause_of(error: DagsterError) -> str:
    infos: Any = getattr(error, "user_code_process_error_infos", None)
    return _cause(infos[-1]) if infos else next(iter(str(error).splitlines()), type(error).__name__)
