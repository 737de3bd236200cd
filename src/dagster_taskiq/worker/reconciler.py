"""Finish what nobody else will: runs whose worker is dead and whose message is gone.

A message that comes again is the quick way, and this one waits until it would have come. Knows claims, heartbeats and
run statuses; what becomes of a run is decided by `run_task`, as if its message had come. One worker at a time does it,
for each route one that serves it. Where no worker serves a route, that of another one ends what takes no code.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from dagster import DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq._lane import Lane
from dagster_taskiq._log_context import log_context
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.storage.claims import Claim, ClaimState
from dagster_taskiq.storage.code_locations import who_serves
from dagster_taskiq.storage.engine_events import WHY_KEY, Stage, waits_for_route
from dagster_taskiq.storage.event_log import append_event, read_engine_events, was_launched
from dagster_taskiq.storage.leadership import Leadership
from dagster_taskiq.storage.queue_ttl import QueueTTL
from dagster_taskiq.storage.routing import route_of_run, served_routes, sorted_routes
from dagster_taskiq.storage.tags import TASK_ID_TAG, own_tags, was_stopped
from dagster_taskiq.tasks.running_task import RunningTask
from dagster_taskiq.tasks.running_tasks import RunningTasks
from dagster_taskiq.worker.admission import WorkKind, begins_a_process
from dagster_taskiq.worker.context import WorkerContext
from dagster_taskiq.worker.run_task import RunWork

logger = logging.getLogger(__name__)

_LEADERS_TURNS: Final = 2.5
"""So many intervals without a sign of life, and another worker takes over."""
_RESIGNS_WITHIN_S: Final = 0.5
_AT_ONCE: Final = 4
"""Cancellations that are finished side by side. They take no slots: nothing but cleanup handlers is started."""
_BATCH: Final = 100
_ENOUGH: Final = 100
"""Lost runs of one look, each of which takes a query: a look has seconds, and no more can be begun at once anyway."""
_NO_CLAIM: Final = ""
_GOES_ON: Final = {DagsterRunStatus.STARTING, DagsterRunStatus.STARTED}


@dataclass(frozen=True, slots=True)
class LostRun:
    """A run that nobody works on. `mark`: what was seen of its claim; when that changes, somebody has it again."""

    run: DagsterRun
    task_id: str
    kind: WorkKind
    mark: str
    elsewhere: str | None = None
    """Why no process may be begun for it here: it is of a route that this worker does not serve."""


class LostRuns:
    """Which runs are lost, and for how long already? Remembers what it has seen. `look` blocks on the database."""

    def __init__(
        self, context: WorkerContext, *, patience_s: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """`patience_s`: how long a run must have been lost before it is due; its message may come within that."""
        self._context = context
        self._patience_s = patience_s
        self._monotonic = monotonic
        self._since: dict[str, tuple[str, float]] = {}
        self._tried: dict[str, tuple[str, float]] = {}
        self._in_doubt = False
        self._may_live: set[str] = set()
        """Workers that may only lack the database: what they have goes on there."""
        self.any_waits = False
        """Whether, at the last look, a run waited for its start."""
        self._led: Collection[str] = ()
        self._served: set[str] | None = None
        """The routes of which workers live that take runs, once that was asked in this look."""

    def look(self, led: Collection[str]) -> list[LostRun]:
        """Those that are due; when there are very many, some of them, what is to be stopped first.

        `led`: the routes for which this worker is the one that looks.
        """
        self._led, self._served = led, None
        claims = self._context.claims
        rows, canceling, self.any_waits = claims.unfinished()
        me = self._context.worker_id
        held = {claim.worker_id for claim in rows.values() if claim.state is ClaimState.HELD}
        alive, in_doubt = claims.heartbeats.look(held - {me})
        self._in_doubt, alive = bool(in_doubt), alive | in_doubt | {me}
        self._may_live = claims.without_message.alive(held - alive)
        marks = dict.fromkeys(canceling - rows.keys(), _NO_CLAIM) | {
            run_id: claim.stored
            for run_id, claim in rows.items()
            if claim.state is not ClaimState.HELD or claim.worker_id not in alive
        }
        now = self._monotonic()
        self._since = {run_id: (mark, self._since_when(run_id, mark, now)) for run_id, mark in marks.items()}
        for run_id in self._tried.keys() - marks.keys():
            self._tried.pop(run_id, None)
        due = [run_id for run_id, (_, since) in self._since.items() if now - since >= self._patience_s]
        random.shuffle(due)  # those for which there is no slot must not stand before the others for ever
        due.sort(key=lambda run_id: run_id not in canceling)
        found: list[LostRun] = []
        for start in range(0, len(due), _BATCH):
            runs = self._context.instance.get_runs(RunsFilter(run_ids=due[start : start + _BATCH]))
            lost = [self._lost(run, rows.get(run.run_id), now) for run in runs]
            found += [run for run in lost if run is not None]
            if len(found) >= _ENOUGH:
                break
        return found

    def next_look_in(self, every_s: float) -> float:
        """Seconds until the next look: sooner when something is lost, or may be."""
        if self._in_doubt:
            every_s = min(every_s, self._context.claims.heartbeats.confirm_s)
        now = self._monotonic()
        left = min((self._patience_s - (now - since) for _, since in self._since.values()), default=every_s)
        return min(every_s, max(left, self._patience_s / 4))

    def was_tried(self, lost: LostRun) -> None:
        """It was seen to. If it is still lost then, it is due again after the same time."""
        over = was_stopped(lost.run)  # whether there was something to clean up, or not
        self._tried[lost.run.run_id] = (lost.mark, float("inf") if over else self._monotonic())

    def _since_when(self, run_id: str, mark: str, now: float) -> float:
        seen_as, since = self._since.get(run_id, (None, now))
        tried_as, tried_at = self._tried.get(run_id, (None, 0.0))
        return max(since if seen_as == mark else now, tried_at if tried_as == mark else 0.0)

    def _lost(self, run: DagsterRun, claim: Claim | None, now: float) -> LostRun | None:
        """None: not ours to finish, or not yet."""
        task_id, status = self._task_of(run), run.status
        mark, since = self._since[run.run_id]
        goes_on = status in _GOES_ON and claim is not None
        if goes_on and claim is not None and claim.state is ClaimState.HELD and claim.worker_id in self._may_live:
            return None
        if goes_on and now - since < self._patience_s + self._monitoring_s():
            return None
        is_stopped = status is DagsterRunStatus.CANCELING or was_stopped(run)
        route = route_of_run(run)
        if task_id is None or not (goes_on or is_stopped) or not self._is_on_our_queue(run.run_id, route):
            self._tried[run.run_id] = (mark, float("inf"))  # it stays so
            return None
        # A run that goes on has another task id than its claim when it was resumed, and nobody has got that message.
        resumed = goes_on and status is DagsterRunStatus.STARTED and claim is not None and claim.task_id != task_id
        kind: WorkKind = "resume_run" if resumed else "execute_run"
        if route in self._led:
            return LostRun(run, task_id, kind, mark)
        self._tried[run.run_id] = (mark, now)
        if not self._ends_runs_of(route):
            return None
        why = f"no worker that takes runs of route {route!r} is alive"
        if begins_a_process(self._context.instance, run, kind):
            if is_stopped:
                self._tell_that_it_waits(run, f"{why}, to run its cleanup handlers")
            return None
        return LostRun(run, task_id, kind, mark, elsewhere=why)

    def _task_of(self, run: DagsterRun) -> str | None:
        """None: it is another launcher's. One that was never launched was withdrawn by somebody who died over it."""
        task_id = own_tags(run).get(TASK_ID_TAG)
        if task_id is not None or run.status is not DagsterRunStatus.CANCELING:
            return task_id
        return None if was_launched(self._context.instance, run.run_id) else run.run_id

    def _ends_runs_of(self, route: str) -> bool:
        """Whether a route that is not led from here has no worker, and this is the one that ends what can be ended."""
        if self._served is None:
            queue, living = queue_name(self._context.settings.queue_url), self._context.claims.heartbeats.living()
            known = {name for beat in living for name in served_routes(beat.facts)}
            self._served = {name for name in known if who_serves(living, queue, name, "runs")} | {*self._led}
        return route not in self._served and sorted_routes(self._served)[0] in self._led

    def _tell_that_it_waits(self, run: DagsterRun, why: str) -> None:
        """In the log of the run, once."""
        notes = read_engine_events(self._context.instance, run.run_id)
        if not any(stage is Stage.WAITING and facts.get(WHY_KEY) == why for stage, facts in notes):
            append_event(self._context.instance, run, waits_for_route(why, route_of_run(run)))

    def _monitoring_s(self) -> float:
        """Where Dagster's run monitoring resumes or fails lost runs it comes first, and has two looks for that."""
        instance = self._context.instance
        return 2.0 * instance.run_monitoring_poll_interval_seconds if instance.run_monitoring_enabled else 0.0

    def _is_on_our_queue(self, run_id: str, route: str) -> bool:
        """Other fleets may have other code. What no launcher's event names a queue for is everybody's."""
        queues = [
            facts.get("queue")
            for stage, facts in read_engine_events(self._context.instance, run_id)
            if stage is Stage.SUBMITTED
        ]
        return not queues or queues[-1] == queue_name(self._context.settings.of_route(route).queue_url)


class Reconciler:
    """Looks for lost runs of the routes for which this worker does it, and has them carried out to their end."""

    def __init__(
        self,
        context: WorkerContext,
        tasks: RunningTasks,
        work: RunWork,
    ) -> None:
        """`tasks`: those of the worker, which a cancellation finds."""
        self._context = context
        self._tasks = tasks
        self._work = work
        self._every_s = every_s = context.settings.reconcile_every_s
        self._lost = LostRuns(context, patience_s=context.settings.lost_after_s)
        self._lane = Lane("the database, for lost runs")
        self._queue_ttl = QueueTTL(context.instance, context.settings, context.claims)
        self._leaderships = {
            route: Leadership(
                context.instance, leaders_task(context.settings, route), context.worker_id, _LEADERS_TURNS * every_s
            )
            for route in context.settings.serves
        }
        self._mine: dict[str, RunningTask] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Until the worker stops, and what was begun here has ended. A database that is away is survived."""
        pause_s = self._every_s * random.uniform(0.05, 0.1)  # noqa: S311 - workers are often started together
        async with asyncio.TaskGroup() as finishing:
            while not await _happens(stopping, pause_s):
                pause_s = self._every_s
                try:
                    if led := await self._lane.call(self._lead):
                        for lost in await self._lane.call(self._lost.look, led):
                            self._begin(lost, finishing)
                        if self._lost.any_waits:
                            await self._lane.call(self._queue_ttl.look)
                        pause_s = self._lost.next_look_in(self._every_s)
                except Exception as error:  # noqa: BLE001 - the database, above all; the next look is soon
                    logger.warning("cannot look for lost runs: %s", error)
        try:
            async with asyncio.timeout(_RESIGNS_WITHIN_S):
                await self._lane.call(self._resign)
        except Exception as error:  # noqa: BLE001 - then it lapses
            logger.info("cannot let another worker look for lost runs: %s", error)
        finally:
            self._lane.close()

    def _lead(self) -> Collection[str]:
        return [route for route, leadership in self._leaderships.items() if leadership.take()]

    def _resign(self) -> None:
        for leadership in self._leaderships.values():
            leadership.resign()

    async def _let_another_look(self, lost: LostRun) -> None:
        """There is no message to hand on: if another worker may have the code, that one is to find the run itself."""
        route, find_code = route_of_run(lost.run), self._context.find_code
        if route not in self._leaderships:
            return
        try:
            missing = await self._lane.call(find_code, lost.run, route, "runs")
            if missing is not None and missing.others:
                await self._lane.call(self._leaderships[route].resign, 2 * self._every_s)
        except Exception as error:  # noqa: BLE001 - the database; it is tried again after the same time
            logger.warning("cannot let another worker look for lost runs: %s", error)

    def stop_running(self, shutdown: Cancellation) -> None:
        """Interrupt what was begun here: the worker's drain is over."""
        for task in self._mine.values():
            task.cancel(shutdown)

    def _begin(self, lost: LostRun, finishing: asyncio.TaskGroup) -> None:
        run_id = lost.run.run_id
        takes_a_slot = lost.run.status in _GOES_ON
        if takes_a_slot and self._context.held():
            return  # nothing is begun; what is to be stopped is
        slots = self._context.settings.max_concurrent_runs - self._context.active_by_kind()["runs"]
        if lost.task_id in self._tasks or (slots <= 0 if takes_a_slot else len(self._mine) >= _AT_ONCE):
            return
        logger.warning(
            "run %s has no worker and its message does not come; %s",
            run_id[:8],
            f"{lost.elsewhere}, so it is ended here" if lost.elsewhere else "going on with it here",
            extra={"run_id": run_id, "task_id": lost.task_id, "status": lost.run.status.value},
        )
        task = RunningTask(lost.task_id, settle=_leave, awaits_signal=True)
        self._tasks.add(task)
        self._mine[run_id] = task
        finishing.create_task(self._finish(lost, task), name=f"finish lost run {run_id}")

    async def _finish(self, lost: LostRun, task: RunningTask) -> None:
        run_id = lost.run.run_id
        try:
            with log_context(run_id=run_id, task_id=lost.task_id), task.entered():
                task.outcome = await self._work.carry_out(lost.kind, run_id, elsewhere=lost.elsewhere)
                if task.outcome.settlement is Settlement.HAND_BACK:
                    await self._let_another_look(lost)
        finally:
            self._mine.pop(run_id)
            self._tasks.remove(task)
            task.settled.set()
            self._lost.was_tried(lost)


def leaders_task(settings: Settings, route: str) -> str:
    """What one worker at a time does for a route; `settings`: those of the unnamed one."""
    return f"reconcile {queue_name(settings.of_route(route).queue_url)}"


async def _leave(settlement: Settlement, delay_s: int = 0) -> None:
    """There is no message."""


async def _happens(event: asyncio.Event, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
