"""What one worker knows of standing cancels: those that are about many tasks, of which nobody has a list.

Knows what they say, whom they mean, and how rarely they have to come back; not the queue, and not how work is stopped.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from typing import Final

from dagster_taskiq._text import clean_text
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.messages import StandingCancel
from dagster_taskiq.sqs.admin import CANCEL_RETENTION_S
from dagster_taskiq.tasks.predicates import Predicates, TaskView

logger = getLogger(__name__)

SPREAD_S: Final = 5.0
"""So long it is handed on at once, to reach all workers soon; then it comes to each of them now and then."""
EVERY_S: Final = 20
"""How often it comes to each worker then, for the sake of those that start later."""
_MOST: Final = 1_000


@dataclass(slots=True)
class _Known:
    request: StandingCancel
    cancellation: Cancellation
    sent_at: float
    until: float
    seen: int = 0
    fails: bool = False


class StandingCancels:
    """By message id. Times are seconds since the epoch, by the clock of SQS where a message has one."""

    def __init__(self, predicates: Predicates, *, now: Callable[[], float] = time.time) -> None:
        self._predicates = predicates
        self._now = now
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def see(self, message_id: str, request: StandingCancel, cancellation: Cancellation, sent_at: float) -> bool:
        """Keep it in mind. True: it was not known here."""
        new = message_id not in self._known
        if new:
            self._forget()
            until = sent_at + (CANCEL_RETENTION_S if request.ttl_s is None else request.ttl_s)
            self._known[message_id] = _Known(request, cancellation, sent_at, until)
            if request.scope == "predicate" and self._predicates.get(request.value) is None:
                text = "cancel of many tasks: no predicate %r is known here; is its module imported?"
                logger.warning(text, clean_text(request.value))
        self._known[message_id].seen += 1
        return new

    def _forget(self) -> None:
        now = self._now()
        for message_id in [key for key, known in self._known.items() if known.until < now]:
            del self._known[message_id]
        while len(self._known) >= _MOST:
            self._known.popitem(last=False)

    def is_over(self, message_id: str) -> bool:
        """Whether its time to live has ended."""
        known = self._known.get(message_id)
        return known is None or known.until < self._now()

    def spreads(self, message_id: str) -> bool:
        """Whether it was sent so recently that there are workers that have not seen it."""
        return self._now() - self._known[message_id].sent_at < SPREAD_S

    def pause_s(self, message_id: str, receive_count: int) -> int:
        """For how many seconds to hide it, so that each worker has it about every `EVERY_S` seconds.

        Who has had one of ten deliveries is one of about ten workers.
        """
        workers = max(1.0, receive_count / self._known[message_id].seen)
        return max(1, min(EVERY_S, round(EVERY_S / workers)))

    def cancellation_of(self, task: TaskView) -> Cancellation | None:
        """Of a task that is meant, and was sent before."""
        if not self._known:
            return None
        now = self._now()
        for known in self._known.values():
            if task.sent_at <= known.sent_at and now <= known.until and self._is_meant(task, known):
                return known.cancellation
        return None

    def _is_meant(self, task: TaskView, known: _Known) -> bool:
        request = known.request
        if request.scope == "group":
            return task.group == request.value
        if request.scope == "task_name":
            return task.task_name == request.value
        predicate = self._predicates.get(request.value)
        if predicate is None:
            return False
        try:
            return bool(predicate(task, **request.arguments))
        except Exception as error:  # noqa: BLE001 - code of the user's: whatever it is, this task is not meant
            if not known.fails:
                logger.warning("predicate %s failed, and cancels nothing: %r", request.value, clean_text(repr(error)))
            known.fails = True
            return False
