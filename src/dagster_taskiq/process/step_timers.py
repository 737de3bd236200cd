"""The steps of one child that may take only so long: their timers, and the ladder for one step alone.

    time is up ─► what it is told, and a nudge to its process ─► grace ─► SIGKILL to its process tree

The child says when a step begins, is left, and is over. The time is kept here, outside, so that code that keeps the
interpreter lock, or a process that was stopped, changes nothing. Knows children; not Dagster.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any, Protocol

from dagster_taskiq.process.child_handle import KILLED_WITHIN_S, Child

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LateStep:
    """A step that takes, or took, longer than it may. `pid`: the process that executes it."""

    name: str
    step_key: str
    pid: int
    reason: str
    run_id: str
    mark: str
    """In the environment of what it starts: `name=value`."""
    has_handlers: bool
    """Whether there are cleanup handlers to be run when it has stopped."""


class StepObserver(Protocol):
    """What is done about late steps besides, by whoever supervises the child."""

    def step_interrupting(self, step: LateStep, grace_s: float) -> None:
        """Its time is up. Must not block and must not raise, as the next one."""

    def step_killing(self, step: LateStep, waited_s: float, shield: str | None) -> None:
        """It did not end; the SIGKILL is on its way."""

    async def clean_up(self, step: LateStep) -> None:
        """It has stopped, and has handlers: run them. Must not raise."""


@dataclass(slots=True)
class _Timed:
    step: LateStep
    timer: asyncio.TimerHandle | None = None
    late_since: float | None = None
    """By the monotonic clock, when it was interrupted."""
    said_before: int = 0
    """How many messages the child had sent by then."""
    is_ending: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when what it has started is gone, and its process, if it had to be killed."""


class StepTimers:
    """Of one child. `grace_s`: seconds between interrupt and kill."""

    def __init__(self, child: Child, observer: StepObserver, grace_s: Callable[[], float]) -> None:
        self._child = child
        self._observer = observer
        self._grace_s = grace_s
        self._steps: dict[str, _Timed] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._stopped = False
        self.any_late = False
        """Whether a step has timed out."""
        self.fatal = asyncio.Event()
        """Set when the child itself is to be killed, because of `killer`."""
        self.killer: LateStep | None = None
        child.on_step = self._hear

    def give_way(self) -> None:
        """The whole child is being cancelled, and that decides."""
        self.stop()
        self.killer = None

    def stop(self) -> None:
        """No step is interrupted or killed any more."""
        self._stopped = True
        for timed in self._steps.values():
            self._disarm(timed)
            timed.ended.set()

    async def settled(self) -> None:
        """Until nothing is being done about late steps any more. With the handlers of the one that took the child."""
        self.stop()
        if self._endings:
            await asyncio.wait(self._endings)
        if self.killer is not None and self.killer.has_handlers:
            await self._observer.clean_up(self.killer)

    def _hear(self, about: str, value: Any) -> None:
        """What the child says, and its shim."""
        try:
            if about == "step_limit":
                self._begin(value)
            elif (timed := self._steps.get(str(value))) is not None:
                self._hear_of(timed, about)
        except (KeyError, TypeError, ValueError):
            logger.warning("not understood of a step: %s", about, extra={"pid": self._child.pid}, exc_info=True)

    def _begin(self, value: Any) -> None:
        step = LateStep(
            name=str(value["name"]),
            step_key=str(value["step_key"]),
            pid=int(value["pid"]),
            reason=str(value["reason"]),
            run_id=str(value["run_id"]),
            mark=str(value["mark"]),
            has_handlers=bool(value["handlers"]),
        )
        if not self._stopped:
            timed = self._steps[step.name] = _Timed(step)
            loop = asyncio.get_running_loop()
            timed.timer = loop.call_later(float(value["seconds"]), self._interrupt, timed)

    def _hear_of(self, timed: _Timed, about: str) -> None:
        if about == "step_ended":
            timed.ended.set()
            return
        self._disarm(timed)
        if about == "step_finished":
            # The run's process waits for the exit of the step's, which waits for threads that the op has left.
            patience_s = self._child.spec.cancelled_exit_patience_s
            if not self._stopped:
                loop = asyncio.get_running_loop()
                timed.timer = loop.call_later(patience_s, self._kill_what_stays, timed, patience_s)
        elif about != "step_over" and timed.late_since is not None:  # it has left the op, or its process is gone
            self._end(timed, None)
        elif not timed.is_ending:
            del self._steps[timed.step.name]

    def _interrupt(self, timed: _Timed) -> None:
        step, grace_s = timed.step, self._grace_s()
        timed.late_since, timed.said_before, self.any_late = monotonic(), len(self._child.messages), True
        said = {"step_deadline": step.name, "pid": step.pid, "reason": step.reason, "deadline": time() + grace_s}
        self._child.send(said)
        self._observer.step_interrupting(step, grace_s)  # first: the op answers within a millisecond
        self._child.nudge(step.pid)
        timed.timer = asyncio.get_running_loop().call_later(grace_s, self._kill, timed)

    def _kill(self, timed: _Timed) -> None:
        step, waited_s = timed.step, monotonic() - (timed.late_since or 0)
        logger.warning("step does not end; killing it", extra={"pid": step.pid, "step_key": step.step_key})
        said = self._child.messages[timed.said_before :]
        shields = [message["shield"] for message in said if "shield" in message]
        self._observer.step_killing(step, waited_s, str(shields[-1]) if shields else None)
        if step.pid == self._child.pid:
            self.killer = step
            self.fatal.set()
        else:
            self._end(timed, step.pid)

    def _kill_what_stays(self, timed: _Timed, waited_s: float) -> None:
        step = timed.step
        logger.warning("process of a late step does not end", extra={"pid": step.pid, "step_key": step.step_key})
        self._observer.step_killing(step, waited_s, None)
        self._child.end_step(step.name, step.mark, step.pid)

    def _end(self, timed: _Timed, pid: int | None) -> None:
        if timed.is_ending:
            return
        timed.is_ending = True
        ending = asyncio.create_task(self._end_and_clean_up(timed, pid), name=f"end step {timed.step.step_key}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _end_and_clean_up(self, timed: _Timed, pid: int | None) -> None:
        step = timed.step
        self._child.end_step(step.name, step.mark, pid)
        try:
            async with asyncio.timeout(KILLED_WITHIN_S):
                await timed.ended.wait()
        except TimeoutError:  # as of a whole tree: what the kernel does not let go of does nothing any more
            extra = {"pid": step.pid, "step_key": step.step_key}
            logger.error("processes of a late step cannot be killed; going on without them", extra=extra)  # noqa: TRY400
        if step.has_handlers and not self._stopped:
            await self._observer.clean_up(step)
        self._child.send({"step_cleaned": step.name})

    @staticmethod
    def _disarm(timed: _Timed) -> None:
        if timed.timer is not None:
            timed.timer.cancel()
            timed.timer = None
