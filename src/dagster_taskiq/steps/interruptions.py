"""Which steps of a plan begin again when their worker was stopped or has died. Knows tags, and Dagster's plan."""

from collections.abc import Iterable, Mapping

from dagster import DagsterEvent, JobDefinition

from dagster_taskiq.dagster_compat.execution import ExecutionPlan
from dagster_taskiq.dagster_compat.step_tags import IExecutionStep, asset_tags_of, put_tags_on_steps
from dagster_taskiq.errors import SettingsError
from dagster_taskiq.settings import InterruptedSteps, checked
from dagster_taskiq.storage.engine_events import ATTEMPT_KEY, INTERRUPTION_KEY, Stage
from dagster_taskiq.storage.event_log import parse_event
from dagster_taskiq.storage.tags import INTERRUPTED_STEPS_TAG


def decide_interrupted_steps(job: JobDefinition, plan: ExecutionPlan, otherwise: InterruptedSteps) -> None:
    """Decide for all steps of a plan, and put it into their tags. Raises `SettingsError` for a tag that says neither.

    A step that makes several assets begins again only when all of them may.
    """
    found = {step.key: _of(job, step, otherwise) for step in plan.steps}
    put_tags_on_steps(plan, {step_key: {INTERRUPTED_STEPS_TAG: value} for step_key, value in found.items()})


def begins_again(tags: Mapping[str, str] | None) -> bool:
    """What `decide_interrupted_steps` has decided, by the tags of a step of its plan."""
    return (tags or {}).get(INTERRUPTED_STEPS_TAG) == "retry"


def interruptions_in(events: Iterable[DagsterEvent]) -> list[tuple[str, int, int]]:
    """Step key, attempt and number of the interruptions in a run's log."""
    found = []
    for event in events:
        parsed = parse_event(event) if event.step_key is not None else None
        if event.step_key is not None and parsed is not None and parsed[0] is Stage.STEP_INTERRUPTED:
            found.append((event.step_key, int(parsed[1][ATTEMPT_KEY]), int(parsed[1][INTERRUPTION_KEY])))
    return found


def without_interrupted(events: Iterable[DagsterEvent]) -> list[DagsterEvent]:
    """Without the outputs of tries that were interrupted, which Dagster would count with those of the next one."""
    kept: list[DagsterEvent] = []
    for event in events:
        kept.append(event)
        if interruptions_in([event]):
            kept = [one for one in kept if one.step_key != event.step_key or not one.is_successful_output]
    return kept


def _of(job: JobDefinition, step: IExecutionStep, otherwise: InterruptedSteps) -> str:
    of_op = _read(step.tags or {}, f"step {step.key}")
    if of_op is not None:
        return of_op
    of_assets = [_read(tags, f"asset {name}") or otherwise for name, tags in asset_tags_of(job, step).items()]
    return "retry" if all(value == "retry" for value in of_assets or [otherwise]) else "fail"


def _read(tags: Mapping[str, str], whose: str) -> str | None:
    if INTERRUPTED_STEPS_TAG not in tags:
        return None
    try:
        return str(checked("interrupted_steps", tags[INTERRUPTED_STEPS_TAG]))
    except SettingsError as error:
        raise SettingsError(f"{whose}, tag {INTERRUPTED_STEPS_TAG}: {error}") from error
