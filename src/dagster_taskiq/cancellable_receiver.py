"""taskiq's receiver, made cancellable: one asyncio task per piece of work, every message settled exactly once.

Knows taskiq and leases; receives cancels through a `CancelListener`. Knows no Dagster and no processes.
Usable as it is: `taskiq worker module:broker --receiver dagster_taskiq.cancellable_receiver:CancellableReceiver`.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from contextlib import suppress
from logging import getLogger
from typing import Any

from taskiq import AckableMessage, TaskiqMessage, TaskiqResult
from taskiq.acks import AckController, AcknowledgeType
from taskiq.receiver import Receiver
from taskiq.receiver.receiver import _PrefetchedMessage, _QueueSignal, _StartedCallback

from dagster_taskiq._log_context import log_context
from dagster_taskiq._shield import shielded
from dagster_taskiq.cancellable_broker import CancellableSQSBroker, LeasedMessage, settling
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.errors import CleanupFailed, QueueUnreachable
from dagster_taskiq.sqs.lease import Settle
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.sqs.unusable import LONGEST_PAUSE_S
from dagster_taskiq.tasks.cancel_listener import CancelListener, Cancels
from dagster_taskiq.tasks.held_cancels import HeldCancels
from dagster_taskiq.tasks.middleware import CancellationEvent, Stage, notify_all
from dagster_taskiq.tasks.predicates import TaskView
from dagster_taskiq.tasks.receiver_hooks import ReceiverHooks as ReceiverHooks
from dagster_taskiq.tasks.running_task import CURRENT_TASK, CancelledIsNoError, RunningTask, cancelled_result
from dagster_taskiq.tasks.running_tasks import RunningTasks
from dagster_taskiq.tasks.slots import Slots
from dagster_taskiq.tasks.standing_cancels import StandingCancels

logger = getLogger(__name__)

_Queue = asyncio.Queue[_PrefetchedMessage | _QueueSignal]
_SHUTDOWN = "the worker stops"
_LOOK_UP_S = 0.5
_LATER_THAN_VISIBLE = 4 / 3
"""The share of the visibility timeout after which the work of a dead worker has come again."""
getLogger("taskiq.receiver.receiver").addFilter(CancelledIsNoError())


class CancellableReceiver(Receiver):
    """Receives work, listens to cancels, settles messages."""

    def __init__(
        self,
        *args: Any,
        hooks: ReceiverHooks | None = None,
        tasks: RunningTasks | None = None,
        listener: Cancels | None = None,
        **kwargs: Any,
    ) -> None:
        """`tasks` and `listener`: shared with other receivers of this worker, which runs the listener itself.

        Without them the receiver has its own.
        """
        super().__init__(*args, **kwargs)
        self.hooks = hooks or ReceiverHooks()
        if self.sem is not None and isinstance(self.broker, CancellableSQSBroker):
            slots = self.sem_prefetch = Slots(self.sem_prefetch)
            # The one for which it is asked is taken already. Nobody else takes any, so these stay free.
            self.broker.free_slots = lambda: 1 + slots.free
        self.listening = asyncio.Event()
        """Set when work and cancels are being received."""
        self.tasks = tasks if tasks is not None else RunningTasks()
        """The work of this worker by task id, from receipt until settled."""
        self._shared_listener = listener
        self._listener: Cancels | None = listener
        self._mine: set[RunningTask] = set()
        self._callbacks: set[asyncio.Task[Any]] = set()
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._finish: asyncio.Event | None = None

    async def stop_running(self, cancellation: Cancellation) -> None:
        """Cancel all work of this receiver and wait until it is settled.

        To keep more from coming, set the finish event first.
        """
        for task in list(self._mine):
            task.cancel(cancellation)
        await asyncio.sleep(0)  # callbacks that were only just created register themselves
        callbacks, tasks = set(self._callbacks), list(self._mine)
        for task in tasks:
            task.cancel(cancellation)
        if callbacks:
            await asyncio.wait(callbacks)
        for task in tasks:
            await task.settled.wait()

    # Listening

    async def listen(self, finish_event: asyncio.Event) -> None:
        """Work until the finish event is set and the running work is settled; listen to cancels all the while."""
        if self.run_startup:
            await self.broker.startup()
            self.run_startup = False  # the base must not do it again
            await self._check_queues()
        self._finish, broker = finish_event, self.broker
        helpers: set[asyncio.Task[None]] = set()
        if self._shared_listener is None and isinstance(broker, CancellableSQSBroker) and broker.enable_cancellation:
            self._listener = CancelListener(
                broker,
                self.tasks,
                cancel_ttl_s=self.hooks.cancel_ttl_s,
                is_over=self.hooks.is_over,
                held=HeldCancels(broker.lease_of_cancel),
                standing=StandingCancels(broker.predicates),
                comes_back_s=broker.visibility_timeout_s * _LATER_THAN_VISIBLE,
            )
            helpers.add(asyncio.create_task(self._listener.run(), name="listen to cancels"))
        working = asyncio.create_task(super().listen(finish_event), name="receive work")
        try:
            # Waking now and then lets the loop notice a finish event that was set by a signal handler.
            while not any(task.done() for task in (working, *helpers)):
                await asyncio.wait({working, *helpers}, timeout=_LOOK_UP_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed = [task for task in helpers if task.done()]
            await shielded(self._wind_up(working, helpers), name="wind up")
            self._listener = self._shared_listener
        for task in failed:
            task.result()
        working.result()

    async def _check_queues(self) -> None:
        if isinstance(self.broker, CancellableSQSBroker):
            with suppress(QueueUnreachable):  # that passes; what is missing or forbidden does not
                await self.broker.check_queues()

    async def _wind_up(self, working: "asyncio.Task[None]", helpers: "set[asyncio.Task[None]]") -> None:
        # In this order: nothing new, nothing running, and cancels are received until then.
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
        await self.stop_running(Cancellation(CancelKind.SHUTDOWN, cause=_SHUTDOWN))
        for task in (*helpers, *self._side_tasks):
            task.cancel()
        if helpers or self._side_tasks:
            await asyncio.wait({*helpers, *self._side_tasks})

    async def prefetcher(self, queue: _Queue, finish_event: asyncio.Event) -> None:
        """Receive work, but claim nothing before cancels are listened to."""
        if self._listener is not None:
            await self._listener.listening.wait()
        self.listening.set()
        await super().prefetcher(queue, finish_event)
        if finish_event.is_set():
            await shielded(self._hand_back_queued(queue), name="hand back queued work")

    async def _discard_queued_messages(self, queue: _Queue) -> None:
        await self._hand_back_queued(queue)
        await super()._discard_queued_messages(queue)

    async def _hand_back_queued(self, queue: _Queue) -> None:
        queued = [queue.get_nowait() for _ in range(queue.qsize())]
        messages = [entry for entry in queued if isinstance(entry, _PrefetchedMessage)]
        for entry in queued:
            if isinstance(entry, _QueueSignal):
                queue.put_nowait(entry)
        for message in messages:
            if message.owns_delivery_slot:
                self.sem_prefetch.release()
        await asyncio.gather(*[settling(message.data)(Settlement.HAND_BACK) for message in messages])

    def _start_callback(self, message: _PrefetchedMessage, *, owns_execution_slot: bool) -> _StartedCallback:
        started = super()._start_callback(message, owns_execution_slot=owns_execution_slot)
        self._callbacks.add(started.task)
        started.task.add_done_callback(self._callback_ended)
        return started

    def _callback_ended(self, callback: "asyncio.Task[Any]") -> None:
        self._callbacks.discard(callback)
        if not callback.cancelled() and (error := callback.exception()) is not None:
            # Nobody else looks at it. The worker goes on: its other work is not to suffer.
            logger.error("a message could not be seen through", exc_info=error)

    # One message

    async def callback(self, message: bytes | AckableMessage, raise_err: bool = False) -> None:
        """Carry one message through: from receipt to exactly one settlement."""
        parsed = self._parsed(message)
        if isinstance(parsed, str):
            await settling(message)(*self._unusable(message, parsed))
            return
        task_id, describe = parsed.task_id, self.hooks.describe
        facts = describe(parsed) if describe is not None else {}
        with log_context(task_id=task_id, **facts):
            if isinstance(message, LeasedMessage):
                message.lease.about = {"task_id": task_id, **facts}
            await self._callback(parsed, message, raise_err=raise_err)

    async def _callback(self, parsed: TaskiqMessage, message: bytes | AckableMessage, *, raise_err: bool) -> None:
        task_id, settle = parsed.task_id, settling(message)
        earlier = self.tasks.get(task_id)
        if earlier is not None and earlier.over:
            # A retry has the id of the first try, and may come before that is settled.
            await earlier.settled.wait()
        if self._finish is not None and self._finish.is_set():
            await settle(Settlement.HAND_BACK)
        elif task_id in self.tasks:
            logger.warning("task runs here already; its second message is handed back", extra={"task_id": task_id})
            await settle(Settlement.HAND_BACK, int(getattr(self.broker, "visibility_timeout_s", 0)))
        else:
            await self._carry_through(parsed, message, settle, raise_err=raise_err)

    def _parsed(self, message: bytes | AckableMessage) -> TaskiqMessage | str:
        """The message, or why it is of no use here: it is unreadable, or its task unknown."""
        body = message.data if isinstance(message, AckableMessage) else message
        try:
            parsed = self.broker.formatter.loads(message=body)
            parsed.parse_labels()
            self._get_ack_time(parsed)
        except Exception as error:  # noqa: BLE001  whatever a stranger wrote is no reason for the worker to fail
            return f"unreadable ({error})"
        if self.broker.find_task(parsed.task_name) is None:
            return f"task {parsed.task_name!r} is not known here; is its module imported?"
        return parsed

    def _unusable(self, message: bytes | AckableMessage, why: str, longest_s: int = LONGEST_PAUSE_S) -> Settled:
        """It is to come again, the later the more often it came."""
        if isinstance(message, LeasedMessage) and isinstance(self.broker, CancellableSQSBroker):
            pause_s = self.broker.unusable.add(message.message_id, why, message.receive_count, longest_s)
            return Settled(Settlement.HAND_BACK, pause_s)
        logger.warning("work message is left to expire: %s", why[:200])
        return Settled(Settlement.LEAVE)

    async def _carry_through(
        self, parsed: TaskiqMessage, message: bytes | AckableMessage, settle: Settle, *, raise_err: bool
    ) -> None:
        task_id = parsed.task_id
        leased = message if isinstance(message, LeasedMessage) else None
        sent_at = leased.sent_at if leased is not None else 0.0
        task = RunningTask(
            task_id,
            settle=settle,
            receive_count=leased.receive_count if leased is not None else 1,
            sent_at=sent_at,
            queue_url=leased.queue_url if leased is not None else "",
            view=TaskView.of(parsed, sent_at) if not self.hooks.tasks_await_signal else None,
            awaits_signal=self.hooks.tasks_await_signal,
            on_cancelled=self._delivered,
            on_unusable=functools.partial(self._unusable, message),
        )
        self.tasks.add(task)
        self._mine.add(task)
        if leased is not None:
            leased.lease.when_lost(lambda: self._on_lost(task))
        body = message.data if isinstance(message, AckableMessage) else message
        try:
            await self._cancel_ahead(task)
            with task.entered():
                async with task.saved_in_time():
                    await super().callback(AckableMessage(data=body, ack=task.acknowledge), raise_err)
        except Exception:
            # A middleware failed, perhaps the one that was to send the task again: let it be delivered again.
            task.acknowledges_itself = True
            logger.exception("task could not be carried through", extra={"task_id": task_id})
            if raise_err:
                raise
        finally:
            await shielded(self._conclude(task, leased), name=f"conclude {task_id}")

    async def _conclude(self, task: RunningTask, leased: LeasedMessage | None) -> None:
        try:
            await task.settle()
        finally:
            gone = leased.lease.deleted if leased is not None else task.verdict().settlement is Settlement.DELETE
            over = self.tasks.remove(task, comes_again=not gone)
            self._mine.discard(task)
            try:
                if self._listener is not None:
                    await self._listener.settled(task.task_id, over=over)
            finally:
                task.settled.set()  # whatever has failed: the next try waits for it, and whoever stops the worker

    async def _cancel_ahead(self, task: RunningTask) -> None:
        """If its cancel has come before it, it is not to begin."""
        listener = self._listener
        if listener is None:
            return
        ahead = listener.cancelled_ahead(task.task_id, task.view)
        if ahead is None and task.receive_count > 1:
            # Whoever had it may have died, and had its cancel, too.
            await listener.look()
            ahead = listener.cancelled_ahead(task.task_id, task.view)
        if ahead is not None:
            task.cancel(ahead)

    def _delivered(self, task: RunningTask, cancellation: Cancellation) -> None:
        if self.hooks.on_delivered is not None:
            self.hooks.on_delivered(cancellation)
        self._notify_later("delivered", task, cancellation)

    def _notify_later(self, stage: Stage, task: RunningTask, cause: Cancellation) -> None:
        name = task.message.task_name if task.message is not None else None
        task.telling = self._beside(self._notify(stage, task.task_id, cause, name), name=f"notify of {task.task_id}")

    def _on_lost(self, task: RunningTask) -> None:
        self._beside(self._lease_lost(task), name=f"lease lost of {task.task_id}")

    def _beside(self, work: Coroutine[Any, Any, None], *, name: str) -> "asyncio.Task[None]":
        side_task = asyncio.create_task(work, name=name)
        self._side_tasks.add(side_task)
        side_task.add_done_callback(self._side_tasks.discard)
        return side_task

    async def _lease_lost(self, task: RunningTask) -> None:
        try:
            if self.hooks.still_ours is not None and await self.hooks.still_ours(task.task_id):
                logger.warning("lease lost, but the work is still ours", extra=task.about)
                return
        except Exception:  # what is not known to be ours must not go on as if it were
            logger.exception("could not find out whether work is still ours", extra=task.about)
        task.cancel(Cancellation(CancelKind.LEASE_LOST, cause="lease lost", channel=CancelChannel.LEASE))

    async def run_task(
        self, target: Callable[..., Any], message: TaskiqMessage, ack_controller: AckController | None = None
    ) -> TaskiqResult[Any]:
        """Run the task function in an asyncio task of its own, which alone is what a cancellation cancels."""
        task = CURRENT_TASK.get(None)
        if task is None:
            return await super().run_task(target, message, ack_controller)
        task.attach(message)
        task.may_have_begun(target)
        task.acknowledges_itself = self._get_ack_time(message) is AcknowledgeType.MANUAL
        if task.dropped:
            result = cancelled_result(message)
        else:
            observed = task.observed(target, self.executor)
            inner = asyncio.create_task(
                super().run_task(observed, message, ack_controller), name=f"task {message.task_id}"
            )
            task.begin(inner)
            result = await self._result_of(inner, task, message)
        task.end(succeeded=not result.is_err)
        if task.cancellation is not None:
            result = await self._after_cancellation(task, message, result)
        else:
            result = task.visible_result(result)
        task.saves()
        return result

    async def _after_cancellation(
        self, task: RunningTask, message: TaskiqMessage, result: TaskiqResult[Any]
    ) -> TaskiqResult[Any]:
        """Run its cleanup handlers, unless it has finished its work all the same; notify the middlewares of the end."""
        failures: tuple[str, ...] = ()
        if task.handlers and result.is_err:
            failures = await shielded(task.clean_up(), name=f"clean up {task.task_id}")
        result = task.visible_result(result)
        if failures:
            result.error = CleanupFailed(failures)
        cause = task.cancellation
        if task.telling is not None:
            await asyncio.wait({task.telling})  # nobody hears of the end first
        if cause is not None:
            error = result.error if result.is_err else None
            await self._notify("finished", task.task_id, cause, message.task_name, error)
        return result

    async def _notify(
        self,
        stage: Stage,
        task_id: str,
        cause: Cancellation,
        task_name: str | None,
        error: BaseException | None = None,
    ) -> None:
        event = CancellationEvent(stage, task_id, cause.kind, cause.reason, cause.requested_by, task_name, error)
        listeners = self.broker.listeners_of(task_name) if isinstance(self.broker, CancellableSQSBroker) else ()
        await notify_all(self.broker.middlewares, event, listeners)

    async def _result_of(
        self, inner: "asyncio.Task[TaskiqResult[Any]]", task: RunningTask, message: TaskiqMessage
    ) -> TaskiqResult[Any]:
        interrupted: asyncio.CancelledError | None = None
        while not inner.done():
            try:
                await asyncio.wait({inner})
            except asyncio.CancelledError as error:  # the loop is torn down; the work is not left behind
                interrupted = error
                task.cancel(Cancellation(CancelKind.SHUTDOWN, cause=_SHUTDOWN))
        result = cancelled_result(message) if inner.cancelled() else inner.result()
        if interrupted is not None:
            task.end(succeeded=not result.is_err)
            raise interrupted
        return result
