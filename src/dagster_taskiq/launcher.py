"""Dagster runs to work messages; terminate; health. Knows no asyncio, no processes and no SQS words."""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from dagster import Any as Any_
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, Field, Permissive

from dagster_taskiq.cancellation.model import CancelOutcome
from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR
from dagster_taskiq.dagster_compat.api import (
    FINISHED_STATUSES,
    CheckRunHealthResult,
    ConfigurableClass,
    ConfigurableClassData,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster_taskiq.dagster_compat.cancelable import let_starting_runs_be_terminated
from dagster_taskiq.dagster_compat.connections import bounded_calls
from dagster_taskiq.errors import DagsterTaskiqError, QueueMissing, QueueUnreachable
from dagster_taskiq.messages import EXECUTE_RUN, RESUME_RUN
from dagster_taskiq.metrics import Metrics, on_ecs
from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
from dagster_taskiq.route_queues import unknown_route
from dagster_taskiq.run_fence import fence_for
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.celery_tags import warning_of_run
from dagster_taskiq.storage.claims import Claims, Owner
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.fleet import read_hold
from dagster_taskiq.storage.hold_notes import held_note
from dagster_taskiq.storage.queue_ttl import ended_before_launch
from dagster_taskiq.storage.routing import Routing, route_of_run
from dagster_taskiq.storage.tags import TASK_ID_TAG, own_tags, tag_launched_run
from dagster_taskiq.storage.unstarted import end_withdrawn
from dagster_taskiq.storage.waiting import describe_wait
from dagster_taskiq.superseding import Superseding
from dagster_taskiq.tasks.producer import REQUEST_TIMEOUT_S, Producer, result_of, work_message
from dagster_taskiq.termination import BEFORE_START, Termination

if TYPE_CHECKING:
    from dagster_taskiq.cancellable_broker import CancellableSQSBroker

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_DATABASE_S: Final = 60.0
"""For all that one call of Dagster needs of the database."""
_WAITING_FOR: Final[Mapping[str, frozenset[DagsterRunStatus]]] = {
    EXECUTE_RUN: BEFORE_START,
    RESUME_RUN: frozenset({DagsterRunStatus.STARTED}),
}
"""The statuses of a run whose work has been sent and not begun."""


def _in_time(
    call: "Callable[Concatenate[TaskiqRunLauncher, _P], _T]",
) -> "Callable[Concatenate[TaskiqRunLauncher, _P], _T]":
    """The database has so much time to answer; then the call raises `TimeoutError`."""

    @wraps(call)
    def limited(self: "TaskiqRunLauncher", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with bounded_calls(self._instance, _DATABASE_S):
            return call(self, *args, **kwargs)

    return limited


class TaskiqRunLauncher(RunLauncher[DagsterInstance], ConfigurableClass):
    """Launches runs over Taskiq on AWS SQS, and terminates them.

    .. code-block:: yaml

        run_launcher:
          module: dagster_taskiq.launcher
          class: TaskiqRunLauncher
          config:
            queue_url: "https://sqs.us-east-1.amazonaws.com/123456789012/dagster-tasks"
            config_source:
              grace_seconds: 30
    """

    def __init__(
        self,
        queue_url: str | None = None,
        region_name: str | None = None,
        endpoint_url: str | None = None,
        config_source: Mapping[str, Any] | None = None,
        inst_data: ConfigurableClassData | None = None,
        **unknown: Any,
    ) -> None:
        """Check the configuration; nothing is connected before it is needed. Raises `SettingsError`."""
        self._inst_data = inst_data
        given = {
            "queue_url": queue_url,
            "region_name": region_name,
            "endpoint_url": endpoint_url,
            "config_source": config_source,
        }
        self.settings = Settings.from_config(
            {key: value for key, value in given.items() if value is not None} | unknown
        )
        self._producer = Producer(self._make_broker, name="dagster-taskiq launcher")
        self._known_claims: Claims | None = None
        self._known_routing: Routing | None = None
        queue = queue_name(self.settings.queue_url)
        self._metrics = Metrics.chosen(self.settings.metrics, queue, on_ecs=on_ecs(), stdout_is_a_log=False)
        let_starting_runs_be_terminated()
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """Where the configuration came from."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> Any:
        """The schema. Unknown keys pass it and are refused by `Settings`, which suggests the right one."""
        return Permissive(dict(CONFIG_FIELDS))  # type: ignore[no-untyped-call]

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "TaskiqRunLauncher":
        """Called by Dagster with the checked configuration."""
        return cls(inst_data=inst_data, **config_value)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Tag the run with a new task id and its route, then send its work there.

        Raises `QueueError` when it cannot be sent, and `SettingsError` when a tag names no route, unless the run was
        terminated meanwhile, or a worker has it all the same: from whatever is raised here Dagster makes a FAILURE. A
        run that a fence means is canceled instead.
        """
        run = self._with_tags_of_job(context.dagster_run)
        if not (self._ended_at_a_fence(run) or self._ended_by_its_tags(run)):
            self._submit(run, EXECUTE_RUN)

    @_in_time
    def _with_tags_of_job(self, run: DagsterRun) -> DagsterRun:
        return self.routing.with_tags_of_job(run)

    @_in_time
    def _ended_at_a_fence(self, run: DagsterRun) -> bool:
        try:
            fence = fence_for(self._instance, run)
        except Exception:  # whatever it is: a fence that cannot be read must not keep runs from being launched
            logger.exception("cannot look for fences", extra={"run_id": run.run_id})
            return False
        if fence is not None:
            self._termination().end_at_fence(run, fence.fence_id, fence.reason, fence.requested_by)
        return fence is not None

    @_in_time
    def _ended_by_its_tags(self, run: DagsterRun) -> bool:
        """Because it was withdrawn, a newer run has superseded it, or it has waited too long."""
        claims = self._claims()
        return (
            end_withdrawn(claims, run)
            or self.superseding().look(run)
            or ended_before_launch(claims, self.settings, run)
        )

    def superseding(self) -> Superseding:
        """What ends older runs with the same key."""

        def cancel(run: DagsterRun, reason: str, by: str) -> None:
            with bounded_calls(self._instance, _DATABASE_S):
                self._termination().cancel(run, reason, by)

        return Superseding(self._instance, self.settings, self._claims(), cancel)

    @property
    def supports_resume_run(self) -> bool:
        """Yes: a resumed run is a new task."""
        return True

    def resume_run(self, context: ResumeRunContext) -> None:
        """As `launch_run`, to the route that it had; the new task id makes an old message that is about worthless."""
        self._submit(context.dagster_run, RESUME_RUN)

    @_in_time
    def _submit(self, run: DagsterRun, task_name: str) -> None:
        task_id, before = uuid.uuid4().hex, own_tags(run).get(TASK_ID_TAG)
        try:
            route = self.routing.route_for(run) if task_name == EXECUTE_RUN else route_of_run(run)
            # The tags first: a worker may have the message before `send` returns.
            tag_launched_run(self._instance, run, task_id, self.routing.tags_for(run, route))
            self._send(run, task_name, task_id, route)
        except DagsterTaskiqError as error:
            if not self._has_moved_on(run, task_name):
                if task_name == RESUME_RUN and before is not None:
                    # Or else the run would count as waiting for a worker, and would not be resumed again.
                    self._instance.add_run_tags(run.run_id, {TASK_ID_TAG: before})
                raise
            logger.warning("run not launched, and not needed any more: %s", error, extra={"run_id": run.run_id})
            return
        self._append(run, engine_events.submitted(task_id, queue_name(self.settings.of_route(route).queue_url)))
        warning = warning_of_run(run.tags) if task_name == EXECUTE_RUN else None
        if warning is not None:
            self._append(run, warning)
        self._note_hold(run)

    def _note_hold(self, run: DagsterRun) -> None:
        """Say in its log that the fleet is held: `TaskiqRunCoordinator` launches nothing then, others do."""
        try:
            if (hold := read_hold(self._instance)) is not None:
                append_event(self._instance, run, held_note(hold))
        except Exception:
            logger.exception("it could not be noted that the fleet is held", extra={"run_id": run.run_id})

    @property
    def routing(self) -> Routing:
        """Decides which run goes to which route."""
        if self._known_routing is None:
            self._known_routing = Routing(self._instance, self.settings)
        return self._known_routing

    def _make_broker(self, route: str) -> "CancellableSQSBroker":
        from dagster_taskiq.cancellable_broker import CancellableSQSBroker

        settings = self.settings.of_route(route)
        return CancellableSQSBroker.from_settings(settings, settings.queue_url)

    def _send(self, run: DagsterRun, task_name: str, task_id: str, route: str) -> None:
        group = run.job_name if self.settings.is_fair_queue else None
        try:
            request = self._producer.submit(
                lambda broker: broker.kick(work_message(broker, task_name, task_id, group, {"run_id": run.run_id})),
                route=route,
            )
            result_of(request)
        except QueueMissing as error:
            if route == DEFAULT_ROUTE:
                raise
            raise unknown_route(self._producer, self.routing, self.settings.queue_url, route) from error
        except TimeoutError as error:
            raise QueueUnreachable(
                f"{self.settings.of_route(route).queue_url} did not answer within {REQUEST_TIMEOUT_S} s; the run was"
                " not launched. Look at the endpoint and at the network, then launch it again"
            ) from error

    def _has_moved_on(self, run: DagsterRun, task_name: str) -> bool:
        """Whether the work is needed no more: the run was terminated, or the message got through after all."""
        now = self._instance.get_run_by_id(run.run_id)
        return now is None or now.status not in _WAITING_FOR[task_name]

    def terminate(self, run_id: str) -> bool:
        """Have the run stopped; quick, and never raises for a run that exists. Who asked is unknown: see `cancel`.

        Returns True when something was done that stops it, False when there is nothing to stop (unknown or finished)
        or nothing that this launcher could stop. The run is CANCELED when its processes are gone.
        """
        return self.cancel(run_id, requested_by=UNKNOWN_AUTHOR)

    def cancel(self, run_id: str, *, reason: str | None = None, requested_by: str) -> bool:
        """As `terminate`, and the run's log names who asked, and why. See `request_cancel`."""
        return self.request_cancel(run_id, reason=reason, requested_by=requested_by).stops

    @_in_time
    def request_cancel(self, run_id: str, *, reason: str | None = None, requested_by: str) -> CancelOutcome:
        """As `cancel`, and tells what came of it.

        So do its tags `dagster-taskiq/cancelled_by` and `cancel_reason`, for who does not get the message. A text
        that cannot be stored is cleaned; tags and notes that cannot be written do not keep the run from its end.
        """
        return self._termination().cancel(self._instance.get_run_by_id(run_id), reason, requested_by)

    def request_cancels(
        self, runs: Sequence[DagsterRun], *, reason: str | None = None, requested_by: str
    ) -> dict[str, CancelOutcome | Exception]:
        """As `request_cancel`, of runs as they were just read; one request for ten messages.

        What goes wrong with one of them is its outcome, and does not concern the others.
        """
        termination = self._termination()
        asked = termination.ask_together(runs, reason, requested_by)
        outcomes: dict[str, CancelOutcome | Exception] = {}
        for run in runs:
            try:
                with bounded_calls(self._instance, _DATABASE_S):
                    outcomes[run.run_id] = termination.cancel(run, reason, requested_by, asked.get(run.run_id))
            except Exception as error:  # noqa: BLE001 - the others are to be stopped all the same
                outcomes[run.run_id] = error
        return outcomes

    def _termination(self) -> Termination:
        return Termination(self._instance, self.settings, self._producer, self._metrics, self._claims())

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Yes: by claims and heartbeats."""
        return True

    @_in_time
    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """NOT_FOUND when the worker that had the run is dead. "Cannot tell" is RUNNING: anything else would fail it.

        A worker that has written its end is dead at once. One whose heartbeat is old is so only after a long time,
        because it may lack nothing but the database; if it is dead, the run's message comes again, and whoever gets it
        takes the run over much sooner. Does not wait. Before it answers NOT_FOUND it takes the claim from the dead
        worker, so that no other one takes the run over while monitoring resumes or fails it.
        """
        if run.status in FINISHED_STATUSES:
            succeeded = run.status is DagsterRunStatus.SUCCESS
            status = WorkerStatus.SUCCESS if succeeded else WorkerStatus.FAILED
            return CheckRunHealthResult(status, f"the run is {run.status.value}")
        try:
            owner = self._claims().owner(run.run_id, without_message=True)
            if owner is None:
                return CheckRunHealthResult(WorkerStatus.RUNNING, "waiting in its queue for a worker")
            if owner.in_doubt:
                return CheckRunHealthResult(
                    WorkerStatus.RUNNING, f"cannot tell yet: the heartbeat of worker {owner.worker_id} is old"
                )
            if owner.alive:
                return CheckRunHealthResult(
                    WorkerStatus.RUNNING, f"worker {owner.worker_id} is alive", run_worker_id=owner.worker_id
                )
            return self._give_up(run.run_id, owner)
        except Exception as error:  # noqa: BLE001 - whatever the storage raises, a healthy run must not die of it
            return CheckRunHealthResult(WorkerStatus.RUNNING, f"cannot tell: {error!r}")

    def _give_up(self, run_id: str, owner: Owner) -> CheckRunHealthResult:
        """Of a run whose worker is dead."""
        run = self._instance.get_run_by_id(run_id)  # monitoring's own is as old as its round
        if run is not None and own_tags(run).get(TASK_ID_TAG) != owner.claim.task_id:
            # One that monitoring has resumed is not to be resumed, or given up, once more before anybody had it.
            return CheckRunHealthResult(
                WorkerStatus.RUNNING, f"worker {owner.worker_id} is dead; waiting for another one"
            )
        if not self._claims().give_up(run_id, owner.claim):
            return CheckRunHealthResult(WorkerStatus.RUNNING, "another worker has just taken it over")
        return CheckRunHealthResult(
            WorkerStatus.NOT_FOUND, f"worker {owner.worker_id} is dead", run_worker_id=owner.worker_id
        )

    @_in_time
    def get_run_worker_debug_info(self, run: DagsterRun, include_container_logs: bool | None = True) -> str | None:
        """Task id, queue and worker of the run, in words, and what it waits for.

        Dagster shows it where a run has not started in time. `include_container_logs` is Dagster's; we have none.
        """
        owner = self._owner(run.run_id)
        if owner is None:
            worker = f"none yet; {describe_wait(self._instance, self.settings, run.run_id)}"
        else:
            worker = f"{owner.worker_id} ({'alive' if owner.alive else 'dead; waiting for another one'})"
        task_id = own_tags(run).get(TASK_ID_TAG, "unknown")
        queue_url = self.settings.of_route(route_of_run(run)).queue_url
        return f"Taskiq task {task_id} on queue {queue_url}; worker: {worker}"

    def dispose(self) -> None:
        """Close the client and its thread."""
        self._producer.close()

    def _claims(self) -> Claims:
        """One object for all looks: it remembers which workers it has seen late."""
        if self._known_claims is None:
            self._known_claims = Claims.of(self._instance, self.settings)
        return self._known_claims

    def _owner(self, run_id: str) -> Owner | None:
        return self._claims().owner(run_id)

    def _append(self, run: DagsterRun, event: engine_events.EngineEvent) -> None:
        try:
            append_event(self._instance, run, event)
        except Exception:
            logger.exception("engine event could not be written", extra={"run_id": run.run_id})


CONFIG_FIELDS: Final[Mapping[str, Any]] = {
    key: Field(Any_, is_required=False, description=description)
    for key, description in {
        "queue_url": "URL of the work queue; those of the steps queue and the cancel queue are derived from it.",
        "region_name": "AWS region of the queues.",
        "endpoint_url": "Another SQS endpoint than AWS's own: an emulator, a VPC endpoint.",
        "config_source": "All other settings; see docs/reference/settings.md.",
    }.items()
}
"""Launcher and executor take the same keys. `Settings` checks the values, with one text for every way in."""
