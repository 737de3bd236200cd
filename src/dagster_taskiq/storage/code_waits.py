"""What no living worker has the code for waits until one comes, but only for a minute: during a deployment.

The note in the run's log is what counts: so the minute goes on when the message is handed on and when workers are
restarted. Knows runs and their logs; not how a worker finds out which code it has.
"""

import time
from typing import Final

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.storage.engine_events import TASK_ID_KEY, UNTIL_KEY, Stage, waiting_for_code
from dagster_taskiq.storage.event_log import StepRef, append_event, read_engine_events

WAITS_S: Final = 60.0
"""Long enough for a container to start, and shorter than the shortest `start_timeout_seconds` that people set."""


def waits_for_code(
    instance: DagsterInstance, run: DagsterRun, task_id: str, why: str, step: StepRef | None = None
) -> bool:
    """Whether it still may wait. Says in the run's log, the first time, until when it does. Blocks on the database.

    `task_id`: of the message; a run that is resumed later has another one, and a minute of its own.
    """
    until = waits_until(instance, run.run_id, task_id, step)
    if until is None:
        until = time.time() + WAITS_S
        append_event(instance, run, waiting_for_code(until, task_id, why), step.step_key if step is not None else None)
    return time.time() < until


def waits_until(instance: DagsterInstance, run_id: str, task_id: str, step: StepRef | None = None) -> float | None:
    """Until when it waits, or has waited, in seconds since the epoch, by the clock of the worker that looked first.

    None: its log says nothing of it. Blocks on the database.
    """
    notes = read_engine_events(instance, run_id, step)
    ends = [
        facts.get(UNTIL_KEY)
        for stage, facts in notes
        if stage is Stage.WAITING_FOR_CODE and facts.get(TASK_ID_KEY) == task_id
    ]
    return float(ends[0]) if ends and isinstance(ends[0], int | float) else None
