"""One child's life: start, wait, the ladder, and not a moment less.

    intent ─► SIGTERM to the leader, once ─► grace ─► SIGKILL to the tree ─► wait until the tree is gone

And when its work is over, and threads of it still run: patience ─► SIGKILL to the tree.

Knows children and cancellations; not Dagster, not SQS. What the end means for a run is decided by whoever asked.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from signal import Signals
from time import monotonic, time
from typing import Any, Final, Protocol

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.process.child_handle import Child, ChildSpec
from dagster_taskiq.process.step_timers import LateStep, StepObserver, StepTimers

logger = logging.getLogger(__name__)

_MOMENT_S: Final = 2.0
_STEP_IS_LATE: Final = Cancellation(CancelKind.DEADLINE, cause="a step has timed out")
_SAYS_AFTER_S: Final = 3.0
"""Whoever ends within this time is not worth an event."""
SHIM_ANSWERS_S: Final = 30.0
"""It takes milliseconds to kill a tree. A shim that has not said by then that it is gone hangs, or may not kill it."""


class Processes(Protocol):
    """What starts children: a `process.ForkServer`."""

    async def fork(self, spec: ChildSpec) -> Child:
        """Start one, which waits for its `begin`. Raises `ChildStartFailed`. When it is cancelled, there is none."""


class Observer(Protocol):
    """Called at each stage when it happens; must not block and must not raise."""

    def interrupting(self, pid: int, grace_s: float) -> None:
        """The SIGTERM is on its way."""

    def staying(self, pid: int, stays: Sequence[str], patience_s: float) -> None:
        """The child's work is over, and its threads `stays` still run; `patience_s` is the time that they have."""

    def killing(self, pid: int, waited_s: float, shield: str | None, stays: Sequence[str] | None) -> None:
        """The child did not end; the SIGKILL is on its way. `shield`: the last one in which it was, if any.

        `stays`: the threads that kept it when its work was over; None: it was not over.
        """


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a child ended. `exit_code` is negative for the signal that killed it; times are seconds since the epoch."""

    pid: int
    exit_code: int
    messages: tuple[dict[str, Any], ...]
    """The child's own messages, in order."""
    interrupted_at: float | None
    kill_at: float | None
    """When the SIGKILL was sent; None when the child went by itself."""
    killed: tuple[str, ...]
    """Processes that had to be killed, including what a child left behind."""
    gone_at: float
    abandoned: bool = False
    """Whether this worker hung, so that the child was interrupted without it."""
    late: LateStep | None = None
    """The step because of which the child was killed: it took longer than it may, and did not react."""

    @property
    def killed_by(self) -> str | None:
        """Name of the signal that ended the child, if one did."""
        return Signals(-self.exit_code).name if self.exit_code < 0 else None


async def supervise(
    processes: Processes,
    spec: ChildSpec,
    signal: CancelSignal,
    observer: Observer,
    grace_s: Callable[[Cancellation], float],
    steps: StepObserver | None = None,
) -> ChildEnd | None:
    """Start the child and see it through; returns when its whole tree is gone. Raises `ChildStartFailed`.

    None: `signal` was set before there was a child, and it has not come in the moment that it usually takes.

    Must run inside `shielded`, so that no await in here can be torn, and no `Task.cancel()` orphans the child: it is
    interrupted when `signal` is set. `grace_s` is asked when the interrupt is due: it depends on the cancellation.
    `steps`: where the child may execute steps that have limits.
    """
    child = await _forked(processes, spec, signal)
    if child is None:
        return None
    timers = StepTimers(child, steps, lambda: grace_s(_STEP_IS_LATE)) if steps is not None else None
    child.begin()
    ladder = _Ladder(child, signal, observer, timers)
    try:
        return await ladder.run(grace_s)
    finally:
        await child.close()


async def _forked(processes: Processes, spec: ChildSpec, signal: CancelSignal) -> Child | None:
    forking = asyncio.create_task(processes.fork(spec), name="fork a child")
    cancelled = asyncio.create_task(signal.wait_async(), name="await cancellation")
    await asyncio.wait({forking, cancelled}, return_when=asyncio.FIRST_COMPLETED)
    cancelled.cancel()
    # Almost there, it is better seen through than let go. But what cannot be started now can be cancelled now.
    await asyncio.wait({forking, cancelled}, timeout=_MOMENT_S)
    if not forking.done():
        forking.cancel()
        await asyncio.wait({forking})
    return None if forking.cancelled() else forking.result()


class _Ladder:
    """Intent, interrupt, grace, kill: whichever rungs it takes until the child's tree is gone."""

    def __init__(self, child: Child, signal: CancelSignal, observer: Observer, timers: StepTimers | None) -> None:
        self._timers = timers
        self._child = child
        self._signal = signal
        self._observer = observer
        self._interrupted_at: float | None = None
        self._kill_at: float | None = None

    async def run(self, grace_s: Callable[[Cancellation], float]) -> ChildEnd:
        cancelled = asyncio.create_task(self._signal.wait_async(), name="await cancellation")
        outstayed = asyncio.create_task(self._finished_but_stays(), name="await exit after finish")
        late = asyncio.create_task(self._step_must_be_killed(), name="await a step that does not react")
        alive = asyncio.create_task(self._child.live(), name=f"signs of life for child {self._child.pid}")
        try:
            happenings: set[asyncio.Future[Any]] = {self._child.exited, cancelled, outstayed, late}
            await asyncio.wait(happenings, return_when=asyncio.FIRST_COMPLETED)
            if not self._child.exited.done():
                cancellation = self._signal.cancellation
                if cancellation is not None:
                    if self._timers is not None:
                        self._timers.give_way()
                    await self._interrupt_then_kill(cancellation, grace_s(cancellation))
                elif late.done():
                    self._kill_at = time()
                    self._child.kill()
                else:
                    self._kill(monotonic() - self._child.finished_at)
        finally:
            for helper in (cancelled, outstayed, late):
                helper.cancel()
            await asyncio.wait({cancelled, outstayed, late})
        # What is left behind when the leader ended by itself lingers first; then the shim kills that, too.
        lingers_s = self._child.spec.linger_s if self._kill_at is None else 0.0
        await asyncio.wait({self._child.gone}, timeout=lingers_s + SHIM_ANSWERS_S)
        if not self._child.gone.done():
            logger.warning("the shim of a child does not answer; killing it", extra={"pid": self._child.pid})
            self._child.kill_shim()
        killed = await self._child.gone
        gone_at = time()
        alive.cancel()
        await asyncio.wait({alive})
        if self._timers is not None:
            await self._timers.settled()
        return ChildEnd(
            pid=self._child.pid,
            exit_code=self._child.exited.result(),
            messages=tuple(self._child.messages),
            interrupted_at=self._interrupted_at,
            kill_at=self._kill_at,
            killed=killed,
            gone_at=gone_at,
            abandoned=self._child.abandoned,
            late=self._timers.killer if self._timers is not None and self._kill_at is not None else None,
        )

    async def _step_must_be_killed(self) -> None:
        """Returns when a step that the child executes itself has timed out, and has not ended within its grace."""
        await (self._timers.fatal if self._timers is not None else asyncio.Event()).wait()

    async def _interrupt_then_kill(self, cancellation: Cancellation, grace_s: float) -> None:
        # The child must know what this is before the signal comes: of a shutdown, the run may go on elsewhere.
        intent = {"intent": cancellation.kind.name, "reason": cancellation.reason, "by": cancellation.requested_by}
        self._child.send(intent | {"cause": cancellation.cause, "deadline": time() + grace_s})
        self._interrupted_at = time()
        self._observer.interrupting(self._child.pid, grace_s)  # first: the op answers within a millisecond
        self._child.interrupt()
        # What has finished may go on where it can; what nobody wants any more is not waited for.
        shuts_down = cancellation.kind is CancelKind.SHUTDOWN
        exit_s = grace_s if shuts_down else self._child.spec.cancelled_exit_patience_s
        await self._wait_for_exit(grace_s, exit_s)
        # A run that waits for its steps, on whichever workers, has the time that they have; but not in a shutdown.
        longer_s = self._child.patience_s - grace_s if not shuts_down else 0
        if not self._child.finished.is_set() and longer_s > 0:
            await self._wait_for_exit(longer_s, exit_s)
        if not self._child.exited.done():
            self._kill(time() - self._interrupted_at)

    async def _wait_for_exit(self, within_s: float, exit_s: float) -> None:
        """Until it has exited, or so much time has passed; when its work is over, `exit_s` at most."""
        until = monotonic() + within_s
        finished = asyncio.create_task(self._child.finished.wait(), name="await finish")
        happenings: set[asyncio.Future[Any]] = {self._child.exited, finished}
        await asyncio.wait(happenings, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        await asyncio.wait({finished})
        left_s = until - monotonic()
        if self._child.finished.is_set():
            left_s = min(left_s, exit_s)
        if left_s > 0:
            await asyncio.wait({self._child.exited}, timeout=left_s)

    def _kill(self, waited_s: float) -> None:
        stays = self._child.stays if self._child.finished.is_set() else None
        extra = {"pid": self._child.pid, "waited_s": waited_s, "stays": ", ".join(stays or ())}
        logger.warning("child does not end; killing it", extra=extra)
        self._kill_at = time()
        self._child.kill()
        shields = [message["shield"] for message in self._child.messages if "shield" in message]
        self._observer.killing(self._child.pid, waited_s, str(shields[-1]) if shields else None, stays)

    async def _finished_but_stays(self) -> None:
        """Returns when the child's work has been over for longer than the patience, and it has not ended."""
        await self._child.finished.wait()
        spec = self._child.spec
        patience_s = spec.exit_patience_s
        if self._timers is not None and self._timers.any_late and spec.is_one_step:
            patience_s = spec.cancelled_exit_patience_s
        await asyncio.sleep(min(_SAYS_AFTER_S, patience_s))
        if patience_s > _SAYS_AFTER_S:
            self._observer.staying(self._child.pid, self._child.stays, patience_s)
            await asyncio.sleep(patience_s - _SAYS_AFTER_S)
