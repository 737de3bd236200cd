"""Blocking calls from asyncio that may never return: a thread for each, a bound, and a fresh thread afterwards. A leaf.

Not asyncio's own threads (`asyncio.to_thread`): they are few, everybody shares them, one that hangs is lost for good,
and `asyncio.run` waits for it at the end.
"""

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

from dagster_taskiq._time_limit import CALL_S, time_limit

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_MOST_IDLE: Final = 4
_MARGIN_S: Final = 0.5
"""For a call to raise what its own time limit makes it raise."""


class Lane:
    """As many threads as there are calls at a time. Whoever must not be deaf because of others has one of its own."""

    def __init__(self, name: str, within_s: float = CALL_S) -> None:
        """`name`: of its threads, in the log. `within_s`: the bound of each call, in seconds."""
        self._name = name
        self._within_s = within_s
        self._idle: list[_Thread] = []  # appending and popping are atomic
        self._hangs = False

    async def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """`function(*args, **kwargs)` in a thread, under a `time_limit`. Raises what it raises, and `TimeoutError`.

        After the bound, or when the caller is cancelled, nobody waits any more. The thread goes on until its call
        returns: what it does must be harmless when it is late.
        """

        def limited() -> _T:
            with time_limit(self._within_s):
                return function(*args, **kwargs)

        context = contextvars.copy_context()
        try:
            thread = self._idle.pop()
        except IndexError:
            thread = _Thread(self._name, self._idle)
        answer = asyncio.wrap_future(thread.start(lambda: context.run(limited)))
        try:
            done, _ = await asyncio.wait({answer}, timeout=self._within_s + _MARGIN_S)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        if done:
            self._hangs = False
            return answer.result()
        answer.cancel()
        thread.is_abandoned = True
        if not self._hangs:
            self._hangs = True  # what hangs after it is the same outage
            logger.warning("a call hangs, going on without it: %s", self._name)
        raise TimeoutError(f"no answer within {self._within_s:g} s")

    def close(self) -> None:
        """End the threads that have nothing to do; the others end after their call."""
        while self._idle:
            self._idle.pop().end()


class _Thread:
    """Makes one call after the other, and is in `idle` in between. A daemon: it never keeps a process from its end."""

    def __init__(self, name: str, idle: "list[_Thread]") -> None:
        self.is_abandoned = False
        self._idle = idle
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def start(self, call: Callable[[], _T]) -> "Future[_T]":
        future: Future[_T] = Future()
        self._calls.put((call, future))
        return future

    def end(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        while (given := self._calls.get()) is not None:
            call, future = given
            error: BaseException | None = None
            result = None
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as raised:  # noqa: BLE001 - it is for the caller
                    error = raised
            goes_on = not self.is_abandoned and len(self._idle) < _MOST_IDLE
            if goes_on:
                self._idle.append(self)
            if future.running():
                future.set_result(result) if error is None else future.set_exception(error)
            if not goes_on:
                return
            del given, call, future, result, error  # nothing is kept alive by a thread that waits
