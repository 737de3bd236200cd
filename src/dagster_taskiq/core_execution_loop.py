"""Dagster's step-delegating loop, made right for cancellation, and quick.

What it does otherwise than Dagster's own (`StepDelegatingExecutor.execute` of 1.13):

* The interrupt is forwarded to the steps whenever the run is being cancelled, also when run monitoring would resume
  the run (dagster#21476), and to all of them at once.
* It returns only when the steps' processes are gone, so a run is final after its steps; within a bound when they were
  told to stop.
* A step that its worker reports lost fails at once, with the reason, or is tried again; and so does one whose worker
  is dead. What a run that is resumed finds in flight is never started a second time under the same attempt.
* Steps are sent many at a time, and the log is read as often as something is likely to have happened.

Knows Dagster's plan and event log, and a step handler that sends and cancels; not SQS, not processes.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

from dagster import DagsterEvent, DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.cancellation.current import current_process
from dagster_taskiq.dagster_compat.api import FINISHED_STATUSES, EngineEventData
from dagster_taskiq.dagster_compat.execution import (
    ActiveExecution,
    ExecuteStepArgs,
    ExecutionPlan,
    ExecutionStep,
    InstanceConcurrencyContext,
    PlanOrchestrationContext,
    StepDelegatingExecutor,
    StepHandler,
    StepHandlerContext,
    error_info,
    interrupted_step,
)
from dagster_taskiq.dagster_compat.interrupts import DagsterExecutionInterruptedError, raise_interrupts_as
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.messages import step_task_id
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.engine_events import Stage
from dagster_taskiq.storage.event_log import RunLog, append_event, parse_event
from dagster_taskiq.storage.running_steps import RunningSteps

logger = logging.getLogger(__name__)

_BEING_STOPPED: Final = {*FINISHED_STATUSES, DagsterRunStatus.CANCELING}
_SHORTEST_REST_S: Final = 0.02
_LONGEST_REST_S: Final = 1.0
_REST_SHARE: Final = 0.1
"""Of the time since something last happened: so a step's end is noticed after a tenth of its duration at the latest."""
_LOOK_AFTER_WORKERS_EVERY_S: Final = 5.0
_SAY_WHAT_IS_WAITED_FOR_AFTER_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
_STATUS_PATIENCE_S: Final = 0.2
_BATCH: Final = 10


class Woken(Exception):
    """An interrupt has come while the loop slept."""


class TaskiqStepHandler(StepHandler):
    """What the loop asks of whoever carries out steps: as Dagster's `StepHandler`, but for many steps at a time."""

    @abstractmethod
    def open(self) -> None:
        """Begin to get ready for `launch_steps`, without waiting for it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what `open` and the others took."""

    @abstractmethod
    def launch_steps(self, contexts: Sequence[StepHandlerContext]) -> Sequence[str]:
        """Send the steps. Returns the keys of those that could not be sent now, and should be tried again.

        Raises what makes the run fail.
        """

    @abstractmethod
    def terminate_tasks(self, task_ids: Sequence[str]) -> None:
        """Ask for the steps to be stopped; never raises, may be called again."""

    @abstractmethod
    def workers_alive(self, instance: DagsterInstance, worker_ids: set[str]) -> set[str]:
        """Those that live, or may have living children."""

    @abstractmethod
    def patience_s(self, run: DagsterRun) -> float:
        """How long to wait for steps that were told to stop."""


class TaskiqExecutor(StepDelegatingExecutor):
    """Runs the steps of a plan through a `TaskiqStepHandler`."""

    def __init__(self, step_handler: TaskiqStepHandler, **options: Any) -> None:
        super().__init__(step_handler, should_verify_step=True, **options)
        self.handler = step_handler

    def execute(self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> Iterator[DagsterEvent]:
        """Execute the plan; yields the events of the run as they appear in its log."""
        self.handler.open()
        try:
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
                yield from _Loop(self, plan_context, active).run()
        finally:
            self.handler.close()

    def contexts_of(
        self,
        plan_context: PlanOrchestrationContext,
        steps: Sequence[ExecutionStep],
        active: ActiveExecution,
    ) -> list[StepHandlerContext]:
        """What a step handler is told of each step. The known state, which may be large, is made once for all."""
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

    @property
    def max_concurrent(self) -> int | None:
        """Steps at a time; None: as many as there are."""
        return self._max_concurrent


class _Loop:
    """One execution of one plan."""

    def __init__(self, executor: TaskiqExecutor, context: PlanOrchestrationContext, active: ActiveExecution) -> None:
        self._executor = executor
        self._handler = executor.handler
        self._context = context
        self._instance = context.instance
        self._run = context.dagster_run
        self._active = active
        self._log = RunLog(context.instance, context.run_id)
        self._running: dict[str, ExecutionStep] = {}
        self._unsent: dict[str, ExecutionStep] = {}
        self._unsent_tries = 0
        self._send_at = 0.0
        self._open = RunningSteps()
        self._interrupted = False
        self._something_happened_at = self._looked_after_workers_at = time.monotonic()

    def run(self) -> Iterator[DagsterEvent]:
        if self._context.resume_from_failure:
            yield from self._pick_up()
        try:
            # The order matters: get_steps_to_execute moves steps on, and between that and is_complete nothing may
            # come, or the plan could look complete between two steps.
            while not self._active.is_complete:
                if self._is_interrupted():
                    yield from self._stop()
                if self._active.has_in_flight_steps:
                    yield from self._take_in()
                list(self._active.plan_events_iterator(self._context))
                self._look_after_workers()
                list(self._active.concurrency_event_iterator(self._context))
                self._launch_what_is_due()
                self._rest()
            yield from self._see_off()
            if self._is_being_stopped():
                # The steps may have heard of it before this process did, and have cut short what came after their end.
                yield from self._stop()
        except Exception as error:
            if self._running or self._open.workers:
                self._engine_event("Unexpected exception while steps were at work; stopping them", error=repr(error))
                yield from self._forward()
            raise

    def _is_interrupted(self) -> bool:
        self._interrupted = self._active.check_for_interrupts() or self._interrupted
        return self._interrupted

    # Steps on their way

    def _launch_what_is_due(self) -> None:
        limit = self._executor.max_concurrent
        due = self._active.get_steps_to_execute(None if limit is None else limit - len(self._running))
        self._running |= {step.key: step for step in due}
        self._unsent |= {step.key: step for step in due}
        if self._unsent and time.monotonic() >= self._send_at:
            self._send(list(self._unsent.values()))

    def _send(self, steps: Sequence[ExecutionStep]) -> None:
        contexts = self._executor.contexts_of(self._context, steps, self._active)
        for start in range(0, len(steps), _BATCH):
            if self._is_interrupted():
                return  # what has not been sent is never started
            batch = steps[start : start + _BATCH]
            failed = set(self._handler.launch_steps(contexts[start : start + _BATCH]))
            for step in batch:
                if step.key not in failed:
                    self._unsent.pop(step.key, None)
            self._something_happened_at = time.monotonic()
            if failed:
                pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._unsent_tries)
                self._unsent_tries += 1
                self._send_at = time.monotonic() + pause_s
                return
        self._unsent_tries = 0

    def _take_in(self) -> Iterator[DagsterEvent]:
        for event in self._log.new_events():
            yield event
            self._hear(event)

    def _hear(self, event: DagsterEvent) -> None:
        self._open.handle_event(event)
        step = self._running.get(event.step_key or "")
        if step is None:
            # Of the run itself, or of an attempt that was given up: whatever that still says comes too late.
            return
        self._something_happened_at = time.monotonic()
        if event.is_step_skipped:
            self._running.pop(step.key)
            self._active.verify_complete(self._context, step.key)
        elif event.is_step_success or event.is_step_failure or event.is_step_up_for_retry:
            self._running.pop(step.key)
            self._active.handle_event(event)
            if not event.is_step_up_for_retry:
                self._active.verify_complete(self._context, step.key)
        else:
            self._active.handle_event(event)
            if event.is_resource_init_failure:
                self._fail(step, event.engine_event_data.error)
            elif (note := parse_event(event)) is not None and note[0] is Stage.STEP_LOST:
                self._handle_lost(step, note[1])

    def _task_id(self, step_key: str) -> str:
        """That of the step's present attempt."""
        attempt = self._active.retry_state.get_attempt_count(step_key) + 1
        return step_task_id(self._context.run_id, step_key, attempt)

    def _handle_lost(self, step: ExecutionStep, facts: dict[str, Any]) -> None:
        if facts.get(engine_events.TASK_ID_KEY) == self._task_id(step.key):
            why = f"{facts.get(engine_events.WHY_KEY)} (worker {facts.get(engine_events.WORKER_KEY)})"
            self._lose(step, why, retry=bool(facts.get(engine_events.RETRY_KEY)))

    def _lose(self, step: ExecutionStep, why: str, *, retry: bool) -> None:
        if retry:
            self._fail(step, error_info(why))
        else:
            interrupted_step(self._context.for_step(step), why)

    def _fail(self, step: ExecutionStep, error: Any) -> None:
        """Write a failure or, where the op's policy says so, a retry; it is taken in from the log as all events are."""
        self._executor.log_failure_or_retry_event_after_error(
            self._context.for_step(step), error, self._active.get_known_state()
        )

    def _look_after_workers(self, *, at_once: bool = False) -> None:
        """Now and then: are the workers alive that have our steps?"""
        now = time.monotonic()
        is_due = at_once or now - self._looked_after_workers_at >= _LOOK_AFTER_WORKERS_EVERY_S
        if not is_due or not (self._running or self._open.workers):
            return
        self._looked_after_workers_at = now
        self._log.look_again()
        step_keys = self._open.step_keys
        for task_id, worker_id in self._dead_workers().items():
            self._open.close(task_id)
            step_key = step_keys[task_id]
            if step_key in self._running and task_id == self._task_id(step_key):
                why = f"worker {worker_id}, which had step {step_key}, is gone"
                self._lose(self._running[step_key], why, retry=True)

    def _dead_workers(self) -> dict[str, str]:
        """Task id to worker, of the steps at work whose worker is dead. "Cannot tell" is alive."""
        if not self._open.workers:
            return {}
        try:
            alive = self._handler.workers_alive(self._instance, set(self._open.workers.values()))
        except Exception:
            logger.exception("cannot look after the workers; going on", extra={"run_id": self._context.run_id})
            return {}
        return {task_id: worker for task_id, worker in self._open.workers.items() if worker not in alive}

    def _rest(self) -> None:
        """Sleep for a share of the time since something happened; an interrupt ends it at once."""
        quiet_s = time.monotonic() - self._something_happened_at
        seconds = min(_LONGEST_REST_S, max(_SHORTEST_REST_S, quiet_s * _REST_SHARE))
        try:
            with raise_interrupts_as(Woken):
                time.sleep(seconds)
        except Woken:
            self._interrupted = True

    # A run that is resumed

    def _pick_up(self) -> Iterator[DagsterEvent]:
        """Find out what the run's earlier process has left: finished, at work, lost, or never sent."""
        self._engine_event("Resuming the run: looking for the steps that are at work")
        before = list(self._log.new_events())
        yield from before
        in_flight = {step.key: step for step in self._active.rebuild_from_events(before)}
        self._running = dict(in_flight)
        lost, without_resources = {}, {}
        for event in before:
            self._open.handle_event(event)
            note = parse_event(event)
            if event.step_key not in in_flight:
                continue
            if note is not None and note[0] is Stage.STEP_LOST:
                lost[event.step_key] = note[1]
            elif event.is_resource_init_failure:
                without_resources[event.step_key] = event.engine_event_data.error
            elif event.is_step_up_for_retry:
                without_resources.pop(event.step_key, None)
        for key, facts in lost.items():
            self._handle_lost(in_flight[key], facts)
        for key, error in without_resources.items():
            self._fail(in_flight[key], error)
        # A message may or may not have been sent: a second one is harmless, because an attempt is claimed once.
        self._unsent = {
            key: step
            for key, step in in_flight.items()
            if self._task_id(key) not in self._open.workers and key not in {*lost, *without_resources}
        }
        self._look_after_workers(at_once=True)

    # The end

    def _see_off(self) -> Iterator[DagsterEvent]:
        """Wait for the processes of the last steps: hooks, and resources that are given back, come after their end."""
        began, told = time.monotonic(), False
        while self._open.workers:
            if self._is_interrupted():
                yield from self._stop()
            if not told and time.monotonic() - began > _SAY_WHAT_IS_WAITED_FOR_AFTER_S:
                self._note(engine_events.waiting_for_steps(self._at_work()))
                told = True
            self._rest()
            yield from self._take_in()
            self._look_after_workers()

    def _at_work(self) -> list[str]:
        return sorted(set(self._open.step_keys.values()))

    def _stop(self) -> Iterator[DagsterEvent]:
        """Stop the steps, unless they are to go on, and raise: what was interrupted is no success.

        Not even when the plan is complete by then, as Dagster would have it: after a step's last event something of
        its process may have been cut short.
        """
        yield from self._stop_steps()
        raise DagsterExecutionInterruptedError("The run was interrupted")

    def _stop_steps(self) -> Iterator[DagsterEvent]:
        cancelled = current_process().is_cancelled()
        if current_process().is_orphaned() and not cancelled:
            self._engine_event("Interrupted, because the run's worker is gone: the next one decides about the steps")
            return
        if cancelled:
            self._make_sure_that_it_is_canceling()
        if not self._is_being_stopped() and self._instance.run_will_resume(self._context.run_id):
            self._engine_event("Interrupted; the steps go on, because the run will be resumed")
            return
        yield from self._forward()

    def _is_being_stopped(self) -> bool:
        if current_process().is_cancelled():
            return True
        run = retry_storage(lambda: self._instance.get_run_by_id(self._context.run_id), "read the run")
        return run is None or run.status in _BEING_STOPPED

    def _make_sure_that_it_is_canceling(self) -> None:
        """Before the first step stops and makes room for the next one, which looks at the status of its run.

        The cancel message may be quicker than the status that the launcher writes, and it may come without any.
        """
        until = time.monotonic() + _STATUS_PATIENCE_S
        while True:
            run = self._instance.get_run_by_id(self._context.run_id)
            if run is None or run.status in _BEING_STOPPED:
                return
            if time.monotonic() > until:
                self._instance.report_run_canceling(run)
                return
            time.sleep(_STATUS_PATIENCE_S / 20)

    def _forward(self) -> Iterator[DagsterEvent]:
        """Tell the steps, and wait until they have stopped."""
        began = time.monotonic()
        patience_s = self._handler.patience_s(self._run)
        yield from self._take_in()
        told: set[str] = set()
        if self._open.workers:
            self._note(engine_events.forwarding(self._at_work(), patience_s))
        while self._open.workers:
            # Also those that were claimed only now. Who was not claimed before the run was to be stopped is dropped.
            late = self._open.workers.keys() - told
            if late:
                self._handler.terminate_tasks([*late])
                told |= late
            if time.monotonic() - began > patience_s:
                self._note(engine_events.steps_not_stopped(self._at_work(), time.monotonic() - began))
                break
            time.sleep(_SHORTEST_REST_S)
            yield from self._take_in()
            for task_id in self._dead_workers():
                self._open.close(task_id)
        else:
            if told:
                self._note(engine_events.steps_stopped(len(told), time.monotonic() - began))
        self._write_off(told)
        yield from self._take_in()

    def _write_off(self, told: AbstractSet[str]) -> None:
        """Say of steps that had to be killed how they ended, and free what never-started ones hold."""
        storage = self._instance.event_log_storage
        for step_key, step in self._running.items():
            task_id = self._task_id(step_key)
            if task_id in self._open.workers:
                continue
            if task_id in told:
                interrupted_step(self._context.for_step(step), "stopped with its run; it had to be killed")
            elif storage.supports_global_concurrency_limits:
                storage.free_concurrency_slot_for_step(self._context.run_id, step_key)

    def _engine_event(self, message: str, error: str | None = None) -> None:
        data = EngineEventData(error=error_info(error) if error else None)
        DagsterEvent.engine_event(self._context, message, data)

    def _note(self, note: engine_events.EngineEvent) -> None:
        append_event(self._instance, self._run, note)
