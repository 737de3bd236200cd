"""Cancel messages of work that is ending here: hidden from others until that work is settled. Knows leases, no tasks.

A worker that is killed takes no cancel with it: the message becomes visible again, before the work does.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from dagster_taskiq.sqs.lease import Lease
from dagster_taskiq.sqs.settlement import Settlement
from dagster_taskiq.tasks.cancel_queue import ReceivedCancel

_MOST: Final = 3
"""So many of one task are held at once. One would do; those that come later are kept for longer by the queue."""


class HeldCancels:
    """By task id. `lease_of` leases a message; the lease is started here."""

    def __init__(self, lease_of: Callable[[ReceivedCancel], Lease]) -> None:
        self._lease_of = lease_of
        self._held: dict[str, dict[str, tuple[ReceivedCancel, Lease]]] = {}

    def hold(self, cancel: ReceivedCancel) -> Lease | None:
        """Keep it from others. Returns the lease of an earlier receive of the same message, which is to be left."""
        of_task = self._held.setdefault(cancel.request.task_id, {})
        _, earlier = of_task.get(cancel.message_id, (None, None))
        of_task[cancel.message_id] = cancel, self._lease_of(cancel).start()
        return earlier

    def has_room(self, cancel: ReceivedCancel) -> bool:
        """Whether this one is to be held: not the hundredth that somebody has sent for the same task."""
        held = self._held.get(cancel.request.task_id, {})
        return cancel.message_id in held or sum(not lease.lost for _, lease in held.values()) < _MOST

    def of(self, task_id: str) -> ReceivedCancel | None:
        """One that is held for the task."""
        return next((cancel for cancel, _ in self._held.get(task_id, {}).values()), None)

    async def release(self, task_id: str, *, over: bool) -> None:
        """The work is settled. `over`: nobody needs its cancels any more; otherwise others may."""
        held = self._held.pop(task_id, {}).values()
        what = Settlement.DELETE if over else Settlement.HAND_BACK
        await asyncio.gather(*[lease.settle(what) for _, lease in held])
