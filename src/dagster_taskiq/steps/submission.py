"""Send the steps of a run that are due, many at a time, and again what could not be sent. Knows a step handler."""

import time
from collections.abc import Collection, Sequence
from typing import Final

from dagster_taskiq.dagster_compat.execution import ExecutionStep, StepHandlerContext
from dagster_taskiq.steps.plan import Plan

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
_BATCH: Final = 10


class Submission:
    """The steps of one plan that are still to be sent."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._unsent: dict[str, ExecutionStep] = {}
        self._tries = 0
        self._send_at = 0.0

    @property
    def unsent(self) -> Collection[str]:
        """The keys of the steps that are still to be sent."""
        return self._unsent.keys()

    def add(self, steps: Sequence[ExecutionStep]) -> None:
        """They are to be sent."""
        self._unsent |= {step.key: step for step in steps}

    def send_what_is_due(self) -> None:
        """Take what the plan has ready, and send it, unless SQS did not answer a moment ago."""
        plan, limit = self._plan, self._plan.max_concurrent
        due = plan.active.get_steps_to_execute(None if limit is None else limit - len(plan.running))
        plan.running |= {step.key: step for step in due}
        self.add(due)
        self.add(plan.take_interrupted())
        if self._unsent and time.monotonic() >= self._send_at:
            self._send(list(self._unsent.values()))

    def _launch(self, contexts: Sequence[StepHandlerContext], steps: Sequence[ExecutionStep]) -> Sequence[str]:
        plan = self._plan
        return plan.handler.launch_steps(contexts, {step.key: plan.interruptions_of(step.key) for step in steps})

    def _send(self, steps: Sequence[ExecutionStep]) -> None:
        contexts = self._plan.contexts_of(steps)
        for start in range(0, len(steps), _BATCH):
            if self._plan.is_interrupted():
                return  # what has not been sent is never started
            batch = steps[start : start + _BATCH]
            failed = set(self._launch(contexts[start : start + _BATCH], batch))
            for step in batch:
                if step.key not in failed:
                    self._unsent.pop(step.key, None)
            self._plan.something_happened()
            if failed:
                self._send_at = time.monotonic() + min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._tries)
                self._tries += 1
                return
        self._tries = 0
