"""What one worker knows of standing cancels: those that are about many tasks, of which nobody has a list.

Knows what they say, whom they mean, and how rarely they have to come back; not the queue, and not how work is stopped.
"""

import inspect
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from typing import Final

from dagster_taskiq._text import clean_text
from dagster_taskiq._ttl_cache import TTLCache
from dagster_taskiq.cancellation.model import Cancellation
from dagster_taskiq.messages import StandingCancel
from dagster_taskiq.sqs.admin import CANCEL_RETENTION_S
from dagster_taskiq.tasks.predicates import Predicates, TaskView

logger = getLogger(__name__)

SPREAD_S: Final = 5.0
"""So long it is handed on at once, to reach all workers soon; then it comes to each of them now and then."""
EVERY_S: Final = 20
"""How often it comes to each worker then, for the sake of those that start later."""
FORGOTTEN_S: Final = 300
"""So rarely the message of one comes back that had to be forgotten: nobody needs it."""
CLOCKS_DIFFER_S: Final = 300.0
"""So long after its end a message is deleted also by who has not known it all the time, and only has a clock."""
_MOST: Final = 1_000


@dataclass(slots=True)
class _Known:
    request: StandingCancel
    cancellation: Cancellation
    sent_at: float
    until: float
    first_at: float
    """When it was first seen here, by the clock of this machine."""
    gone_at: float
    """From when on nobody needs its message, whatever the clocks of the others say."""
    seen: int = 0
    fails: bool = False


class StandingCancels:
    """By message id. Times are seconds since the epoch, by the clock of SQS where a message has one."""

    def __init__(self, predicates: Predicates, *, now: Callable[[], float] = time.time) -> None:
        self._predicates = predicates
        self._now = now
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._forgotten: TTLCache[float] = TTLCache()
        """Until when the messages are kept for which there was no room. Taking them anew would push out others."""
        self._forgets = False

    def see(self, message_id: str, request: StandingCancel, cancellation: Cancellation, sent_at: float) -> bool:
        """Keep it in mind. True: it was not known here."""
        if message_id in self._forgotten:
            return False
        new = message_id not in self._known
        if new:
            now = self._now()
            self._forget(now)
            ttl_s = CANCEL_RETENTION_S if request.ttl_s is None else request.ttl_s
            until = sent_at + ttl_s
            gone_at = min(now + ttl_s, until + CLOCKS_DIFFER_S)
            self._known[message_id] = _Known(request, cancellation, sent_at, until, now, gone_at)
            if request.scope == "predicate" and self._predicates.get(request.value) is None:
                text = "cancel of many tasks: no predicate %r is known here; is its module imported?"
                logger.warning(text, clean_text(request.value))
        self._known[message_id].seen += 1
        return new

    def _forget(self, now: float) -> None:
        for message_id in [key for key, known in self._known.items() if known.gone_at < now]:
            del self._known[message_id]
        while len(self._known) >= _MOST:
            message_id, known = self._known.popitem(last=False)
            if not self._forgets:
                self._forgets = True
                logger.warning("more than %d cancels of many tasks stand; the oldest are forgotten", _MOST)
            self._forgotten.add(message_id, known.gone_at)

    def is_over(self, message_id: str) -> bool:
        """Whether its time to live has ended, by the clock of any machine: nobody needs its message."""
        known = self._known.get(message_id)
        gone_at = known.gone_at if known is not None else self._forgotten.get(message_id)
        return gone_at is None or gone_at < self._now()

    def spreads(self, message_id: str) -> bool:
        """Whether it was sent so recently that there are workers that have not seen it."""
        known = self._known.get(message_id)
        # Since it was seen here, too: whose clock is behind would have it go round until that has caught up.
        return known is not None and self._now() - min(known.sent_at, known.first_at) < SPREAD_S

    def pause_s(self, message_id: str, receive_count: int) -> int:
        """For how many seconds to hide it, so that each worker has it about every `EVERY_S` seconds.

        Who has had one of ten deliveries is one of about ten workers.
        """
        known = self._known.get(message_id)
        if known is None:
            return FORGOTTEN_S
        workers = max(1.0, receive_count / known.seen)
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
            return _answer(predicate(task, **request.arguments))
        except BaseException as error:  # noqa: BLE001 - code of the user's: whatever it is, this task is not meant
            if not known.fails:
                logger.warning("predicate %s failed, and cancels nothing: %r", request.value, clean_text(repr(error)))
            known.fails = True
            return False


def _answer(answer: object) -> bool:
    """Raises `TypeError` for what would always be true, and has not even begun to look at the task."""
    if inspect.iscoroutine(answer):
        answer.close()
    if inspect.isawaitable(answer) or inspect.isgenerator(answer) or inspect.isasyncgen(answer):
        raise TypeError(f"a predicate answers at once, not with a {type(answer).__name__}")
    return bool(answer)
