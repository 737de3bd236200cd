"""taskiq's receiver, made cancellable: one asyncio task per piece of work, every message settled exactly once.

Knows taskiq and leases; hears cancels through `cancel_listener`. Knows no Dagster and no processes. Usable as it is:
`taskiq worker module:broker --receiver dagster_taskiq.cancellable_receiver:CancellableReceiver`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from logging import getLogger
from types import MappingProxyType
from typing import Any

from taskiq import AckableMessage, TaskiqMessage, TaskiqResult
from taskiq.acks import AckController, AcknowledgeType
from taskiq.receiver import Receiver
from taskiq.receiver.receiver import _PrefetchedMessage, _QueueSignal, _StartedCallback

from dagster_taskiq._log_context import log_context
from dagster_taskiq._shield import shielded
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.cancellable_broker import CancellableSQSBroker, LeasedMessage, settling
from dagster_taskiq.cancellation.model import CancelChannel, CancelKind, Cancellation
from dagster_taskiq.errors import CleanupFailed, QueueUnreachable
from dagster_taskiq.sqs.lease import Settle
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.tasks.cancel_listener import CancelListener
from dagster_taskiq.tasks.middleware import CancellationEvent, Stage, notify_all
from dagster_taskiq.tasks.running_task import CURRENT, CancelledIsNoError, cancelled_result
from dagster_taskiq.tasks.running_task import RunningTask as RunningTask
from dagster_taskiq.tasks.running_task import current_work as current_work

logger = getLogger(__name__)

_Queue = asyncio.Queue[_PrefetchedMessage | _QueueSignal]
_SHUTDOWN = "the worker stops"
_LOOK_UP_S = 0.5
getLogger("taskiq.receiver.receiver").addFilter(CancelledIsNoError())


class CancellableReceiver(Receiver):
    """Receives work, hears cancels, settles messages. The attributes below may be set before `listen`."""

    start_cancelled_work: bool = False
    """Whether work that was cancelled before it began is started all the same, to look at its cancellation itself."""
    cancel_ttl_s: float = 120
    """A cancel message older than that, and still nobody's, is deleted."""
    is_over: Callable[[str], Awaitable[bool]] | None = None
    """Tells of a task id whether its work is known to be finished; lets cancels for nobody end early."""
    shared_listener: CancelListener | None = None
    """Who hears cancels for this receiver and others, and is run by whoever made it; None: it hears them itself."""
    when_delivered: Callable[[Cancellation], None] | None = None
    """Called when work that runs here is cancelled, by whatever channel; once."""
    describe: Callable[[TaskiqMessage], Mapping[str, str]] | None = None
    """What lines of the log about a task shall say beside its id."""
    still_ours: Callable[[str], Awaitable[bool]] | None = None
    """Asked when a lease is lost: is the work nevertheless ours, so that it should go on?"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hearing = asyncio.Event()
        self._running: dict[str, RunningTask] = {}
        self._callbacks: set[asyncio.Task[Any]] = set()
        self._side_tasks: set[asyncio.Task[None]] = set()
        self.finished: TTLCache[bool] = TTLCache(ttl_s=3_600)
        """Task ids under which nobody will ever work again."""
        self._unreadable: TTLCache[bool] = TTLCache()
        self._listener: CancelListener | None = None
        self._finish: asyncio.Event | None = None

    @property
    def running(self) -> Mapping[str, RunningTask]:
        """The work of this worker by task id, from receipt until settled."""
        return MappingProxyType(self._running)

    def cancel(self, task_id: str, cancellation: Cancellation) -> bool:
        """Cancel work that runs here. False: it does not."""
        running = self._running.get(task_id)
        if running is not None:
            running.cancel(cancellation)
        return running is not None

    async def stop_running(self, cancellation: Cancellation) -> None:
        """Cancel all work and wait until it is settled. To keep more from coming, set the finish event first."""
        for running in list(self._running.values()):
            running.cancel(cancellation)
        await asyncio.sleep(0)  # callbacks that were only just created register themselves
        callbacks, works = set(self._callbacks), list(self._running.values())
        for running in works:
            running.cancel(cancellation)
        if callbacks:
            await asyncio.wait(callbacks)
        for running in works:
            await running.settled.wait()

    # Listening

    async def listen(self, finish_event: asyncio.Event) -> None:
        """Work until the finish event is set and the running work is settled; hear cancels all the while."""
        if self.run_startup:
            await self.broker.startup()
            self.run_startup = False  # the base must not do it again
            await self._check_queues()
        self._finish = finish_event
        helpers: set[asyncio.Task[None]] = set()
        if self.shared_listener is not None:
            self._listener = self.shared_listener
        elif isinstance(self.broker, CancellableSQSBroker) and self.broker.enable_cancellation:
            self._listener = self._new_listener(self.broker)
            helpers.add(asyncio.create_task(self._listener.run(), name="hear cancels"))
        working = asyncio.create_task(super().listen(finish_event), name="receive work")
        try:
            # Waking now and then lets the loop notice a finish event that was set by a signal handler.
            while not any(task.done() for task in (working, *helpers)):
                await asyncio.wait({working, *helpers}, timeout=_LOOK_UP_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed = [task for task in helpers if task.done()]
            await shielded(self._wind_up(working, helpers), name="wind up")
            self._listener = None
        for task in failed:
            task.result()
        working.result()

    async def _check_queues(self) -> None:
        if isinstance(self.broker, CancellableSQSBroker):
            with suppress(QueueUnreachable):  # that passes; what is missing or forbidden does not
                await self.broker.check_queues()

    def _new_listener(self, broker: CancellableSQSBroker) -> CancelListener:
        return CancelListener(
            broker, self.cancel, finished=self.finished, cancel_ttl_s=self.cancel_ttl_s, is_over=self.is_over
        )

    async def _wind_up(self, working: "asyncio.Task[None]", helpers: "set[asyncio.Task[None]]") -> None:
        # In this order: nothing new, nothing running, and cancels are heard until then.
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
        await self.stop_running(Cancellation(CancelKind.SHUTDOWN, reason=_SHUTDOWN))
        for task in (*helpers, *self._side_tasks):
            task.cancel()
        if helpers or self._side_tasks:
            await asyncio.wait({*helpers, *self._side_tasks})

    async def prefetcher(self, queue: _Queue, finish_event: asyncio.Event) -> None:
        """Receive work, but claim nothing before cancels are heard."""
        if self._listener is not None:
            await self._listener.listening.wait()
        self.hearing.set()
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
        started.task.add_done_callback(self._callbacks.discard)
        return started

    # One message

    async def callback(self, message: bytes | AckableMessage, raise_err: bool = False) -> None:
        """Carry one message through: from receipt to exactly one settlement."""
        parsed = self._parsed(message)
        task_id = parsed.task_id if parsed is not None else None
        facts = self.describe(parsed) if parsed is not None and self.describe is not None else {}
        with log_context(task_id=task_id, **facts):
            if isinstance(message, LeasedMessage):
                message.lease.about = {"task_id": task_id, **facts}
            await self._callback(task_id, message, raise_err=raise_err)

    async def _callback(self, task_id: str | None, message: bytes | AckableMessage, *, raise_err: bool) -> None:
        settle = settling(message)
        earlier = self._running.get(task_id or "")
        if earlier is not None and earlier.over:
            # A retry has the id of the first try, and may come before that is settled.
            await earlier.settled.wait()
        if task_id is None:
            await settle(Settlement.LEAVE)
        elif self._finish is not None and self._finish.is_set():
            await settle(Settlement.HAND_BACK)
        elif task_id in self._running:
            logger.warning("task runs here already; its second message is handed back", extra={"task_id": task_id})
            await settle(Settlement.HAND_BACK, int(getattr(self.broker, "visibility_timeout_s", 0)))
        else:
            await self._carry_through(task_id, message, settle, raise_err=raise_err)

    def _parsed(self, message: bytes | AckableMessage) -> TaskiqMessage | None:
        """The message, or None when it is unreadable or its task unknown here: another worker may know better."""
        body = message.data if isinstance(message, AckableMessage) else message
        try:
            parsed = self.broker.formatter.loads(message=body)
            parsed.parse_labels()
            self._get_ack_time(parsed)
        except Exception as error:  # noqa: BLE001  whatever a stranger wrote is no reason for the worker to fail
            self._log_once(message, f"unreadable ({error})")
            return None
        if self.broker.find_task(parsed.task_name) is None:
            self._log_once(message, f"task {parsed.task_name!r} is not known here; is its module imported?")
            return None
        return parsed

    def _log_once(self, message: bytes | AckableMessage, text: str) -> None:
        key = message.message_id if isinstance(message, LeasedMessage) else str(hash(repr(message)))
        if self._unreadable.add(key, True):
            logger.warning("work message is left to expire: %s", " ".join(text.split())[:200])

    async def _carry_through(
        self, task_id: str, message: bytes | AckableMessage, settle: Settle, *, raise_err: bool
    ) -> None:
        receive_count = message.receive_count if isinstance(message, LeasedMessage) else 1
        running = RunningTask(
            task_id, receive_count=receive_count, settle=settle, start_cancelled=self.start_cancelled_work
        )
        if isinstance(message, LeasedMessage):
            running.sent_at = message.sent_at
        running.when_cancelled = lambda cause: self._delivered(running, cause)
        self._running[task_id] = running
        if isinstance(message, LeasedMessage):
            message.lease.when_lost(lambda: self._on_lost(running))
        ahead = self._listener.cancelled_ahead(task_id) if self._listener is not None else None
        if ahead is not None:
            running.cancel(ahead)
        body = message.data if isinstance(message, AckableMessage) else message
        token = CURRENT.set(running)
        try:
            await super().callback(AckableMessage(data=body, ack=running.acknowledge), raise_err)
        except Exception:
            # A middleware failed, perhaps the one that was to send the task again: let it be delivered again.
            running.unsettled_unless_told = True
            logger.exception("task could not be carried through", extra={"task_id": task_id})
            if raise_err:
                raise
        finally:
            CURRENT.reset(token)
            await shielded(self._conclude(running), name=f"conclude {task_id}")

    async def _conclude(self, running: RunningTask) -> None:
        try:
            await running.settle()
        finally:
            del self._running[running.task_id]
            if running.finished:
                self.finished.add(running.task_id, True)
            running.settled.set()

    def _delivered(self, running: RunningTask, cause: Cancellation) -> None:
        if self.when_delivered is not None:
            self.when_delivered(cause)
        self._notify_later("delivered", running, cause)

    def _notify_later(self, stage: Stage, running: RunningTask, cause: Cancellation) -> None:
        name = running.message.task_name if running.message is not None else None
        task = asyncio.create_task(self._notify(stage, running.task_id, cause, name), name=f"tell of {running.task_id}")
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    def _on_lost(self, running: RunningTask) -> None:
        task = asyncio.create_task(self._lease_lost(running), name=f"lease lost of {running.task_id}")
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    async def _lease_lost(self, running: RunningTask) -> None:
        try:
            if self.still_ours is not None and await self.still_ours(running.task_id):
                logger.warning("lease lost, but the work is still ours", extra=running.about)
                return
        except Exception:  # who cannot say that it is ours, must not go on as if it were
            logger.exception("could not find out whether work is still ours", extra=running.about)
        running.cancel(Cancellation(CancelKind.LEASE_LOST, reason="lease lost", channel=CancelChannel.LEASE))

    async def run_task(
        self, target: Callable[..., Any], message: TaskiqMessage, ack_controller: AckController | None = None
    ) -> TaskiqResult[Any]:
        """Run the task function in an asyncio task of its own, which alone is what a cancellation cancels."""
        running = CURRENT.get(None)
        if running is None:
            return await super().run_task(target, message, ack_controller)
        running.attach(message)
        running.unsettled_unless_told = self._get_ack_time(message) is AcknowledgeType.MANUAL
        if running.dropped:
            result = cancelled_result(message)
        else:
            observed = running.observed(target, self.executor)
            inner = asyncio.create_task(
                super().run_task(observed, message, ack_controller), name=f"task {message.task_id}"
            )
            running.begin(inner)
            result = await self._result_of(inner, running, message)
        running.end(succeeded=not result.is_err)
        if running.cancellation is not None:
            return await self._after_cancellation(running, message, result)
        return running.told(result)

    async def _after_cancellation(
        self, running: RunningTask, message: TaskiqMessage, result: TaskiqResult[Any]
    ) -> TaskiqResult[Any]:
        """Its cleanup handlers, unless it has finished its work all the same; and whoever wants to hear of the end."""
        failures: tuple[str, ...] = ()
        if running.handlers and result.is_err:
            failures = await shielded(running.clean_up(), name=f"clean up {running.task_id}")
        result = running.told(result)
        if failures:
            result.error = CleanupFailed(failures)
        cause = running.cancellation
        if cause is not None:
            error = result.error if result.is_err else None
            await self._notify("finished", running.task_id, cause, message.task_name, error)
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
        await notify_all(self.broker.middlewares, event)

    async def _result_of(
        self, inner: "asyncio.Task[TaskiqResult[Any]]", running: RunningTask, message: TaskiqMessage
    ) -> TaskiqResult[Any]:
        interrupted: asyncio.CancelledError | None = None
        while not inner.done():
            try:
                await asyncio.wait({inner})
            except asyncio.CancelledError as error:  # the loop is torn down; the work is not left behind
                interrupted = error
                running.cancel(Cancellation(CancelKind.SHUTDOWN, reason=_SHUTDOWN))
        result = cancelled_result(message) if inner.cancelled() else inner.result()
        if interrupted is not None:
            running.end(succeeded=not result.is_err)
            raise interrupted
        return result
