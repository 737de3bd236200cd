"""Ask for cancellations: of one task, of many, of all that belong together. The sending side of a broker.

Knows the cancel queue, what is asked for, and where results are; not who runs the tasks.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar, overload

from taskiq import AsyncResultBackend, TaskiqMiddleware

from dagster_taskiq.errors import AccessDenied, DagsterTaskiqError
from dagster_taskiq.messages import StandingCancel, is_task_id
from dagster_taskiq.sqs.admin import CANCEL_RETENTION_S
from dagster_taskiq.sqs.errors import is_missing_permission
from dagster_taskiq.sqs.queue import SQSQueue
from dagster_taskiq.tasks.cancel_queue import CancelQueue
from dagster_taskiq.tasks.cancel_report import Results, TaskCancelOutcome, TaskCancelReport
from dagster_taskiq.tasks.middleware import CancellableTask, CancellationEvent, Listener, notify_all
from dagster_taskiq.tasks.predicates import Predicate, Predicates

_P = TypeVar("_P", bound=Predicate)
_L = TypeVar("_L", bound=Listener)


class Canceller:
    """A part of `CancellableSQSBroker`."""

    cancel_queue_url: str
    enable_cancellation: bool
    middlewares: list[TaskiqMiddleware]
    result_backend: AsyncResultBackend[Any]
    predicates: Predicates
    cancelled_listeners: list[Listener]
    find_task: Any
    _cancel_queue: SQSQueue
    _cancels: CancelQueue

    async def cancel_task(
        self,
        task_id: str,
        *,
        reason: str | None = None,
        requested_by: str | None = None,
        status_follows: bool = False,
        timed_out: bool = False,
    ) -> None:
        """Ask whichever worker runs the task to cancel it. Raises a `DagsterTaskiqError` when that cannot be sent.

        `status_follows`: the caller also marks the task's run as CANCELING, so its worker may wait for that.
        `timed_out`: it is to end because it took too long: its token says DEADLINE, and a run whose tags say the same
        is a FAILURE.
        """
        self._require_cancellation()
        # Notified as it is sent: a worker may be quick, and nobody should learn of the delivery first.
        await asyncio.gather(
            self._notify([task_id], reason, requested_by),
            self._cancels.send(task_id, reason, requested_by, status_follows=status_follows, timed_out=timed_out),
        )

    async def cancel_tasks(
        self,
        task_ids: Iterable[str],
        *,
        reason: str | None = None,
        requested_by: str | None = None,
        wait_s: float = 0.0,
        status_follows: bool = False,
        timed_out: bool = False,
    ) -> TaskCancelReport:
        """Cancel many, ten to a request, and tell what became of each. What fails does not stop the rest.

        Those that have a result already are not sent. `wait_s`: for so many seconds it waits for the results of the
        others, and reads them; without that, and without taskiq's result backend, it only knows what was sent.
        `status_follows` and `timed_out`: as in `cancel_task`, of all of them.
        """
        self._require_cancellation()
        wanted, results = list(dict.fromkeys(task_ids)), Results(self.result_backend)
        finished = await results.there(task_id for task_id in wanted if is_task_id(task_id))
        asked = [task_id for task_id in wanted if task_id not in finished]
        _, failed = await asyncio.gather(
            self._notify(asked, reason, requested_by),
            self._cancels.send_all(asked, reason, requested_by, status_follows=status_follows, timed_out=timed_out),
        )
        sent = tuple(task_id for task_id in asked if task_id not in failed)
        unknown = TaskCancelOutcome.UNKNOWN if results.are_kept else TaskCancelOutcome.NO_RESULTS
        outcomes = {
            **dict.fromkeys(wanted, unknown),
            **dict.fromkeys(finished, TaskCancelOutcome.FINISHED),
            **dict.fromkeys(failed, TaskCancelOutcome.NOT_SENT),
        }
        if results.are_kept and wait_s > 0:
            outcomes |= await results.outcomes(sent, wait_s)
        return TaskCancelReport(sent, failed, outcomes)

    @overload
    def predicate(self, predicate: _P) -> _P: ...

    @overload
    def predicate(self, *, name: str | None = None) -> Callable[[_P], _P]: ...

    def predicate(self, predicate: _P | None = None, *, name: str | None = None) -> _P | Callable[[_P], _P]:
        """Decorator: make a function known to `cancel_where`, here and on every worker that imports its module.

        It is called in a worker's event loop, so it has to be quick, with a `TaskView` and the arguments that
        `cancel_where` was given. `name`: default: its module and name, as for tasks. Raises `ValueError` for what
        others could not find.
        """

        def register(one: _P) -> _P:
            self.predicates.add(one, name)
            return one

        return register if predicate is None else register(predicate)

    def on_task_cancelled(self, listener: _L) -> _L:
        """Decorator: have it called when any task was cancelled because somebody asked for it.

        It is called with a `CancellationEvent` in the worker that had the task, also when it did not begin; after its
        cleanup handlers, before its result is stored. A coroutine function is awaited, a function is called in a
        thread. What it raises is logged; after ten seconds it is not waited for.
        """
        self.cancelled_listeners.append(listener)
        return listener

    def listeners_of(self, task_name: str | None) -> list[Listener]:
        """Of all tasks, and of this one (`@task.on_cancelled`)."""
        task = self.find_task(task_name) if task_name is not None else None
        return [*self.cancelled_listeners, *(task.listeners if isinstance(task, CancellableTask) else ())]

    async def cancel_group(
        self, group: str, *, reason: str | None = None, requested_by: str | None = None, ttl_s: float | None = None
    ) -> StandingCancel:
        """Cancel all tasks with the label `group` of that value that were sent before, whether they wait or run.

        `ttl_s`: for so many seconds a task that still waits is dropped when a worker receives it; default, and the
        most, is for how long the cancel queue keeps messages. Raises a `DagsterTaskiqError` when it cannot be sent.
        """
        return await self._stand(StandingCancel("group", group, {}, reason, requested_by, time.time(), ttl_s))

    async def cancel_type(
        self, task: object, *, reason: str | None = None, requested_by: str | None = None, ttl_s: float | None = None
    ) -> StandingCancel:
        """The same for all tasks of one kind: a task function, or its name."""
        name = str(getattr(task, "task_name", task))
        return await self._stand(StandingCancel("task_name", name, {}, reason, requested_by, time.time(), ttl_s))

    async def cancel_where(
        self,
        predicate: Predicate | str,
        /,
        *,
        reason: str | None = None,
        requested_by: str | None = None,
        ttl_s: float | None = None,
        **arguments: Any,
    ) -> StandingCancel:
        """The same for all tasks for which a registered `predicate` is true; `arguments` of it have to be JSON.

        Raises `ValueError` when this broker does not know it.
        """
        name = self.predicates.name_of(predicate)
        return await self._stand(StandingCancel("predicate", name, arguments, reason, requested_by, time.time(), ttl_s))

    async def _stand(self, request: StandingCancel) -> StandingCancel:
        self._require_cancellation()
        try:
            kept_s = await self._cancel_queue.retention_s()
        except AccessDenied as error:
            if not is_missing_permission(error):
                raise
            kept_s = CANCEL_RETENTION_S
        ttl_s = kept_s if request.ttl_s is None else request.ttl_s
        if ttl_s > kept_s:
            raise DagsterTaskiqError(
                f"ttl_s={ttl_s:g}: {self.cancel_queue_url} keeps messages for {kept_s} s;"
                " raise its MessageRetentionPeriod, or lower ttl_s"
            )
        request = replace(request, ttl_s=ttl_s)
        await self._cancels.send_standing(request)
        return request

    async def _notify(self, task_ids: Iterable[str], reason: str | None, requested_by: str | None) -> None:
        if self.middlewares:
            events = [CancellationEvent("requested", one, reason=reason, requested_by=requested_by) for one in task_ids]
            await asyncio.gather(*[notify_all(self.middlewares, event) for event in events])

    def _require_cancellation(self) -> None:
        if not self.enable_cancellation:
            raise DagsterTaskiqError("cancellation is disabled; set enable_cancellation to true in the configuration")
