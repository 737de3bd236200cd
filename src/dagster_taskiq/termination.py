"""How a run is terminated: its message, its status, its tags, and what its log says of them; one or many.

Knows runs, claims and the producer of messages; not who asks. The order of what it does, and why: docs/decisions/002.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq._text import clean_text
from dagster_taskiq.cancellation.model import CancelOutcome
from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR, asked
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.run_monitoring import limit_of_monitoring
from dagster_taskiq.dagster_compat.storage import remove_run_tags
from dagster_taskiq.errors import QueueUnreachable
from dagster_taskiq.metrics import REQUESTED, Metrics
from dagster_taskiq.settings import Settings
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.routing import route_of_run
from dagster_taskiq.storage.status_repair import repair_late_canceling, restore, terminal_events
from dagster_taskiq.storage.tags import (
    CANCEL_FENCE_TAG,
    CANCEL_REASON_TAG,
    CANCELLED_BY_TAG,
    TASK_ID_TAG,
    TIMED_OUT_TAG,
    add_own_tags,
    own_tags,
)
from dagster_taskiq.storage.time_limits import TimeLimit
from dagster_taskiq.tasks.producer import Producer, result_of

if TYPE_CHECKING:
    from dagster_taskiq.cancellable_broker import CancellableSQSBroker

logger = logging.getLogger(__name__)

BEFORE_START: Final = frozenset({DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING})
_MONITORING: Final = "Dagster's run monitoring"
_HEAD_START_S: Final = 0.05
_T = TypeVar("_T")


class Termination:
    """Terminates runs of one launcher. All calls block, on the database above all."""

    def __init__(
        self, instance: DagsterInstance, settings: Settings, producer: Producer[Any], metrics: Metrics, claims: Claims
    ) -> None:
        self._instance = instance
        self._settings = settings
        self._producer = producer
        self._metrics = metrics
        self._claims = claims

    def cancel(
        self, run: DagsterRun | None, reason: str | None, requested_by: str, request: "Future[None] | None" = None
    ) -> CancelOutcome:
        """As `TaskiqRunLauncher.request_cancel`. `request`: the message, if it has been sent."""
        if run is None or run.status in FINISHED_STATUSES:
            return CancelOutcome.NOTHING
        if not self._settings.enable_cancellation:
            self._append(run, engine_events.cancellation_disabled())
            return CancelOutcome.SWITCHED_OFF
        tags = own_tags(run)
        task_id = tags.get(TASK_ID_TAG)
        reason = clean_text(reason) if reason else tags.get(CANCEL_REASON_TAG)
        requested_by = clean_text(requested_by)
        late = self._limit_of_monitoring(run) if (requested_by, reason) == (UNKNOWN_AUTHOR, None) else None
        if late is not None:
            requested_by, reason = _MONITORING, late
        if task_id is None:
            self._keep_why(run, reason, requested_by)
            self._append(run, engine_events.no_task_id())
            if history := terminal_events(self._instance, run.run_id):
                # Withdrawn from the queue at the moment in which Dagster's daemon took it: it is not to end twice.
                restore(self._instance, run, history)
            else:
                self._instance.report_run_canceled(run, "Nothing that this launcher started can be working on the run.")
            return CancelOutcome.NOT_OURS
        return self._terminate(run, task_id, reason, requested_by, request)

    def end_at_fence(self, run: DagsterRun, fence_id: str, reason: str | None, requested_by: str) -> None:
        """End a run that is about to be launched, and is not."""
        add_own_tags(self._instance, run, {CANCEL_FENCE_TAG: fence_id})
        self._keep_why(run, reason, requested_by)
        self._append(run, engine_events.requested("none yet", reason, requested_by))
        asked_by = requested_by, reason
        self._instance.report_run_canceling(run, asked(engine_events.TERMINATING, *asked_by))
        self._instance.report_run_canceled(run, asked("Canceled before it was launched, at a fence.", *asked_by))

    def _limit_of_monitoring(self, run: DagsterRun) -> str | None:
        """In words which limit the run has exceeded, if run monitoring has marked it as CANCELING for that."""
        if run.status is not DagsterRunStatus.CANCELING:
            return None
        try:
            limit = limit_of_monitoring(self._instance, run)
        except Exception:  # whatever it is: the run is to be stopped, with or without a reason
            logger.exception("cannot look how long the run may take", extra={"run_id": run.run_id})
            return None
        return TimeLimit(*limit).exceeded("run") if limit is not None else None

    def _keep_why(self, run: DagsterRun, reason: str | None, requested_by: str) -> None:
        """In the run's tags, for workers that do not get the message, and for people."""
        known = own_tags(run)
        # Also where it is not known who it was: by that tag the run is CANCELED, whatever else stops it meanwhile.
        author = known.get(CANCELLED_BY_TAG) or requested_by if requested_by == UNKNOWN_AUTHOR else requested_by
        given = {CANCEL_REASON_TAG: reason, CANCELLED_BY_TAG: author}
        if requested_by == _MONITORING:
            given = {TIMED_OUT_TAG: known.get(TIMED_OUT_TAG) or reason}
        new = {tag: value for tag, value in given.items() if value and known.get(tag) != value}
        try:
            if requested_by != _MONITORING and TIMED_OUT_TAG in known:
                # Somebody wants it CANCELED, and it has not ended yet.
                remove_run_tags(self._instance, run.run_id, {TIMED_OUT_TAG})
            if new or known.keys() != run.tags.keys():
                add_own_tags(self._instance, run, new)
        except Exception:  # whatever it is: the run is to be stopped, with or without them
            logger.exception("tags could not be written", extra={"run_id": run.run_id})

    def _terminate(
        self, run: DagsterRun, task_id: str, reason: str | None, requested_by: str, request: "Future[None] | None"
    ) -> CancelOutcome:
        waiting = run.status in BEFORE_START
        # The message first: the worker that receives it does not need the status; but a queue that does not answer
        # must not keep the status from being written. Only a run that may not have a worker yet is looked at first,
        # so that no message is left behind.
        request = request or (None if waiting else self._ask(run, task_id, reason, requested_by))
        if request is not None:
            wait({request}, timeout=_HEAD_START_S)
        # Before the status: who reads that reads them with it.
        self._keep_why(run, reason, requested_by)
        if run.status is not DagsterRunStatus.CANCELING:
            self._instance.report_run_canceling(run, asked(engine_events.TERMINATING, requested_by, reason))
            # It may have ended in between: the transition is unguarded, and nobody else would ever finish it.
            if (over := repair_late_canceling(self._instance, run.run_id)) is not None:
                if over is not DagsterRunStatus.CANCELED:
                    return CancelOutcome.NOTHING
                if request is not None and _is_sent(request):
                    # Our own message can have been that quick.
                    self._note_request(run, task_id, reason, requested_by)
                return CancelOutcome.ASKED
        if waiting and self._is_unclaimed(run.run_id):
            # Status written, then the claims read: a worker that claims from now on reads CANCELING.
            if reason or requested_by != UNKNOWN_AUTHOR:
                self._append(run, engine_events.requested(task_id, reason, requested_by))
            self._instance.report_run_canceled(
                run, asked("Canceled before a worker had picked it up.", requested_by, reason)
            )
            return CancelOutcome.WITHDRAWN
        outcome = CancelOutcome.ASKED
        try:
            result_of(request or self._ask(run, task_id, reason, requested_by))
        except Exception as error:  # noqa: BLE001 - whatever it is, the status is written, and the run will be stopped
            outcome = CancelOutcome.MARKED
            self._append(
                run, engine_events.request_failed(str(error) or repr(error), self._settings.status_poll_seconds)
            )
            self._metrics.count(REQUESTED)
        else:
            self._note_request(run, task_id, reason, requested_by)
        self._note_dead_worker(run)
        return outcome

    def _note_request(self, run: DagsterRun, task_id: str, reason: str | None, requested_by: str) -> None:
        self._append(run, engine_events.requested(task_id, reason, requested_by))
        self._metrics.count(REQUESTED)

    def _note_dead_worker(self, run: DagsterRun) -> None:
        """Say in the run's log what its cancellation waits for, if its worker does not live."""
        try:
            owner = self._claims.owner(run.run_id)
        except Exception:
            logger.exception("cannot look for the run's worker", extra={"run_id": run.run_id})
            return
        if owner is not None and (owner.in_doubt or not owner.alive):
            self._append(run, engine_events.waiting_for_takeover(owner.worker_id, dead=not owner.alive))

    def _ask(self, run: DagsterRun, task_id: str, reason: str | None, requested_by: str) -> "Future[None]":
        return self._submit(
            lambda broker: broker.cancel_task(
                task_id,
                reason=reason,
                requested_by=requested_by,
                status_follows=True,
                timed_out=requested_by == _MONITORING,
            ),
            route_of_run(run),
        )

    def _submit(self, request: "Callable[[CancellableSQSBroker], Awaitable[_T]]", route: str) -> "Future[_T]":
        try:
            return self._producer.submit(request, route=route)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run's status can still be written
            failed: Future[_T] = Future()
            failed.set_exception(error)
            return failed

    def ask_together(
        self, runs: Iterable[DagsterRun], reason: str | None, requested_by: str
    ) -> "dict[str, Future[None]]":
        """Send the messages of those that have a worker, as `_terminate` does it. By run: that its own was sent."""
        reason, requested_by = clean_text(reason) if reason else None, clean_text(requested_by)
        groups: dict[tuple[str, str | None], dict[str, Future[None]]] = {}
        sent: dict[str, Future[None]] = {}
        for run in runs if self._settings.enable_cancellation else ():
            task_id = own_tags(run).get(TASK_ID_TAG)
            if task_id is not None and run.status not in {*BEFORE_START, *FINISHED_STATUSES}:
                why = reason or own_tags(run).get(CANCEL_REASON_TAG)
                sent[run.run_id] = groups.setdefault((route_of_run(run), why), {})[task_id] = Future()
        for (route, why), group in groups.items():
            request = self._submit(partial(_cancel_tasks, task_ids=[*group], reason=why, by=requested_by), route)
            request.add_done_callback(partial(_answer, group))
        return sent

    def _is_unclaimed(self, run_id: str) -> bool:
        """Whether no worker has it. False when that cannot be read: a worker that may have it is told."""
        try:
            return self._claims.owner(run_id) is None
        except Exception:
            logger.exception("cannot look for the run's worker", extra={"run_id": run_id})
            return False

    def _append(self, run: DagsterRun, event: engine_events.EngineEvent) -> None:
        try:
            append_event(self._instance, run, event)
        except Exception:
            logger.exception("engine event could not be written", extra={"run_id": run.run_id})


def _is_sent(request: "Future[None]") -> bool:
    return request.done() and not request.cancelled() and request.exception() is None


async def _cancel_tasks(
    broker: "CancellableSQSBroker", task_ids: Sequence[str], reason: str | None, by: str
) -> Mapping[str, str]:
    report = await broker.cancel_tasks(task_ids, reason=reason, requested_by=by, status_follows=True)
    return report.failed


def _answer(asked: "Mapping[str, Future[None]]", request: "Future[Mapping[str, str]]") -> None:
    """Each of them that was in that request has its own answer."""
    error = CancelledError() if request.cancelled() else request.exception()
    failed = {} if error is not None else request.result()
    for task_id, future in asked.items():
        if error is not None:
            future.set_exception(error)
        elif task_id in failed:
            future.set_exception(QueueUnreachable(failed[task_id]))
        else:
            future.set_result(None)
