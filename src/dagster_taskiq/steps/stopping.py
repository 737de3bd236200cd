"""Stop the steps of a run that is interrupted, unless they are to go on, and wait until they are gone.

Knows Dagster's run status, this process's worker, and a step handler; not how cancels travel.
"""

import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Final

from dagster import DagsterEvent, DagsterRunStatus

from dagster_taskiq._retry import poll_until
from dagster_taskiq.cancellation.current import current_process
from dagster_taskiq.cancellation.words import why_stopped
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES
from dagster_taskiq.dagster_compat.execution import interrupted_step
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.steps.plan import SHORTEST_REST_S, Plan
from dagster_taskiq.steps.tracking import Tracking
from dagster_taskiq.storage import step_events
from dagster_taskiq.storage.event_log import run_will_resume
from dagster_taskiq.storage.running_steps import StopOfSteps

_BEING_STOPPED: Final = {*FINISHED_STATUSES, DagsterRunStatus.CANCELING}
_STATUS_PATIENCE_S: Final = 0.2


class Stopping:
    """Of the steps of one plan."""

    def __init__(self, plan: Plan, tracking: Tracking) -> None:
        self._plan = plan
        self._tracking = tracking

    def run_is_being_stopped(self) -> bool:
        """Whether somebody has asked for the end of the run."""
        if current_process().is_cancelled():
            return True
        plan = self._plan
        run = retry_storage(lambda: plan.instance.get_run_by_id(plan.context.run_id), "read the run")
        return run is None or run.status in _BEING_STOPPED

    def stop(self) -> Iterator[DagsterEvent]:
        """After an interrupt: stop the steps, unless they are to go on. Yields the events that it reads meanwhile."""
        plan, process = self._plan, current_process()
        cancelled = process.is_cancelled()
        if process.is_orphaned() and not cancelled:
            plan.engine_event("Interrupted, because the run's worker is gone: the next one decides about the steps")
            return
        if cancelled:
            self._make_sure_that_it_is_canceling()
        if not self.run_is_being_stopped() and run_will_resume(plan.instance, plan.context.run_id):
            plan.engine_event("Interrupted; the steps go on, because the run will be resumed")
            return
        yield from self.cancel_steps()

    def _make_sure_that_it_is_canceling(self) -> None:
        """Before the first step stops and makes room for the next one, which looks at the status of its run.

        The cancel message may be quicker than the status that the launcher writes, and it may come without any.
        """
        instance, run_id = self._plan.instance, self._plan.context.run_id

        def look() -> bool:
            run = instance.get_run_by_id(run_id)
            return run is None or run.status in _BEING_STOPPED

        if not poll_until(look, within_s=_STATUS_PATIENCE_S, every_s=_STATUS_PATIENCE_S / 20):
            run = instance.get_run_by_id(run_id)
            if run is not None:
                instance.report_run_canceling(run)

    def cancel_steps(self) -> Iterator[DagsterEvent]:
        """Cancel the open steps, and wait until they are gone, within their time. Yields the events of meanwhile."""
        plan, tracking = self._plan, self._tracking
        plan.is_stopping = True
        stop = StopOfSteps(plan.handler.patience_s(plan.run))
        yield from tracking.read_log()
        if tracking.open.workers:
            plan.append(step_events.forwarding(tracking.open_steps(), stop.patience_s))
        while tracking.open.workers:
            # Also those that were claimed only now. Who was not claimed before the run was to be stopped is dropped.
            if late := stop.not_yet_cancelled(tracking.open.workers):
                step_keys = tracking.open.step_keys
                plan.handler.terminate_tasks({task_id: plan.route_of(step_keys[task_id]) for task_id in late})
            if stop.is_too_long:
                plan.append(step_events.steps_not_stopped(tracking.open_steps(), stop.waited_s))
                break
            time.sleep(SHORTEST_REST_S)
            yield from tracking.read_log()
            tracking.close_dead()
        else:
            if stop.cancelled:
                plan.append(step_events.steps_stopped(len(stop.cancelled), stop.waited_s))
        self._write_off(stop.cancelled)
        yield from tracking.read_log()

    def _write_off(self, cancelled: AbstractSet[str]) -> None:
        """Write of steps that had to be killed how they ended, and free what never-started ones hold."""
        plan = self._plan
        storage = plan.instance.event_log_storage
        why = why_stopped(current_process().cancellation, "run terminated")
        for step_key, step in plan.running.items():
            task_id = plan.task_id(step_key)
            if task_id in self._tracking.open.workers:
                continue
            if task_id in cancelled:
                interrupted_step(plan.context.for_step(step), f"{why}; its process had to be killed")
            elif storage.supports_global_concurrency_limits:
                storage.free_concurrency_slot_for_step(plan.context.run_id, step_key)
