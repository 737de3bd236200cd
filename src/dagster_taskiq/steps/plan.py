"""One plan in execution: what submission, tracking and stopping of its steps share. Knows Dagster's plan."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dagster import DagsterEvent, DagsterInstance, DagsterRun

from dagster_taskiq.dagster_compat.api import EngineEventData
from dagster_taskiq.dagster_compat.execution import (
    ActiveExecution,
    ExecutionStep,
    PlanOrchestrationContext,
    StepHandlerContext,
    error_info,
    interrupted_step,
)
from dagster_taskiq.dagster_compat.interrupts import raise_interrupts_as
from dagster_taskiq.messages import step_task_id
from dagster_taskiq.steps.handler import TaskiqStepHandler
from dagster_taskiq.storage.engine_events import EngineEvent
from dagster_taskiq.storage.event_log import append_event

SHORTEST_REST_S: Final = 0.02
_LONGEST_REST_S: Final = 1.0
_REST_SHARE: Final = 0.1
"""Of the time since something last happened: so a step's end is noticed after a tenth of its duration at the latest."""


class Woken(Exception):
    """An interrupt has come while the loop slept."""


@dataclass(slots=True)
class Plan:
    """`contexts_of` describes steps to the handler; `fail` writes a step's failure, or its retry where that is due.

    `route_of`: of a step, by its key.
    """

    context: PlanOrchestrationContext
    active: ActiveExecution
    handler: TaskiqStepHandler
    contexts_of: Callable[[Sequence[ExecutionStep]], Sequence[StepHandlerContext]]
    fail: Callable[[ExecutionStep, Any], None]
    route_of: Callable[[str], str]
    max_concurrent: int | None
    running: dict[str, ExecutionStep] = field(default_factory=dict)
    """By key, the steps that were due and whose end has not been read in the log."""
    _interrupted: bool = False
    _something_happened_at: float = field(default_factory=time.monotonic)

    @property
    def instance(self) -> DagsterInstance:
        """The run's instance."""
        return self.context.instance

    @property
    def run(self) -> DagsterRun:
        """The run."""
        return self.context.dagster_run

    def task_id(self, step_key: str) -> str:
        """That of the step's present attempt."""
        attempt = self.active.retry_state.get_attempt_count(step_key) + 1
        return step_task_id(self.context.run_id, step_key, attempt)

    def lose(self, step: ExecutionStep, why: str, *, retry: bool) -> None:
        """Write the end of a step whose own process could not do it."""
        if retry:
            self.fail(step, error_info(why))
        else:
            interrupted_step(self.context.for_step(step), why)

    # Time

    def is_interrupted(self) -> bool:
        """Whether an interrupt has come."""
        self._interrupted = self.active.check_for_interrupts() or self._interrupted
        return self._interrupted

    def something_happened(self) -> None:
        """So that the next rest is a short one."""
        self._something_happened_at = time.monotonic()

    def rest(self) -> None:
        """Sleep for a share of the time since something happened; an interrupt ends it at once."""
        quiet_s = time.monotonic() - self._something_happened_at
        seconds = min(_LONGEST_REST_S, max(SHORTEST_REST_S, quiet_s * _REST_SHARE))
        try:
            with raise_interrupts_as(Woken):
                time.sleep(seconds)
        except Woken:
            self._interrupted = True

    # The run's event log

    def append(self, event: EngineEvent) -> None:
        """Write one of our engine events into the run's log."""
        append_event(self.instance, self.run, event)

    def engine_event(self, message: str, error: str | None = None) -> None:
        """Write a plain engine event into the run's log."""
        data = EngineEventData(error=error_info(error) if error else None)
        DagsterEvent.engine_event(self.context, message, data)
