"""Several queues as one, the preferred ones first, for a receiver with one set of slots.

Knows asyncio and how messages are received and handed back, as callables; not SQS, not what a message is.

Each queue has one long poll at a time, all of them side by side, so that a message begins at once wherever it comes. A
poll that still waits says that its queue is empty. Under load, when a slot becomes free, no poll waits: then a queue is
only asked when those before it have been asked and had a moment to answer. What comes when there is no slot for it is
handed back at once, of the least preferred queue first.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, Generic, TypeAlias, TypeVar

from dagster_taskiq._shield import shielded

_T = TypeVar("_T")
Receive: TypeAlias = Callable[[Callable[[], int]], Awaitable[Sequence[_T]]]
"""One long poll, of as many messages at most as the argument says when it begins."""
HEAD_START_S: Final = 0.2
"""The moment that a queue has to answer: SQS gives what waits within some 20 ms."""
_JUST_NOW_S: Final = 0.02
"""A queue that was empty so long ago is empty: its next poll follows at once."""


class PreferredQueues(Generic[_T]):
    """Of one receiver. Keeps no more messages than it has slots for."""

    def __init__(
        self,
        queues: Sequence[Receive[_T]],
        hand_back: Callable[[Sequence[_T]], Coroutine[Any, Any, None]],
        *,
        free: Callable[[], int],
        may_receive: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        """`queues`: in order of preference. `free`: the slots that are free while a message is asked for, the one for
        which it is asked included; when none is asked for, one more than are free.

        `may_receive`: awaited before each poll.
        """
        self._queues = queues
        self._hand_back = hand_back
        self._free = free
        self._may_receive = may_receive
        self._quiet = [asyncio.Event() for _ in queues]
        """Set while nothing is known to wait in that queue: it was asked, and has had its moment."""
        self._empty_at = [float("-inf") for _ in queues]
        self._kept: list[deque[_T]] = [deque() for _ in queues]
        self._is_asked = False
        self._wanted = asyncio.Event()
        """Set while somebody waits for a message, and nothing is kept."""
        self._news = asyncio.Event()

    async def messages(self) -> AsyncGenerator[_T, None]:
        """Yield what comes; who asks for the next one has a slot for it. What a poll raises ends it.

        When it is closed, what was received and not yielded is handed back.
        """
        polls = [
            asyncio.create_task(self._poll(number), name=f"receive {number}") for number in range(len(self._queues))
        ]
        for poll in polls:
            poll.add_done_callback(lambda _: self._news.set())
        try:
            while True:
                yield await self._next(polls)
        finally:
            await shielded(self._end(polls), name="hand back unstarted work")

    async def _next(self, polls: Sequence["asyncio.Task[None]"]) -> _T:
        self._is_asked = True
        try:
            while True:
                for kept in self._kept:
                    if kept:
                        return kept.popleft()
                for poll in polls:
                    if poll.done():
                        poll.result()
                self._news.clear()
                self._wanted.set()
                await self._news.wait()
        finally:
            self._is_asked = False
            self._wanted.clear()

    async def _poll(self, number: int) -> None:
        while True:
            await self._turn(number)
            loop, quiet = asyncio.get_running_loop(), self._quiet[number]
            # What was empty just now needs no moment once more: an idle receiver asks all of them without a gap.
            moment_s = 0 if loop.time() - self._empty_at[number] < _JUST_NOW_S else HEAD_START_S
            timer = loop.call_later(moment_s, quiet.set)
            try:
                received = await self._queues[number](self._room)
            finally:
                timer.cancel()
                quiet.clear()
            if received:
                await self._take(number, received)
            else:
                self._empty_at[number] = loop.time()

    async def _turn(self, number: int) -> None:
        """Until a message is wanted, and none is known to wait in a queue before this one."""
        before = self._quiet[:number]
        while True:
            await self._wanted.wait()
            if self._may_receive is not None:
                await self._may_receive()
            for quiet in before:
                await quiet.wait()
            if self._wanted.is_set() and all(quiet.is_set() for quiet in before):
                return

    def _room(self) -> int:
        """For how many messages more there are slots."""
        return self._free() - (not self._is_asked) - sum(map(len, self._kept))

    async def _take(self, number: int, received: Sequence[_T]) -> None:
        self._kept[number].extend(received)
        surplus: list[_T] = []
        for kept in reversed(self._kept):
            while kept and self._room() < 0:
                surplus.append(kept.pop())
        if any(self._kept):
            self._wanted.clear()
            self._news.set()
        if surplus:
            await shielded(self._hand_back(surplus), name="hand back what has no slot")

    async def _end(self, polls: Sequence["asyncio.Task[None]"]) -> None:
        for poll in polls:
            poll.cancel()
        await asyncio.wait(polls)
        for poll in polls:
            with suppress(asyncio.CancelledError):
                poll.exception()  # that of one that has failed is known, or comes too late
        await self._hand_back([message for kept in self._kept for message in kept])
