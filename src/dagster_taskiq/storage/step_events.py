"""The wording of the engine events about steps, and about the runs that a run has launched. Knows no storage."""

from collections.abc import Sequence

from dagster_taskiq._text import duration
from dagster_taskiq.queue_names import DEFAULT_ROUTE
from dagster_taskiq.storage.engine_events import (
    ATTEMPT_KEY,
    INTERRUPTED_KEY,
    INTERRUPTION_KEY,
    MOST_INTERRUPTIONS_KEY,
    PATIENCE_KEY,
    RETRY_KEY,
    ROUTE_KEY,
    TASK_ID_KEY,
    WHY_KEY,
    WORKER_KEY,
    EngineEvent,
    Stage,
    counted,
    listed,
)


def step_submitted(task_id: str, queue: str, route: str) -> EngineEvent:
    """The executor has sent a step to its queue."""
    facts = {TASK_ID_KEY: task_id, "queue": queue, ROUTE_KEY: route}
    return EngineEvent(Stage.SUBMITTED, f"Submitted to queue {queue} as task {task_id}", facts)


def steps_without_worker(route: str, steps: Sequence[str]) -> EngineEvent:
    """Steps were sent a minute ago or more, and nobody serves their route. Once for each route."""
    if route == DEFAULT_ROUTE:
        message = "steps wait, and no worker that takes steps is alive; start one with `dagster-taskiq worker start`"
    else:
        message = (
            f"steps wait for route {route}, of which no worker that takes steps is alive; start one with"
            f" `dagster-taskiq worker start -q {route}`"
        )
    return EngineEvent(Stage.WAITING, message, {ROUTE_KEY: route, "steps": listed(steps)}, warns=True)


def forwarding(steps: Sequence[str], patience_s: float) -> EngineEvent:
    """The run is being stopped, and its executor forwards that to the running steps."""
    which = f" ({listed(steps)})" if steps else ""
    return EngineEvent(
        Stage.FORWARDING,
        f"forwarding the interrupt to {counted(len(steps), 'step')}{which}; waiting for them to stop, at most"
        f" {patience_s:g} s",
        {"steps": len(steps), PATIENCE_KEY: patience_s},
    )


def steps_stopped(steps: int, after_s: float) -> EngineEvent:
    """All running steps have stopped."""
    message = f"{counted(steps, 'step')} stopped after {duration(after_s)}"
    return EngineEvent(Stage.STEPS_STOPPED, message, {"steps": steps})


def steps_not_stopped(steps: Sequence[str], waited_s: float) -> EngineEvent:
    """Some steps had not stopped within the limit."""
    return EngineEvent(
        Stage.STEPS_STOPPED,
        f"{counted(len(steps), 'step')} had not stopped after {duration(waited_s)}, and nobody waits any longer; their"
        f" workers stop them as soon as they see that the run is over: {listed(steps)}",
        {"steps": len(steps)},
        error="not all steps have stopped",
    )


def waiting_for_steps(steps: Sequence[str]) -> EngineEvent:
    """All steps have ended, but not all of their processes."""
    return EngineEvent(
        Stage.WAITING_FOR_STEPS,
        f"waiting for {counted(len(steps), 'step')} to run their hooks and to give back their resources:"
        f" {listed(steps)}",
        {"steps": len(steps)},
    )


def step_lost(worker_id: str, task_id: str, why: str, *, retry: bool, interrupted: bool = False) -> EngineEvent:
    """The step's process is gone and has not reported how the step ended; its run decides what follows.

    `interrupted`: because its worker was stopped, or has died.
    """
    facts: dict[str, str | int | float] = {WORKER_KEY: worker_id, TASK_ID_KEY: task_id, WHY_KEY: why, RETRY_KEY: retry}
    if interrupted:
        facts[INTERRUPTED_KEY] = True
    return EngineEvent(Stage.STEP_LOST, f"step lost on worker {worker_id}: {why}", facts)


def step_interrupted(step_key: str, task_id: str, why: str, *, attempt: int, number: int, most: int) -> EngineEvent:
    """The step's worker was stopped, or has died, and the step begins again elsewhere. `number`: of the interruption.

    `task_id`: of what was interrupted.
    """
    facts: dict[str, str | int | float] = {TASK_ID_KEY: task_id, WHY_KEY: why, ATTEMPT_KEY: attempt}
    facts |= {INTERRUPTION_KEY: number, MOST_INTERRUPTIONS_KEY: most}
    message = (
        f"step {step_key} was interrupted: {why}; it begins again elsewhere (interruption {number} of at most {most})"
    )
    return EngineEvent(Stage.STEP_INTERRUPTED, message, facts)


def interrupted_too_often(number: int, most: int) -> str:
    """Why a step does not begin again, with the next step."""
    return (
        f"it was interrupted {counted(number, 'time')}, and max_interruptions is {most}: raise it, or have workers live"
        " for longer than the step takes"
    )


def cancelling_children(run_ids: Sequence[str]) -> EngineEvent:
    """The run is being stopped, and takes the runs with it that it launched."""
    message = f"cancelling {counted(len(run_ids), 'run')} that this run launched: {listed(run_ids)}"
    return EngineEvent(Stage.CHILDREN, message, {"runs": len(run_ids)})


def children_final(runs: int, after_s: float) -> EngineEvent:
    """All of them have ended."""
    return EngineEvent(Stage.CHILDREN, f"all of them final after {duration(after_s)}", {"runs": runs})


def children_not_final(run_ids: Sequence[str], waited_s: float, why: str | None) -> EngineEvent:
    """Some of them had not ended within the limit. `why`: what is known of one of them."""
    because = f" ({why})" if why else ""
    return EngineEvent(
        Stage.CHILDREN,
        f"{counted(len(run_ids), 'run')} that this run launched had not ended after {duration(waited_s)}, and nobody"
        f" waits any longer: {listed(run_ids)}{because}",
        {"runs": len(run_ids)},
        error="not all runs that it launched have ended",
    )
