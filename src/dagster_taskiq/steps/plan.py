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
    forget_dynamic_outputs,
    interrupted_step,
)
from dagster_taskiq.dagster_compat.interrupts import raise_interrupts_as
from dagster_taskiq.messages import step_task_id
from dagster_taskiq.steps.handler import TaskiqStepHandler
from dagster_taskiq.steps.interruptions import begins_again
from dagster_taskiq.storage.engine_events import EngineEvent
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.step_events import interrupted_too_often, step_interrupted

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
    is_stopping: bool = False
    """Whether the steps are being stopped: then none begins again."""
    _interruptions: dict[tuple[str, int], int] = field(default_factory=dict)
    """By step key and attempt, how often it was interrupted."""
    _interrupted_steps: dict[str, ExecutionStep] = field(default_factory=dict)
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
        return step_task_id(self.context.run_id, step_key, self._attempt(step_key), self.interruptions_of(step_key))

    def _attempt(self, step_key: str) -> int:
        return self.active.retry_state.get_attempt_count(step_key) + 1

    def lose(self, step: ExecutionStep, why: str, *, retry: bool) -> None:
        """Write the end of a step whose own process could not do it."""
        if retry:
            self.fail(step, error_info(why))
        else:
            interrupted_step(self.context.for_step(step), why)

    # Interruptions

    def interruptions_of(self, step_key: str) -> int:
        """How often the step's present attempt was interrupted by the end of its worker."""
        return self._interruptions.get((step_key, self._attempt(step_key)), 0)

    def note_interruption(self, step_key: str, attempt: int, number: int) -> None:
        """What the log says: that attempt begins again, as another task."""
        self._interruptions[step_key, attempt] = max(number, self._interruptions.get((step_key, attempt), 0))

    def interrupt(self, step: ExecutionStep, why: str) -> None:
        """The step's worker was stopped or has died: it begins again, where that is wanted, or has failed."""
        number, most = self.interruptions_of(step.key) + 1, self.handler.max_interruptions
        if self.is_stopping:
            self.lose(step, why, retry=False)
        elif not begins_again(step.tags):
            self.lose(step, why, retry=True)
        elif number > most:
            self.lose(step, f"{why}; {interrupted_too_often(number, most)}", retry=True)
        else:
            attempt, task_id = self._attempt(step.key), self.task_id(step.key)
            event = step_interrupted(step.key, task_id, why, attempt=attempt, number=number, most=most)
            append_event(self.instance, self.run, event, step.key)  # before it is sent: whoever resumes the run counts
            self.note_interruption(step.key, attempt, number)
            forget_dynamic_outputs(self.active, step)
            self._interrupted_steps[step.key] = step

    def take_interrupted(self) -> list[ExecutionStep]:
        """Those that are to be sent again."""
        steps, self._interrupted_steps = list(self._interrupted_steps.values()), {}
        return steps

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
