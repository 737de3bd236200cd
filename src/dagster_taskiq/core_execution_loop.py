"""Dagster's step-delegating loop, made right for cancellation, and quick.

What it does otherwise than Dagster's own (`StepDelegatingExecutor.execute` of 1.13):

* The interrupt is forwarded to the steps whenever the run is being cancelled, also when run monitoring would resume
  the run (dagster#21476), and to all of them at once.
* It returns only when the steps' processes are gone, so a run is final after its steps; within a bound when they were
  told to stop.
* A step that its worker reports lost fails at once, with the reason, or is tried again; and so does one whose worker
  is dead. What a run that is resumed finds in flight is never started a second time under the same attempt.
* A step that its worker's end has interrupted begins again under the same attempt, as another task, where that is
  wanted.
* Steps are sent many at a time, and the log is read as often as something is likely to have happened.

The parts are in `steps`: submission, tracking, stopping. Knows Dagster's plan; not SQS, not processes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from dagster import DagsterEvent

from dagster_taskiq.dagster_compat.execution import (
    ActiveExecution,
    ExecuteStepArgs,
    ExecutionPlan,
    ExecutionStep,
    InstanceConcurrencyContext,
    PlanOrchestrationContext,
    StepDelegatingExecutor,
    StepHandlerContext,
)
from dagster_taskiq.dagster_compat.interrupts import DagsterExecutionInterruptedError
from dagster_taskiq.steps.handler import TaskiqStepHandler as TaskiqStepHandler
from dagster_taskiq.steps.interruptions import decide_interrupted_steps
from dagster_taskiq.steps.plan import Plan
from dagster_taskiq.steps.routes import route_of_step, route_steps
from dagster_taskiq.steps.stopping import Stopping
from dagster_taskiq.steps.submission import Submission
from dagster_taskiq.steps.tracking import Tracking
from dagster_taskiq.steps.unserved import Unserved
from dagster_taskiq.storage import step_events
from dagster_taskiq.storage.celery_tags import warning_of_steps
from dagster_taskiq.storage.engine_events import goes_on_elsewhere
from dagster_taskiq.storage.event_log import append_event

_WRITE_WHAT_IS_WAITED_FOR_AFTER_S: Final = 5.0


class TaskiqExecutor(StepDelegatingExecutor):
    """Runs the steps of a plan through a `TaskiqStepHandler`."""

    def __init__(self, step_handler: TaskiqStepHandler, **options: Any) -> None:
        super().__init__(step_handler, should_verify_step=True, **options)
        self.handler = step_handler

    def execute(self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> Iterator[DagsterEvent]:
        """Execute the plan; yields the events of the run as they appear in its log."""
        self.handler.open()
        try:
            route_of_run = self._route_steps(plan_context, execution_plan)
            if not plan_context.resume_from_failure:
                _warn_of_tags(plan_context, execution_plan)
                self._announce_that_it_goes_on(plan_context)
            with (
                InstanceConcurrencyContext(plan_context.instance, plan_context.dagster_run) as pools,
                ActiveExecution(
                    execution_plan,
                    retry_mode=self.retries,
                    max_concurrent=self._max_concurrent,
                    tag_concurrency_limits=self._tag_concurrency_limits,
                    instance_concurrency_context=pools,
                    step_dependency_config=self.step_dependency_config,
                ) as active,
            ):

                def route_of(step_key: str) -> str:
                    step = execution_plan.step_dict_by_key.get(step_key)
                    return route_of_step(step.tags if step is not None else None, route_of_run)

                yield from _Loop(self._plan(plan_context, active, route_of)).run()
        finally:
            self.handler.close()

    def _announce_that_it_goes_on(self, plan_context: PlanOrchestrationContext) -> None:
        """Nothing of the run but this loop is in its process: by this event whoever finds the run alone goes on."""
        most = self.handler.max_interruptions
        if self.handler.interrupted_steps == "retry" and most > 0:
            append_event(plan_context.instance, plan_context.dagster_run, goes_on_elsewhere(most))

    def _route_steps(self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> str:
        """Decide which step goes where; returns the route of the others, which is the run's.

        Raises `UnknownRoute` for one that does not exist, before the first step is sent.
        """
        instance = plan_context.instance
        route_of_run = self.handler.route_of(instance, plan_context.dagster_run)
        job = plan_context.job.get_definition()
        decide_interrupted_steps(job, execution_plan, self.handler.interrupted_steps)
        routes = route_steps(job, execution_plan, route_of_run)
        if others := sorted(routes - {route_of_run}):
            self.handler.check_routes(instance, others)
        return route_of_run

    def _plan(
        self, plan_context: PlanOrchestrationContext, active: ActiveExecution, route_of: Callable[[str], str]
    ) -> Plan:
        def fail(step: ExecutionStep, error: Any) -> None:
            self.log_failure_or_retry_event_after_error(plan_context.for_step(step), error, active.get_known_state())

        return Plan(
            context=plan_context,
            active=active,
            handler=self.handler,
            contexts_of=lambda steps: self._contexts_of(plan_context, steps, active),
            fail=fail,
            route_of=route_of,
            max_concurrent=self._max_concurrent,
        )

    def _contexts_of(
        self,
        plan_context: PlanOrchestrationContext,
        steps: Sequence[ExecutionStep],
        active: ActiveExecution,
    ) -> list[StepHandlerContext]:
        """What a step handler needs to know of each step. The known state, which may be large, is made once for all."""
        known_state = active.get_known_state()
        origin = plan_context.reconstructable_job.get_python_origin()
        return [
            StepHandlerContext(
                instance=plan_context.instance,
                plan_context=plan_context,
                steps=[step],
                execute_step_args=ExecuteStepArgs(
                    job_origin=origin,
                    run_id=plan_context.run_id,
                    step_keys_to_execute=[step.key],
                    retry_mode=self.retries.for_inner_plan(),
                    known_state=known_state,
                    should_verify_step=True,
                ),
                dagster_run=plan_context.dagster_run,
            )
            for step in steps
        ]


def _warn_of_tags(plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> None:
    """Once in a run, when steps of it have tags that mean nothing here."""
    chosen = set(execution_plan.step_keys_to_execute)
    warning = warning_of_steps({step.key: step.tags or {} for step in execution_plan.steps if step.key in chosen})
    if warning is not None:
        append_event(plan_context.instance, plan_context.dagster_run, warning)


class _Loop:
    """One execution of one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tracking = Tracking(plan)
        self._submission = Submission(plan)
        self._stopping = Stopping(plan, self._tracking)
        self._unserved = Unserved(plan)

    def run(self) -> Iterator[DagsterEvent]:
        plan, tracking = self._plan, self._tracking
        if plan.context.resume_from_failure:
            for event in tracking.resume():
                self._unserved.remember(event)
                yield event
            # A message may or may not have been sent: a second one is harmless, because an attempt is claimed once.
            self._submission.add(tracking.unsent)
        try:
            # The order matters: get_steps_to_execute moves steps on, and between that and is_complete nothing may
            # come, or the plan could look complete between two steps.
            while not plan.active.is_complete:
                if plan.is_interrupted():
                    yield from self._stop()
                if plan.active.has_in_flight_steps:
                    yield from tracking.read_log()
                list(plan.active.plan_events_iterator(plan.context))
                tracking.look_after_workers()
                list(plan.active.concurrency_event_iterator(plan.context))
                self._submission.send_what_is_due()
                self._unserved.note(self._waiting)
                plan.rest()
            yield from self._see_off()
            if self._stopping.run_is_being_stopped():
                # The steps may know of it before this process does, and have cut short what came after their end.
                yield from self._stop()
        except Exception as error:
            if plan.running or tracking.open.workers:
                plan.engine_event("Unexpected exception while steps were at work; stopping them", error=repr(error))
                yield from self._stopping.cancel_steps()
            raise

    def _waiting(self) -> Mapping[str, str]:
        """By task id, the steps that were sent and that no worker has, as far as the log was read."""
        sent = {self._plan.task_id(key): key for key in self._plan.running if key not in self._submission.unsent}
        workers = self._tracking.open.workers
        return {task_id: key for task_id, key in sent.items() if task_id not in workers}

    def _see_off(self) -> Iterator[DagsterEvent]:
        """Wait for the processes of the last steps: hooks, and resources that are given back, come after their end."""
        plan, tracking = self._plan, self._tracking
        began, written = time.monotonic(), False
        while tracking.open.workers:
            if plan.is_interrupted():
                yield from self._stop()
            if not written and time.monotonic() - began > _WRITE_WHAT_IS_WAITED_FOR_AFTER_S:
                plan.append(step_events.waiting_for_steps(tracking.open_steps()))
                written = True
            plan.rest()
            yield from tracking.read_log()
            tracking.look_after_workers()

    def _stop(self) -> Iterator[DagsterEvent]:
        """Stop the steps, unless they are to go on, and raise: what was interrupted is no success.

        Not even when the plan is complete by then, as Dagster would have it: after a step's last event something of
        its process may have been cut short.
        """
        yield from self._stopping.stop()
        raise DagsterExecutionInterruptedError("The run was interrupted")
