"""What became of tasks that somebody wanted to cancel: read from taskiq's results, where the workers write it.

Knows result backends; no queues. A backend that fails or hangs holds up no cancellation.
"""

import asyncio
import enum
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Final

from taskiq import AsyncResultBackend
from taskiq.result_backends.dummy import DummyResultBackend

logger = getLogger(__name__)

OUTCOME_LABEL: Final = "dagster_taskiq_cancelled"
"""Of a result: the name of an outcome."""
LOOK_S: Final = 5.0
_AT_ONCE: Final = 20
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class TaskCancelOutcome(enum.StrEnum):
    """What became of one of them, in words."""

    WAITING = "was waiting, and does not begin"
    RUNNING = "was running, and was cancelled"
    FINISHED = "had finished"
    """Before it could be cancelled; if its result was there already, no message was sent."""
    UNKNOWN = "told to stop; no result so far"
    """It waits, or it is ending; or nobody has had it."""
    NO_RESULTS = "told to stop; without a result backend nobody can tell"
    NOT_SENT = "not told: the message could not be sent"


@dataclass(frozen=True, slots=True)
class TaskCancelReport:
    """What became of many cancel requests: the task ids sent, those that failed with the reason, and all of them."""

    sent: tuple[str, ...]
    failed: Mapping[str, str]
    outcomes: Mapping[str, TaskCancelOutcome]
    """Of every id that was asked for."""

    @property
    def counts(self) -> Mapping[TaskCancelOutcome, int]:
        """How many there are of each outcome, the most frequent first."""
        return dict(Counter(self.outcomes.values()).most_common())


class Results:
    """A result backend, asked with bounds."""

    def __init__(self, backend: AsyncResultBackend[Any]) -> None:
        self._backend = backend
        self._slots = asyncio.Semaphore(_AT_ONCE)

    @property
    def are_kept(self) -> bool:
        """Whether there is one: taskiq's default keeps nothing."""
        return not isinstance(self._backend, DummyResultBackend)

    async def there(self, task_ids: Iterable[str], within_s: float | None = None) -> set[str]:
        """Those that have a result. What cannot be found out within so many seconds (five) has none."""
        found: set[str] = set()
        if not self.are_kept:
            return found

        async def look(task_id: str) -> None:
            async with self._slots:
                if await self._backend.is_result_ready(task_id):
                    found.add(task_id)

        await self._all([look(task_id) for task_id in task_ids], LOOK_S if within_s is None else within_s)
        return found

    async def outcomes(self, task_ids: Iterable[str], within_s: float) -> Mapping[str, TaskCancelOutcome]:
        """Wait for their results. It reads them: a backend that forgets what was read has then forgotten them."""
        found: dict[str, TaskCancelOutcome] = {}
        missing = set(task_ids)
        until, pause_s = time.monotonic() + within_s, _FIRST_PAUSE_S

        async def read(task_id: str) -> None:
            async with self._slots:
                found[task_id] = _outcome((await self._backend.get_result(task_id)).labels.get(OUTCOME_LABEL))

        while missing and (left_s := until - time.monotonic()) > 0:
            ready = await self.there(missing, left_s)
            await self._all([read(task_id) for task_id in ready], max(LOOK_S, until - time.monotonic()))
            missing -= ready
            if missing:
                await asyncio.sleep(min(pause_s, max(0.0, until - time.monotonic())))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return found

    async def _all(self, looks: list[Any], within_s: float) -> None:
        if not looks:
            return
        tasks = [asyncio.ensure_future(look) for look in looks]
        try:
            done, late = await asyncio.wait(tasks, timeout=within_s)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        for task in late:
            task.cancel()
        errors = [error for task in done if (error := _failure_of(task)) is not None]
        if errors or late:
            why = repr(errors[0]) if errors else f"no answer within {within_s:.0f} s"
            logger.warning("cannot read results of %d tasks: %s", len(errors) + len(late), why)


def _failure_of(task: "asyncio.Task[Any]") -> BaseException | None:
    return asyncio.CancelledError("in the result backend") if task.cancelled() else task.exception()


def _outcome(label: object) -> TaskCancelOutcome:
    """A result without the label is that of a task that nobody has cancelled."""
    return TaskCancelOutcome.__members__.get(str(label), TaskCancelOutcome.FINISHED)
