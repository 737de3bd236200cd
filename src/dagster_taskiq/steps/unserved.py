"""Say in a run's log for which routes its steps wait although no worker serves them. Knows the plan; not heartbeats."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from dagster import DagsterEvent

from dagster_taskiq.steps.plan import Plan
from dagster_taskiq.storage.engine_events import ROUTE_KEY, Stage
from dagster_taskiq.storage.event_log import parse_event
from dagster_taskiq.storage.step_events import steps_without_worker

logger = logging.getLogger(__name__)

_NOTED_AFTER_S: Final = 60.0
_COUNT_EVERY_S: Final = 5.0
_LOOK_EVERY_S: Final = 30.0


class Unserved:
    """Writes of each route once. Keep the object."""

    def __init__(self, plan: Plan, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._clock = clock
        self._since: dict[str, float] = {}
        """By task id, when it was first seen to wait."""
        self._noted: set[str] = set()
        self._count_at = self._look_at = clock()

    def remember(self, event: DagsterEvent) -> None:
        """What an earlier process of the run has written is not written again."""
        parsed = parse_event(event)
        if parsed is not None and parsed[0] is Stage.WAITING and ROUTE_KEY in parsed[1]:
            self._noted.add(str(parsed[1][ROUTE_KEY]))

    def note(self, waiting: Callable[[], Mapping[str, str]]) -> None:
        """Never raises. Workers are asked for twice a minute at most, and only when a step has waited for a minute.

        `waiting`: by task id, the keys of the steps that were sent and that no worker has.
        """
        now = self._clock()
        if now < self._count_at:
            return
        self._count_at = now + _COUNT_EVERY_S
        try:
            self._note(waiting(), now)
        except Exception:
            logger.exception("it could not be noted that steps wait", extra={"run_id": self._plan.context.run_id})

    def _note(self, waiting: Mapping[str, str], now: float) -> None:
        self._since = {task_id: self._since.get(task_id, now) for task_id in waiting}
        late: dict[str, list[str]] = {}
        for task_id, step_key in waiting.items():
            route = self._plan.route_of(step_key)
            if now - self._since[task_id] >= _NOTED_AFTER_S and route not in self._noted:
                late.setdefault(route, []).append(step_key)
        if not late or now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY_S
        for route in sorted(self._plan.handler.unserved(self._plan.instance, set(late))):
            self._plan.append(steps_without_worker(route, sorted(late[route])))
            self._noted.add(route)
