"""Follow the steps of a run in its event log: which have ended, which are lost, which of their workers are dead.

Knows Dagster's plan and event log; not how steps are sent or stopped.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any, Final

from dagster import DagsterEvent

from dagster_taskiq.dagster_compat.execution import ExecutionStep
from dagster_taskiq.steps.interruptions import interruptions_in, without_interrupted
from dagster_taskiq.steps.plan import Plan
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import RunLog, parse_event
from dagster_taskiq.storage.running_steps import RunningSteps
from dagster_taskiq.storage.step_claims import StepClaims, StepState

logger = logging.getLogger(__name__)

_LOOK_AFTER_WORKERS_EVERY_S: Final = 5.0


class Tracking:
    """What was read in the log so far. `open`: the steps whose processes are not known to be gone."""

    def __init__(self, plan: Plan) -> None:
        self.open = RunningSteps()
        self.unsent: list[ExecutionStep] = []
        """After `resume`: the steps that may never have been sent."""
        self._plan = plan
        self._log = RunLog(plan.instance, plan.context.run_id)
        self._looked_after_workers_at = time.monotonic()

    def open_steps(self) -> list[str]:
        """The keys of the open steps."""
        return sorted(set(self.open.step_keys.values()))

    def read_log(self) -> Iterator[DagsterEvent]:
        """Yields what is new in the log, and has taken it in when the next one is asked for."""
        for event in self._log.new_events():
            yield event
            self._handle_event(event)

    def _handle_event(self, event: DagsterEvent) -> None:
        self.open.handle_event(event)
        plan = self._plan
        step = plan.running.get(event.step_key or "")
        if step is None:
            # Of the run itself, or of an attempt that was given up: whatever that still reports comes too late.
            return
        plan.something_happened()
        if event.is_step_skipped:
            plan.running.pop(step.key)
            plan.active.verify_complete(plan.context, step.key)
        elif event.is_step_success or event.is_step_failure or event.is_step_up_for_retry:
            plan.running.pop(step.key)
            plan.active.handle_event(event)
            if not event.is_step_up_for_retry:
                plan.active.verify_complete(plan.context, step.key)
        else:
            plan.active.handle_event(event)
            if event.is_resource_init_failure:
                plan.fail(step, event.engine_event_data.error)
            elif (parsed := parse_event(event)) is not None and parsed[0] is Stage.STEP_LOST:
                self._handle_lost(step, parsed[1])

    def _handle_lost(self, step: ExecutionStep, facts: dict[str, Any]) -> None:
        if facts.get(engine_events.TASK_ID_KEY) != self._plan.task_id(step.key):
            return  # of an attempt that was given up, or begins again as another task
        if facts.get(engine_events.INTERRUPTED_KEY) and facts.get(engine_events.RETRY_KEY):
            self._plan.interrupt(step, str(facts.get(engine_events.WHY_KEY)))
        else:
            why = f"{facts.get(engine_events.WHY_KEY)} (worker {facts.get(engine_events.WORKER_KEY)})"
            self._plan.lose(step, why, retry=bool(facts.get(engine_events.RETRY_KEY)))

    def look_after_workers(self, *, at_once: bool = False) -> None:
        """Now and then: are the workers alive that have our steps?"""
        plan, now = self._plan, time.monotonic()
        is_due = at_once or now - self._looked_after_workers_at >= _LOOK_AFTER_WORKERS_EVERY_S
        if not is_due or not (plan.running or self.open.workers):
            return
        self._looked_after_workers_at = now
        self._log.look_again()
        step_keys = {plan.task_id(step_key): step_key for step_key in plan.running} | self.open.step_keys
        for task_id, worker_id in self._dead_workers(claimed=True).items():
            self.open.close(task_id)
            step_key = step_keys[task_id]
            if step_key in plan.running and task_id == plan.task_id(step_key):
                why = f"worker {worker_id}, which had step {step_key}, is gone"
                plan.interrupt(plan.running[step_key], why)

    def close_dead(self) -> None:
        """Count no longer what a dead worker had."""
        for task_id in self._dead_workers():
            self.open.close(task_id)

    def _dead_workers(self, *, claimed: bool = False) -> dict[str, str]:
        """Task id to worker, of the open steps whose worker is dead. "Cannot tell" is alive.

        `claimed`: also of steps whose worker has claimed them and has died before it wrote so into the log.
        """
        plan = self._plan
        try:
            workers = {**(self._claimed_silently() if claimed else {}), **self.open.workers}
            alive = plan.handler.workers_alive(plan.instance, set(workers.values())) if workers else set()
        except Exception:
            logger.exception("cannot look after the workers; going on", extra={"run_id": plan.context.run_id})
            return {}
        return {task_id: worker for task_id, worker in workers.items() if worker not in alive}

    def _claimed_silently(self) -> dict[str, str]:
        """Task id to worker, of steps that somebody has claimed, of which the log says nothing (yet)."""
        plan = self._plan
        silent = [task_id for task_id in map(plan.task_id, plan.running) if task_id not in self.open.workers]
        claims = StepClaims(plan.instance).read(plan.context.run_id, silent).values()
        return {claim.task_id: claim.worker_id for claim in claims if claim.state is not StepState.RELEASED}

    def resume(self) -> Iterator[DagsterEvent]:
        """Find out what the run's earlier process has left: finished, running, lost, or never sent (`unsent`)."""
        plan = self._plan
        plan.engine_event("Resuming the run: looking for the steps that are at work")
        before = list(self._log.new_events())
        yield from before
        in_flight = {step.key: step for step in plan.active.rebuild_from_events(without_interrupted(before))}
        for interruption in interruptions_in(before):
            plan.note_interruption(*interruption)
        plan.running = dict(in_flight)
        lost, without_resources = {}, {}
        for event in before:
            self.open.handle_event(event)
            parsed = parse_event(event)
            if event.step_key not in in_flight:
                continue
            if parsed is not None and parsed[0] is Stage.STEP_LOST:
                lost[event.step_key] = parsed[1]
            elif event.is_resource_init_failure:
                without_resources[event.step_key] = event.engine_event_data.error
            elif event.is_step_up_for_retry:
                without_resources.pop(event.step_key, None)
        handled = {key for key, facts in lost.items() if facts.get(engine_events.TASK_ID_KEY) == plan.task_id(key)}
        for key, facts in lost.items():
            self._handle_lost(in_flight[key], facts)
        for key, error in without_resources.items():
            plan.fail(in_flight[key], error)
        self.unsent = [
            step
            for key, step in in_flight.items()
            if plan.task_id(key) not in self.open.workers and key not in {*handled, *without_resources}
        ]
        self.look_after_workers(at_once=True)
