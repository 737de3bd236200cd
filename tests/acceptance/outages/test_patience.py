"""What only this worker knows, and a database that is away for longer than anybody's patience."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.events.log import EventLogEntry
from sqlalchemy.exc import OperationalError
from tests.acceptance.conftest import open_platform
from tests.acceptance.outages.test_faults import behind_a_proxy
from tests.support.eventually import eventually
from tests.support.platform import Platform
from tests.support.tcp_proxy import TcpProxy

from dagster_taskiq._lane import Lane
from dagster_taskiq.dagster_compat.api import serialize_value
from dagster_taskiq.process.supervise import ChildEnd
from dagster_taskiq.sqs.settlement import Settled, Settlement
from dagster_taskiq.storage.claims import Claims, ClaimState
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.worker import context as context_module
from dagster_taskiq.worker import run_task
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.finalize_run import finalize_run
from dagster_taskiq.worker.run_task import RunWork

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(120)]

ME = "me-1"
PATIENCE_S = 0.5


@dataclass
class World:
    platform: Platform
    proxy: TcpProxy
    context: WorkerContext

    @property
    def instance(self) -> DagsterInstance:
        return self.platform.instance

    def started(self) -> DagsterRun:
        run_id = self.platform.launch("quick_job")
        self.platform.report(self.platform.run(run_id), DagsterEventType.RUN_START)
        return self.platform.run(run_id)


@pytest.fixture
def world(endpoint: str, postgres: str) -> Iterator[World]:
    patience = pytest.MonkeyPatch()
    for module in (context_module, run_task):
        patience.setattr(module, "DATABASE_RETRY_S", PATIENCE_S)
    with behind_a_proxy(postgres) as (proxy, storage), open_platform(endpoint, extra=storage) as platform:
        settings = platform.launcher.settings

        async def nobody(_: Any) -> None: ...

        heartbeats = Heartbeats.of_runs(platform.instance, settings)
        heartbeats.beat(ME)
        unused: Any = None
        yield World(
            platform,
            proxy,
            WorkerContext(
                instance=platform.instance,
                settings=settings,
                claims=Claims(platform.instance, heartbeats),
                step_claims=StepClaims(platform.instance),
                heartbeats_of_steps=Heartbeats.of_steps(platform.instance, settings),
                processes=unused,
                worker_id=ME,
                where="here",
                cancel_tasks=nobody,
                lane=Lane("the database"),
            ),
        )
    patience.undo()


def through_an_outage(world: World, body: Callable[[], Coroutine[Any, Any, Settled]]) -> Settled:
    """Begin it while the database is away; it is back after much longer than the patience with it."""

    async def run() -> Settled:
        world.proxy.away()
        began, task = time.monotonic(), asyncio.create_task(body())
        try:
            await eventually(
                lambda: task.done() or (time.monotonic() - began > 5 * PATIENCE_S and world.proxy.refused > 3),
                "it has tried for longer than its patience",
            )
            assert not task.done(), f"it has given up: {task}"
        finally:
            world.proxy.back()
        return await asyncio.wait_for(task, 60)

    return asyncio.run(run())


def test_a_verdict_that_the_child_held_back_is_written_in_the_end(world: World) -> None:
    run = world.started()
    task_id = world.platform.task_id(run.run_id)
    assert world.context.claims.take(run, ME, task_id, "here", None)
    success = DagsterEvent(DagsterEventType.RUN_SUCCESS.value, "quick_job", message="done")
    entry = EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None,
        level=20,
        user_message="done",
        run_id=run.run_id,
        timestamp=time.time(),
        job_name="quick_job",
        dagster_event=success,
    )
    held = {"verdict": success.event_type_value, "took_hold": False, "entry": serialize_value(entry)}
    end = ChildEnd(1, 0, (held,), interrupted_at=None, kill_at=None, killed=(), gone_at=time.time())
    settled = through_an_outage(world, lambda: finalize_run(world.context, run, task_id, end, None))
    assert settled.settlement is Settlement.DELETE
    assert world.platform.status(run.run_id) is DagsterRunStatus.SUCCESS


def test_a_claim_that_could_not_be_released_is_released_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the claim itself gets lost: it is stored, and the worker does not know it."""
    run_id = world.platform.launch("quick_job")
    task = RunningTask(world.platform.task_id(run_id), settle=lambda *_: asyncio.sleep(0))
    take = world.context.claims.take

    def lose_the_answer(*args: Any) -> None:
        monkeypatch.undo()
        take(*args)
        world.context.claims._mine.clear()
        world.proxy.away()
        raise OperationalError("update", {}, ConnectionResetError())

    monkeypatch.setattr(world.context.claims, "take", lose_the_answer)

    async def carry_out() -> Settled:
        world.proxy.back()
        with task.entered():
            return await RunWork(world.context).carry_out("execute_run", run_id)

    settled = through_an_outage(world, carry_out)
    assert settled.settlement is not Settlement.DELETE
    claim = world.context.claims.read([run_id])[run_id]
    assert (claim.worker_id, claim.state) == (ME, ClaimState.RELEASED)
