"""Puts the parts of a worker together and owns its start, its drain and its stop.

Stopping: the first SIGTERM or SIGINT, or a request from afar, ends the receiving; what runs may go on for
`drain_seconds` (cancellations are still received); then, or at a second signal, children are interrupted without a
cancel intent.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, Final

from dagster import DagsterInstance, RunsFilter
from taskiq import TaskiqMessage

from dagster_taskiq._lane import Lane
from dagster_taskiq._log_context import log_context
from dagster_taskiq._retry import retry_async
from dagster_taskiq._text import clean_text
from dagster_taskiq._time_limit import CALL_S
from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.cancellable_receiver import CancellableReceiver, ReceiverHooks
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.connections import bound_connections
from dagster_taskiq.dagster_compat.instance import open_instance
from dagster_taskiq.messages import run_of_step_task
from dagster_taskiq.metrics import Metrics, on_ecs
from dagster_taskiq.process.fork_server import ForkServer
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.s3_payloads import PayloadBucket
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.engine_events import no_log
from dagster_taskiq.storage.fleet import StopRequest
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.tasks.cancel_listener import Cancels
from dagster_taskiq.tasks.running_tasks import RunningTasks
from dagster_taskiq.worker.cancel_sender import cancel_tasks
from dagster_taskiq.worker.claim_watch import ClaimWatch
from dagster_taskiq.worker.code_check import CodeCheck
from dagster_taskiq.worker.context import CancelRuns, WorkerContext, cancel_none
from dagster_taskiq.worker.ecs import Agent, Protection, Task, until_outdated, until_stopped
from dagster_taskiq.worker.forking import fork_server, forked_server
from dagster_taskiq.worker.health import answering
from dagster_taskiq.worker.heart import Heart
from dagster_taskiq.worker.housekeeping import keep_house
from dagster_taskiq.worker.orders import Orders
from dagster_taskiq.worker.reconciler import Reconciler
from dagster_taskiq.worker.routes import Served
from dagster_taskiq.worker.run_task import RunWork
from dagster_taskiq.worker.status_poller import StatusPoller
from dagster_taskiq.worker.step_task import StepWork

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_LONGEST_FACT: Final = 256
_IS_OVER_S: Final = 5.0
"""Whether a run is over, for messages that may as well be handed on."""


def run_worker(
    settings: Settings,
    *,
    name: str | None = None,
    on_ready: Callable[[str], None] | None = None,
    agent: Agent | None = None,
    cancel_runs: CancelRuns,
) -> int:
    """Run a worker on the instance of `$DAGSTER_HOME` until it is told to stop; blocks; returns the exit code.

    `name` begins the worker's id. `on_ready` is called with that id once the worker listens to all its queues. Installs
    handlers for SIGTERM and SIGINT. `agent`: that of ECS, in a container of it; default: what the environment names.
    `cancel_runs`: for the runs that a terminated run has launched. Raises `DagsterTaskiqError` when it cannot start.
    """
    server = forked_server(settings)
    try:
        with open_instance() as instance:
            bound_connections(instance, ours=True)
            server.warm_up()
            if instance.run_monitoring_enabled:
                settings.check_against_cancel_timeout(instance.run_monitoring_cancel_timeout_seconds)
            asyncio.run(_run(instance, settings, name, on_ready, agent or Agent.here(), server, cancel_runs))
    finally:
        server.discard()
    return 0


class Worker:
    """One worker. `worker_id` is unique for each life of it, so that a claim never outlives its claimant."""

    def __init__(
        self,
        instance: DagsterInstance,
        settings: Settings,
        *,
        name: str | None = None,
        task: Task | None = None,
        agent: Agent | None = None,
        server: ForkServer | None = None,
        cancel_runs: CancelRuns = cancel_none,
    ) -> None:
        """`task`: that of ECS, if this is in one. `agent`: that of ECS, asked for protection from scale-in.

        `server`: the fork server, if there is one already.
        """
        self.worker_id = f"{clean_text(name or socket.gethostname())}-{secrets.token_hex(4)}"
        self._instance = instance
        self._settings = settings
        self._where = f"{task.where}, pid {os.getpid()}" if task else f"pid {os.getpid()} on {socket.gethostname()}"
        self._log_of = task.log_of if task else no_log
        self._agent = agent
        self._cancel_runs = cancel_runs
        self._fork_server = server or fork_server(instance.get_ref(), settings)
        self._heartbeats = Heartbeats.of_runs(instance, settings)
        self._lane = Lane("the database, for cancels of others", _IS_OVER_S)
        self._tasks = RunningTasks()
        self._orders = Orders(self.worker_id, self._follow, settings.drain_seconds)
        self._ready = self._signalled = False
        self._stopping = asyncio.Event()
        self._told_to_stop = asyncio.Event()
        self._drained = asyncio.Event()

    def stop(self) -> None:
        """Drain and stop, as at a signal; called again: do not drain."""
        if self._signalled:
            logger.warning("stopping without a drain: runs are interrupted now")
            self._drained.set()
        elif not self._told_to_stop.is_set():
            self._drain("a signal")
        self._signalled = True

    def _drain(self, by: str, reason: str | None = None) -> None:
        logger.info("stopping: no new work; what runs has %g s to finish", self._settings.drain_seconds)
        self._orders.stops(by, reason)
        self._told_to_stop.set()
        self._stopping.set()

    def _end_after_work(self, by: str, reason: str | None = None) -> None:
        self._orders.stops(by, reason, finish=True)
        self._stopping.set()

    def _follow(self, request: StopRequest) -> None:
        """Do what somebody has asked for from afar. What was asked for before, and is more, stays."""
        logger.info("asked to stop by %s", request.described())
        if self._told_to_stop.is_set():
            return
        if not request.finish:
            self._drain(request.by, request.reason)
        elif not self._stopping.is_set():
            logger.info("no new work; what runs is finished, then the worker ends")
            self._end_after_work(request.by, request.reason)

    async def run(self, on_ready: Callable[[str], None] | None = None, *, handle_signals: bool = False) -> None:
        """Work until `stop`. Raises `DagsterTaskiqError` when a queue cannot be read or no child can be forked."""
        if handle_signals:
            for number in _SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        served = Served.of(self._settings)
        context = self._context(served)
        heart = Heart(self._heartbeats, context, self._stopping, self._orders)
        bucket = self._settings.payload_bucket
        payloads = PayloadBucket(bucket, self._settings.region_name) if bucket else None
        async with AsyncExitStack() as closing:  # the last one first, each whatever becomes of the others
            closing.push_async_callback(_close, "the heartbeat", heart.stop)
            closing.callback(self._lane.close)
            closing.callback(context.lane.close)
            closing.push_async_callback(_close, "the fork server", self._fork_server.stop)
            if payloads is not None:
                closing.push_async_callback(_close, "the payload bucket", payloads.close)
            for broker in reversed(served.brokers):
                closing.push_async_callback(_close, broker.queue_url, broker.shutdown)
            if not await self._unless_stopped(self._prepare(served, heart)):
                return
            async with answering(lambda: self._describe(context)):
                await self._work(served, context, heart, payloads, on_ready)

    async def _prepare(self, served: Served, heart: Heart) -> None:
        await served.check()
        await self._fork_server.start()
        await retry_async(heart.beat, doing="write the first heartbeat", on=TimeoutError, for_s=CALL_S)

    async def _unless_stopped(self, body: Coroutine[Any, Any, None]) -> bool:
        """Do it, unless the worker is told to stop meanwhile; whether it was done."""
        doing = asyncio.create_task(body, name="prepare")
        stopped = asyncio.create_task(self._stopping.wait(), name="await stop")
        await asyncio.wait({doing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (doing, stopped):
            task.cancel()
        await asyncio.wait({doing, stopped})
        if doing.cancelled():
            return False
        doing.result()
        return True

    async def _work(
        self,
        served: Served,
        context: WorkerContext,
        heart: Heart,
        payloads: PayloadBucket | None,
        on_ready: Callable[[str], None] | None,
    ) -> None:
        """Receive until told to stop; every helper has an owner, and one that fails stops the worker."""
        settings, listener = self._settings, served.listener(self._tasks, self._is_over)
        runs = RunWork(context)  # one for all: it knows which runs are worked on here
        receivers = self._receivers(served, context, runs, listener, payloads)
        reconciler = Reconciler(context, self._tasks, runs) if settings.max_concurrent_runs else None
        poller = StatusPoller(self._instance, context.watched, self._tasks.cancel, settings.status_poll_seconds)
        async with asyncio.TaskGroup() as helpers:
            watch = ClaimWatch(context, self._tasks.cancel)
            side = [
                helpers.create_task(watch.run(), name="watch the claims"),
                helpers.create_task(poller.run(), name="poll the status of runs"),
                helpers.create_task(heart.run(), name="heartbeat"),
                helpers.create_task(self._code.run(), name="look for code"),
                helpers.create_task(self._stop_what_does_not_finish(receivers, reconciler, context), name="drain"),
                helpers.create_task(self._announce(receivers, on_ready), name="announce"),
            ]
            if self._agent is not None and self._agent.knows_the_task:
                side.append(helpers.create_task(self._heed_the_stop(self._agent), name="heed the stop of the task"))
            if self._agent is not None and self._agent.can_protect:
                protection = Protection(self._agent, lambda: bool(self._tasks))
                side.append(helpers.create_task(protection.run(), name="scale-in protection"))
                side.append(helpers.create_task(self._retire(self._agent), name="retire"))
            if listener is not None:
                side.append(helpers.create_task(listener.run(), name="listen to cancels"))
            try:
                async with asyncio.TaskGroup() as receiving:
                    for receiver in receivers:
                        receiving.create_task(receiver.listen(self._stopping), name="receive")
                    if reconciler is not None:
                        receiving.create_task(reconciler.run(self._stopping), name="look for lost runs")
            finally:
                for task in side:
                    task.cancel()

    async def _heed_the_stop(self, agent: Agent) -> None:
        """Drain when ECS stops the task, also when the signal does not come this far."""
        await until_stopped(agent)
        if not self._told_to_stop.is_set():
            self._drain("ECS", "the task is being stopped (spot, scale-in or deployment)")

    async def _retire(self, agent: Agent) -> None:
        """When a deployment has replaced this worker's version: no new work, and end after what runs, however long."""
        await until_outdated(await agent.task())
        if not self._stopping.is_set():
            logger.info("outdated: no new work; what runs is finished, then the worker ends")
            self._end_after_work("a deployment")

    def _context(self, served: Served) -> WorkerContext:
        settings = self._settings
        without_message = Heartbeats.without_a_message(self._instance, settings)
        tell = partial(asyncio.get_running_loop().call_soon_threadsafe, self._orders.news.set)
        code = self._code = CodeCheck(self._instance, settings, self.worker_id, tell)
        return WorkerContext(
            instance=self._instance,
            settings=settings,
            claims=Claims(self._instance, self._heartbeats, without_message, self._log_of),
            step_claims=StepClaims(self._instance, self._log_of),
            heartbeats_of_steps=Heartbeats.of_steps(self._instance, settings),
            processes=self._fork_server,
            worker_id=self.worker_id,
            where=self._where,
            metrics=Metrics.chosen(settings.metrics, served.queue, on_ecs=on_ecs(), stdout_is_a_log=True),
            cancel_tasks=partial(cancel_tasks, settings, served.brokers),
            cancel_runs=self._cancel_runs,
            held=lambda: hold.described() if (hold := self._orders.hold) is not None else None,
            find_code=code.missing,
            told_code=code.told,
            hear_code=code.hear,
            unusable=lambda: [message for broker in served.brokers for message in broker.unusable.told()],
        )

    def _receivers(
        self,
        served: Served,
        context: WorkerContext,
        runs: RunWork,
        listener: Cancels | None,
        payloads: PayloadBucket | None,
    ) -> list[CancellableReceiver]:
        """Each with slots of its own: runs that wait for steps never take those that the steps need."""
        settings, found = self._settings, []
        if served.runs is not None:
            runs.register(served.runs)
            served.hold_runs_until(self._orders.may_begin)
            found.append(
                self._receiver(served.runs, settings.max_concurrent_runs, context, context.still_ours, listener)
            )
        if served.steps is not None:
            StepWork(context, payloads, served.route_of_steps_queue).register(served.steps)
            ours = context.step_still_ours
            found.append(self._receiver(served.steps, settings.max_concurrent_steps, context, ours, listener))
        return found

    def _receiver(
        self,
        broker: CancellableSQSBroker,
        slots: int,
        context: WorkerContext,
        still_ours: Callable[[str], Awaitable[bool]],
        listener: Cancels | None,
    ) -> CancellableReceiver:
        hooks = ReceiverHooks(
            tasks_await_signal=True,
            still_ours=still_ours,
            on_delivered=context.measure_delivery,
            describe=_describe_message,
        )
        return CancellableReceiver(broker, max_async_tasks=slots, hooks=hooks, tasks=self._tasks, listener=listener)

    def _describe(self, context: WorkerContext) -> dict[str, Any]:
        """How this worker is, for whoever asks on its host."""
        state = "draining" if self._stopping.is_set() else "ready" if self._ready else "starting"
        return {"worker": self.worker_id, "state": state, **context.active_by_kind()}

    async def _is_over(self, task_id: str) -> bool:
        """Whether the run of that task, or of that step's task, is finished, or was never there."""
        run_id = run_of_step_task(task_id)
        filters = RunsFilter(run_ids=[run_id]) if run_id is not None else RunsFilter(tags={TASK_ID_TAG: task_id})

        def look() -> bool:
            statuses = [run.status for run in self._instance.get_runs(filters, limit=1)]
            return all(status in FINISHED_STATUSES for status in statuses)

        return await self._lane.call(look)

    async def _announce(self, receivers: Sequence[CancellableReceiver], on_ready: Callable[[str], None] | None) -> None:
        for receiver in receivers:
            await receiver.listening.wait()
        self._ready = True
        logger.debug("worker is ready")
        if on_ready is not None:
            on_ready(self.worker_id)
        await keep_house(self._instance, self._heartbeats)

    async def _stop_what_does_not_finish(
        self, receivers: Sequence[CancellableReceiver], reconciler: Reconciler | None, context: WorkerContext
    ) -> None:
        await self._told_to_stop.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._drained.wait()
        shutdown = Cancellation(CancelKind.SHUTDOWN, cause=self._orders.cause)
        context.shutdown.set(shutdown)
        if reconciler is not None:
            reconciler.stop_running(shutdown)
        await asyncio.gather(*[receiver.stop_running(shutdown) for receiver in receivers])


async def _run(
    instance: DagsterInstance,
    settings: Settings,
    name: str | None,
    on_ready: Callable[[str], None] | None,
    agent: Agent,
    server: ForkServer,
    cancel_runs: CancelRuns,
) -> None:
    task = await agent.task()
    name = name or (task.name if task else None)
    worker = Worker(instance, settings, name=name, task=task, agent=agent, server=server, cancel_runs=cancel_runs)
    with log_context(worker=worker.worker_id):
        await worker.run(on_ready, handle_signals=True)


async def _close(what: str, close: Callable[[], Awaitable[None]]) -> None:
    """Close it. What fails is only logged: it may be the reason why the worker stops, and hides no other one."""
    try:
        await close()
    except Exception:
        logger.warning("cannot close %s", what, exc_info=True)


def _describe_message(message: TaskiqMessage) -> dict[str, str]:
    """Run and step that a message names, if it does, for the log."""
    facts = {name: message.kwargs.get(name) for name in ("run_id", "step_key")}
    return {name: value[:_LONGEST_FACT] for name, value in facts.items() if isinstance(value, str)}
