"""Puts the parts of a worker together and owns its start, its drain and its stop.

Stopping: the first SIGTERM or SIGINT ends the receiving; what runs may go on for `drain_seconds` (cancellations are
still heard); then, or at a second signal, children are interrupted without a cancel intent.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from taskiq import TaskiqMessage

from dagster_taskiq._log_context import log_context
from dagster_taskiq._retry import retry_async
from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.cancellable_receiver import CancellableReceiver
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.child.main import PRELOAD, WARM_UP
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, serialize_value
from dagster_taskiq.dagster_compat.storage import read_migration_scripts_once
from dagster_taskiq.messages import run_of_step_task
from dagster_taskiq.metrics import RUNNING, Metrics, on_ecs
from dagster_taskiq.process.fork_server import ForkServer
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.client import WARM_UP as SQS_WARM_UP
from dagster_taskiq.sqs.s3_payloads import PayloadBucket
from dagster_taskiq.storage.claims import Claims
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_state import forget_old_states
from dagster_taskiq.storage.tags import TASK_ID_TAG
from dagster_taskiq.tasks.cancel_listener import CancelListener
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.ecs import Agent, Protection
from dagster_taskiq.worker.health import answering
from dagster_taskiq.worker.run_task import RunWork
from dagster_taskiq.worker.status_poller import StatusPoller
from dagster_taskiq.worker.step_task import StepWork

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_MEASURE_EVERY_S: Final = 60
_LONGEST_FACT: Final = 256


def run_worker(
    settings: Settings,
    *,
    name: str | None = None,
    on_ready: Callable[[str], None] | None = None,
    agent: Agent | None = None,
) -> int:
    """Run a worker on the instance of `$DAGSTER_HOME` until it is told to stop; blocks; returns the exit code.

    `name` begins the worker's id. `on_ready` is called with that id once the worker hears all its queues. Installs
    handlers for SIGTERM and SIGINT. `agent`: that of ECS, in a container of it; default: what the environment says.
    Raises `DagsterTaskiqError` when it cannot start.
    """
    read_migration_scripts_once()
    with DagsterInstance.get() as instance:
        if instance.run_monitoring_enabled:
            settings.check_against_cancel_timeout(instance.run_monitoring_cancel_timeout_seconds)
        asyncio.run(_run(instance, settings, name, on_ready, agent or Agent.here()))
    return 0


class Worker:
    """One worker. `worker_id` is unique for each life of it, so that a claim never outlives its claimant."""

    def __init__(
        self,
        instance: DagsterInstance,
        settings: Settings,
        *,
        name: str | None = None,
        where: str | None = None,
        agent: Agent | None = None,
    ) -> None:
        """`where`: the worker's process, in words. `agent`: that of ECS, asked for protection from scale-in."""
        self.worker_id = f"{name or socket.gethostname()}-{secrets.token_hex(4)}"
        self._instance = instance
        self._settings = settings
        self._heartbeats = Heartbeats.of_runs(instance, settings)
        self._claims = Claims(instance, self._heartbeats)
        self._fork_server = fork_server(instance, settings)
        self._where = f"{where}, pid {os.getpid()}" if where else f"pid {os.getpid()} on {socket.gethostname()}"
        self._agent = agent
        self._measured_at = 0.0
        self._ready = False
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._started_at = time.time()
        # Threads of its own, so that no work that waits for the database keeps it from beating; and several, because
        # a beat may still hang in an outage, or in the pauses of Dagster's own tries, when the next one could arrive.
        self._heart = ThreadPoolExecutor(4, thread_name_prefix="heartbeat")

    def stop(self) -> None:
        """Drain and stop; called again: do not drain."""
        if self._stopping.is_set():
            logger.warning("stopping without a drain: runs are interrupted now")
            self._hurry.set()
        else:
            logger.info("stopping: no new work; what runs has %g s to finish", self._settings.drain_seconds)
            self._stopping.set()

    async def run(self, on_ready: Callable[[str], None] | None = None, *, handle_signals: bool = False) -> None:
        """Work until `stop`. Raises `DagsterTaskiqError` when a queue cannot be heard or no child can be forked."""
        if handle_signals:
            for number in _SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        brokers = self._brokers()
        context = WorkerContext(
            instance=self._instance,
            settings=self._settings,
            claims=self._claims,
            heartbeats_of_steps=Heartbeats.of_steps(self._instance, self._settings),
            processes=self._fork_server,
            worker_id=self.worker_id,
            where=self._where,
            metrics=Metrics.chosen(self._settings.metrics, queue_name(self._settings.queue_url), on_ecs=on_ecs()),
            cancel_tasks=self._cancel_over(brokers[0]),
        )
        bucket = self._settings.payload_bucket
        payloads = PayloadBucket(bucket, self._settings.region_name) if bucket else None
        try:
            for broker in brokers:
                await broker.check_queues()
            await self._fork_server.start()
            await self._beat(context)
            with suppress(Exception):  # housekeeping; the next worker does it as well
                await asyncio.to_thread(self._heartbeats.forget_the_long_dead)
                await asyncio.to_thread(forget_old_states, self._instance)
            async with answering(lambda: self._describe(context)):
                await self._work(self._receivers(brokers, context, payloads), brokers[0], context, on_ready)
        finally:
            for broker in brokers:
                await broker.shutdown()
            if payloads is not None:
                await payloads.close()
            await self._fork_server.stop()
            with suppress(Exception):  # the database may be the reason why we stop
                await asyncio.to_thread(self._heartbeats.gone, self.worker_id)
            self._heart.shutdown(wait=False, cancel_futures=True)

    async def _work(
        self,
        receivers: Sequence[CancellableReceiver],
        broker: CancellableSQSBroker,
        context: WorkerContext,
        on_ready: Callable[[str], None] | None,
    ) -> None:
        """Receive until told to stop; every helper has an owner, and one that fails stops the worker."""

        def cancel(task_id: str, cancellation: Cancellation) -> bool:
            return any(receiver.cancel(task_id, cancellation) for receiver in receivers)

        watch = StatusPoller(self._instance, context.watched, cancel, self._settings.status_poll_seconds)
        async with asyncio.TaskGroup() as helpers:
            side = [
                helpers.create_task(watch.run(), name="status watch"),
                helpers.create_task(self._keep_beating(context), name="heartbeat"),
                helpers.create_task(self._stop_what_does_not_finish(receivers, context), name="drain"),
                helpers.create_task(self._announce(receivers, on_ready), name="announce"),
            ]
            if self._agent is not None and self._agent.can_protect:
                protection = Protection(self._agent, lambda: any(receiver.running for receiver in receivers))
                side.append(helpers.create_task(protection.run(), name="scale-in protection"))
            if self._settings.enable_cancellation:
                listener = self._listener(receivers, broker, cancel)
                side.append(helpers.create_task(listener.run(), name="hear cancels"))
            try:
                async with asyncio.TaskGroup() as receiving:
                    for receiver in receivers:
                        receiving.create_task(receiver.listen(self._stopping), name="receive")
            finally:
                for task in side:
                    task.cancel()

    def _brokers(self) -> list[CancellableSQSBroker]:
        """One for each queue that this worker serves: runs, steps."""
        settings, brokers = self._settings, []
        if settings.max_concurrent_runs:
            brokers.append(CancellableSQSBroker.from_settings(settings, settings.queue_url))
        if settings.max_concurrent_steps:
            brokers.append(CancellableSQSBroker.from_settings(settings, settings.steps_queue_url))
        for broker in brokers:
            broker.is_worker_process = True
        return brokers

    def _receivers(
        self, brokers: Sequence[CancellableSQSBroker], context: WorkerContext, payloads: PayloadBucket | None
    ) -> list[CancellableReceiver]:
        """One for each broker, with slots of its own: runs that wait for steps never take those that the steps need."""
        receivers = []
        for broker in brokers:
            if broker.queue_url == self._settings.queue_url:
                RunWork(context).register(broker)
                slots, still_ours = self._settings.max_concurrent_runs, self._still_ours(context)
            else:
                StepWork(context, payloads).register(broker)
                slots, still_ours = self._settings.max_concurrent_steps, _steps_stay_ours
            receiver = CancellableReceiver(broker, max_async_tasks=slots)
            receiver.start_cancelled_work = True
            receiver.still_ours = still_ours
            receiver.when_delivered = context.measure_delivery
            receiver.describe = _describe_message
            receivers.append(receiver)
        return receivers

    def _describe(self, context: WorkerContext) -> dict[str, Any]:
        """How this worker is, for whoever asks on its host."""
        state = "draining" if self._stopping.is_set() else "ready" if self._ready else "starting"
        return {"worker": self.worker_id, "state": state, **context.active_by_kind()}

    def _listener(
        self,
        receivers: Sequence[CancellableReceiver],
        broker: CancellableSQSBroker,
        cancel: Callable[[str, Cancellation], bool],
    ) -> CancelListener:
        """One pair of ears for both queues."""
        finished = receivers[0].finished
        listener = CancelListener(
            broker, cancel, finished=finished, cancel_ttl_s=self._settings.cancel_ttl, is_over=self._is_over
        )
        for receiver in receivers:
            receiver.finished = finished
            receiver.shared_listener = listener
        return listener

    def _cancel_over(self, broker: CancellableSQSBroker) -> Callable[[Iterable[str]], Awaitable[None]]:
        async def cancel_tasks(task_ids: Iterable[str]) -> None:
            if not self._settings.enable_cancellation:
                return
            report = await broker.cancel_tasks(task_ids, requested_by=self.worker_id)
            if report.failed:
                logger.warning(
                    "cancel messages not sent, the status watch does it: %s", next(iter(report.failed.values()))
                )

        return cancel_tasks

    def _still_ours(self, context: WorkerContext) -> Callable[[str], Awaitable[bool]]:
        async def still_ours(task_id: str) -> bool:
            piece = context.active.get(task_id)
            if piece is None:
                return False
            try:
                return await asyncio.to_thread(self._owns, piece.run_id)
            except Exception:  # nothing is killed because the database did not answer: the claim was ours and is
                logger.exception("cannot read the claims; going on", extra={"run_id": piece.run_id})
                return True

        return still_ours

    def _owns(self, run_id: str) -> bool:
        owner = self._claims.owner(run_id, self.worker_id)
        return owner is not None and owner.worker_id == self.worker_id

    async def _is_over(self, task_id: str) -> bool:
        """Whether the run of that task, or of that step's task, is finished, or was never there."""
        run_id = run_of_step_task(task_id)
        filters = RunsFilter(run_ids=[run_id]) if run_id is not None else RunsFilter(tags={TASK_ID_TAG: task_id})

        def look() -> bool:
            runs: Iterable[DagsterRunStatus] = [run.status for run in self._instance.get_runs(filters, limit=1)]
            return all(status in FINISHED_STATUSES for status in runs)

        return await asyncio.to_thread(look)

    async def _announce(self, receivers: Sequence[CancellableReceiver], on_ready: Callable[[str], None] | None) -> None:
        for receiver in receivers:
            await receiver.hearing.wait()
        self._ready = True
        logger.info("worker is ready", extra={"worker_id": self.worker_id})
        if on_ready is not None:
            on_ready(self.worker_id)

    async def _stop_what_does_not_finish(
        self, receivers: Sequence[CancellableReceiver], context: WorkerContext
    ) -> None:
        await self._stopping.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._hurry.wait()
        context.hurry.set()
        shutdown = Cancellation(CancelKind.SHUTDOWN, "the worker is shutting down")
        await asyncio.gather(*[receiver.stop_running(shutdown) for receiver in receivers])

    async def _keep_beating(self, context: WorkerContext) -> None:
        every_s = self._settings.heartbeat_every_s
        while True:
            await asyncio.sleep(every_s)
            # A database that is away for a while stops nobody.
            await retry_async(
                lambda: self._beat(context, within_s=every_s), doing="write the heartbeat", longest_pause_s=every_s
            )

    async def _beat(self, context: WorkerContext, within_s: float | None = None) -> None:
        work = [[piece.run_id, piece.step_key, round(piece.since, 3)] for piece in context.active.values()]
        facts: dict[str, Any] = {
            "since": self._started_at,
            "where": context.where,
            "slots": [self._settings.max_concurrent_runs, self._settings.max_concurrent_steps],
            "work": work,
        }
        if context.metrics.wanted and time.monotonic() - self._measured_at > _MEASURE_EVERY_S:
            self._measured_at = time.monotonic()
            context.metrics.put({RUNNING: len(work)})
        beating = asyncio.get_running_loop().run_in_executor(self._heart, self._heartbeats.beat, self.worker_id, facts)
        try:
            async with asyncio.timeout(within_s):
                await beating
        except TimeoutError:
            raise TimeoutError(f"the database has not answered within {within_s:g} s") from None


async def _run(
    instance: DagsterInstance,
    settings: Settings,
    name: str | None,
    on_ready: Callable[[str], None] | None,
    agent: Agent,
) -> None:
    task = await agent.task()
    if task is None:
        worker = Worker(instance, settings, name=name, agent=agent)
    else:
        worker = Worker(instance, settings, name=name or task.name, where=task.where, agent=agent)
    with log_context(worker=worker.worker_id):
        await worker.run(on_ready, handle_signals=True)


def _describe_message(message: TaskiqMessage) -> dict[str, str]:
    """Run and step that a message names, if it does, for the log."""
    facts = {name: message.kwargs.get(name) for name in ("run_id", "step_key")}
    return {name: value[:_LONGEST_FACT] for name, value in facts.items() if isinstance(value, str)}


async def _steps_stay_ours(_: str) -> bool:
    """An attempt of a step is started once, whoever gets its message: a lost lease changes nothing."""
    return True


def fork_server(instance: DagsterInstance, settings: Settings) -> ForkServer:
    """The process from which runs are forked: it has imported Dagster and opened the instance once."""
    return ForkServer(
        fresh=settings.start_method == "spawn",
        preload=(*PRELOAD, *settings.preload_modules),
        warm_up={WARM_UP: [serialize_value(instance.get_ref())], SQS_WARM_UP: []},
    )
