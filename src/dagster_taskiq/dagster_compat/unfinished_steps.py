"""Which steps of a finished run are left to do, by its plan and its event log.

Dagster's own answer (`KnownExecutionState.build_resume_retry_reexecution`, what "from failure" in its UI means) leaves
out the mapped steps of a dynamic output that had not begun, once one of the same op has; so a run that was cancelled
among them would go on with a part of its data. What is known of outputs is Dagster's, and goes into the new run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from dagster import DagsterEventType, DagsterInstance, DagsterRun
from dagster._core.errors import DagsterRunNotFoundError
from dagster._core.execution.plan.handle import ResolvedFromDynamicStepHandle, StepHandle, UnresolvedStepHandle
from dagster._core.execution.plan.inputs import FromPendingDynamicStepOutput, FromUnresolvedStepOutput
from dagster._core.execution.plan.state import KnownExecutionState

__all__ = ["Left", "steps_left"]

_Mappings = Mapping[str, Mapping[str, list[str] | None]]
"""Step, output: the mapping keys; None when the output was skipped."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a run. `state` is what the new run has to know of the old one; Dagster's."""

    finished: tuple[str, ...]
    """Steps that succeeded or were skipped, and do not run again."""
    to_run: tuple[str, ...]
    """In the order of the plan. `mapped[?]` stands for steps that are not known before the one above them has run."""
    state: Any


def steps_left(instance: DagsterInstance, run: DagsterRun) -> Left:
    """Read a run's plan and log. Raises `LookupError` when one of them, or of a run that it went on from, is gone."""
    plan_id = run.execution_plan_snapshot_id
    if plan_id is None:
        raise LookupError("it has no plan; it failed before it was made")
    plan = _Plan(instance.get_execution_plan_snapshot(plan_id), _Log.of(instance, run))
    try:
        known = KnownExecutionState.build_for_reexecution(instance, run)
    except DagsterRunNotFoundError as error:
        raise LookupError(str(error)) from error
    state = known._replace(dynamic_mappings=plan.mappings)  # a NamedTuple's own way
    return Left(tuple(plan.finished), tuple(plan.to_run), state)


@dataclass(slots=True)
class _Log:
    """What happened to the steps of one run."""

    finished: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    mapped: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Mapping keys by step and output, of its last attempt."""

    @classmethod
    def of(cls, instance: DagsterInstance, run: DagsterRun) -> "_Log":
        kinds = DagsterEventType
        log = cls()
        begins = {kinds.STEP_START, kinds.STEP_RESTARTED}
        for entry in instance.all_logs(
            run.run_id, of_type={*begins, kinds.STEP_SUCCESS, kinds.STEP_SKIPPED, kinds.STEP_OUTPUT}
        ):
            event, key = entry.get_dagster_event(), entry.step_key
            if key is None:
                continue
            if event.event_type in begins and key not in log.finished:
                log.mapped.pop(key, None)
            elif event.event_type is kinds.STEP_SUCCESS:
                log.finished.add(key)
            elif event.event_type is kinds.STEP_SKIPPED:
                log.skipped.add(key)
            elif event.event_type is kinds.STEP_OUTPUT and event.step_output_data.mapping_key is not None:
                output = event.step_output_data
                log.mapped.setdefault(key, {}).setdefault(output.output_name, []).append(str(output.mapping_key))
        return log


class _Plan:
    """The steps that a run was to execute, one by one as far as they are known, from the first to the last."""

    def __init__(self, snapshot: Any, log: _Log) -> None:
        self._steps = {step.key: step for step in snapshot.steps}
        self._selected = set(snapshot.step_keys_to_execute or self._steps)
        self._log = log
        before = snapshot.initial_known_state
        self._past: _Mappings = before.dynamic_mappings if before is not None else {}
        self._instances: dict[str, list[str]] = {}
        self.mappings: dict[str, dict[str, list[str] | None]] = {}
        """Of each step with dynamic outputs that does not run again."""
        self.finished: list[str] = []
        self.to_run: dict[str, None] = {}
        above = {_template(key): {_template(need) for need in self._above(key)} for key in sorted(self._steps)}
        for key in TopologicalSorter(above).static_order():
            if key in self._steps:
                self._judge(key)

    def _judge(self, key: str) -> None:
        """Whether a step runs, for all the steps that it stands for. Those above it have been judged."""
        self._instances[key] = list(self._instances_of(key))
        for step in self._instances[key]:
            runs = step not in self._log.finished or any(need in self.to_run for need in self._needs_of(key, step))
            if runs and step not in self._log.skipped:
                self.to_run[step] = None
            else:
                self.finished.append(step)
        if key not in self.to_run:
            self._keep_mapping(key)

    def _keep_mapping(self, key: str) -> None:
        dynamic = [output for output in self._steps[key].outputs if output.properties and output.properties.is_dynamic]
        if dynamic and key in self._log.finished:
            mapped = self._log.mapped.get(key, {})
            nothing: Mapping[str, list[str] | None] = {
                output.name: [] if output.properties.is_required else None for output in dynamic
            }
            self.mappings[key] = {**nothing, **mapped}
        elif dynamic and key in self._log.skipped:
            self.mappings[key] = dict.fromkeys(output.name for output in dynamic)
        elif key in self._past:
            self.mappings[key] = {
                name: list(keys) if keys is not None else None for name, keys in self._past[key].items()
            }

    def _instances_of(self, key: str) -> Iterator[str]:
        """The steps that one step of the plan stands for, of those that the run was to execute."""
        handle = StepHandle.parse_from_key(key)
        known = self._mapping_keys(key) if isinstance(handle, UnresolvedStepHandle) else None
        if not isinstance(handle, UnresolvedStepHandle) or known is None:
            if key in self._selected:
                yield key
            return
        for resolved in (handle.resolve(mapping_key).to_key() for mapping_key in known):
            if key in self._selected or resolved in self._selected:
                yield resolved

    def _mapping_keys(self, key: str) -> list[str] | None:
        """Of a mapped step; None as long as they are unknown."""
        for source in (step_input.source for step_input in self._steps[key].inputs):
            if isinstance(source, (FromPendingDynamicStepOutput, FromUnresolvedStepOutput)):
                outputs = self.mappings.get(source.resolved_by_step_key)
                return None if outputs is None else outputs.get(source.resolved_by_output_name) or []
        raise LookupError(f"step {key} is mapped, and its plan does not say over what")

    def _above(self, key: str) -> Iterator[str]:
        for step_input in self._steps[key].inputs:
            yield from step_input.upstream_step_keys

    def _needs_of(self, key: str, step: str) -> Iterator[str]:
        """The steps above one, in the words of `to_run`."""
        handle = StepHandle.parse_from_key(step)
        for need in self._above(key):
            above = StepHandle.parse_from_key(need)
            if not isinstance(above, UnresolvedStepHandle):
                yield need
            elif isinstance(handle, ResolvedFromDynamicStepHandle):
                yield above.resolve(handle.mapping_key).to_key()
            else:
                yield from self._instances.get(need, ())


def _template(key: str) -> str:
    """`mapped[?]` of `mapped[a]`."""
    handle = StepHandle.parse_from_key(key)
    return handle.unresolved_form.to_key() if isinstance(handle, ResolvedFromDynamicStepHandle) else key
