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
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from dagster_taskiq import child
from dagster_taskiq import dagster_internals as core
from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.cancellable_receiver import CancellableReceiver
from dagster_taskiq.cancellation import CancelKind, Cancellation
from dagster_taskiq.claims import Claims
from dagster_taskiq.process import ForkServer
from dagster_taskiq.settings import Settings
from dagster_taskiq.status_watch import StatusWatch
from dagster_taskiq.tags import TASK_ID_TAG
from dagster_taskiq.tasks import RunWork

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run_worker(settings: Settings, *, name: str | None = None, on_ready: Callable[[str], None] | None = None) -> int:
    """Run a worker on the instance of `$DAGSTER_HOME` until it is told to stop; blocks; returns the exit code.

    `name` begins the worker's id. `on_ready` is called with that id once the worker hears all its queues. Installs
    handlers for SIGTERM and SIGINT. Raises `DagsterTaskiqError` when it cannot start.
    """
    core.read_migration_scripts_once()
    with DagsterInstance.get() as instance:
        if instance.run_monitoring_enabled:
            settings.check_against_cancel_timeout(instance.run_monitoring_cancel_timeout_seconds)
        worker = Worker(instance, settings, name=name)
        asyncio.run(worker.run(on_ready, handle_signals=True))
    return 0


class Worker:
    """One worker. `worker_id` is unique for each life of it, so that a claim never outlives its claimant."""

    def __init__(
        self,
        instance: DagsterInstance,
        settings: Settings,
        *,
        name: str | None = None,
    ) -> None:
        self.worker_id = f"{name or socket.gethostname()}-{secrets.token_hex(4)}"
        self._instance = instance
        self._settings = settings
        self._claims = Claims(instance, settings.dead_after_s)
        self._fork_server = fork_server(instance, settings)
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

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
        broker = self._broker()
        work = RunWork(
            instance=self._instance,
            settings=self._settings,
            claims=self._claims,
            processes=self._fork_server,
            worker_id=self.worker_id,
            where=f"pid {os.getpid()} on {socket.gethostname()}",
        )
        work.register(broker)
        try:
            await broker.check_queues()
            await self._fork_server.start()
            await self._beat()
            await self._work(self._receiver(broker, work), work, on_ready)
        finally:
            await broker.shutdown()
            await self._fork_server.stop()
            with suppress(Exception):  # the database may be the reason why we stop
                await asyncio.to_thread(self._claims.gone, self.worker_id)

    async def _work(self, receiver: CancellableReceiver, work: RunWork, on_ready: Callable[[str], None] | None) -> None:
        """Receive until told to stop; every helper has an owner, and one that fails stops the worker."""
        watch = StatusWatch(self._instance, lambda: work.watched, receiver.cancel, self._settings.status_poll_seconds)
        async with asyncio.TaskGroup() as helpers:
            side = [
                helpers.create_task(watch.run(), name="status watch"),
                helpers.create_task(self._keep_beating(), name="heartbeat"),
                helpers.create_task(self._stop_what_does_not_finish(receiver), name="drain"),
                helpers.create_task(self._announce(receiver, on_ready), name="announce"),
            ]
            try:
                await receiver.listen(self._stopping)
            finally:
                for task in side:
                    task.cancel()

    def _broker(self) -> CancellableSQSBroker:
        settings = self._settings
        broker = CancellableSQSBroker(
            settings.queue_url,
            settings.region_name,
            max_messages=settings.max_number_of_messages,
            wait_time=settings.wait_time_seconds,
            endpoint_url=settings.endpoint_url,
            enable_cancellation=settings.enable_cancellation,
            visibility_timeout_s=settings.visibility_timeout_seconds,
        )
        broker.is_worker_process = True
        return broker

    def _receiver(self, broker: CancellableSQSBroker, work: RunWork) -> CancellableReceiver:
        receiver = CancellableReceiver(broker, max_async_tasks=self._settings.max_concurrent_runs)
        receiver.start_cancelled_work = True
        receiver.cancel_ttl_s = self._settings.cancel_ttl
        receiver.is_over = self._is_over

        async def still_ours(task_id: str) -> bool:
            run_id = work.watched.get(task_id)
            if run_id is None:
                return False
            try:
                return await asyncio.to_thread(self._owns, run_id)
            except Exception:  # nothing is killed because the database did not answer: the claim was ours and is
                logger.exception("cannot read the claims; going on", extra={"run_id": run_id})
                return True

        receiver.still_ours = still_ours
        return receiver

    def _owns(self, run_id: str) -> bool:
        owner = self._claims.owner(run_id, self.worker_id)
        return owner is not None and owner.worker_id == self.worker_id

    async def _is_over(self, task_id: str) -> bool:
        """Whether the run of that task is finished, or was never there."""

        def look() -> bool:
            runs: Iterable[DagsterRunStatus] = [
                run.status for run in self._instance.get_runs(RunsFilter(tags={TASK_ID_TAG: task_id}), limit=1)
            ]
            return all(status in core.FINISHED_STATUSES for status in runs)

        return await asyncio.to_thread(look)

    async def _announce(self, receiver: CancellableReceiver, on_ready: Callable[[str], None] | None) -> None:
        await receiver.hearing.wait()
        logger.info("worker is ready", extra={"worker_id": self.worker_id})
        if on_ready is not None:
            on_ready(self.worker_id)

    async def _stop_what_does_not_finish(self, receiver: CancellableReceiver) -> None:
        await self._stopping.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._hurry.wait()
        await receiver.stop_running(Cancellation(CancelKind.SHUTDOWN, "the worker is shutting down"))

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_every_s)
            try:
                await self._beat()
            except Exception as error:  # noqa: BLE001 - a database that is away for a while stops nobody
                logger.warning("heartbeat could not be written", extra={"error": repr(error)})

    async def _beat(self) -> None:
        await asyncio.to_thread(self._claims.beat, self.worker_id, {"pid": os.getpid(), "host": socket.gethostname()})


def fork_server(instance: DagsterInstance, settings: Settings) -> ForkServer:
    """The process from which runs are forked: it has imported Dagster and opened the instance once."""
    return ForkServer(
        fresh=settings.start_method == "spawn",
        preload=(*child.PRELOAD, *settings.preload_modules),
        warm_up=child.WARM_UP,
        argument=core.serialize_value(instance.get_ref()),
    )
