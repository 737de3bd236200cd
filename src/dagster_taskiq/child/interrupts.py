"""The interrupts of this process: one handler, a count of open shields, and a watchdog for coroutines that block.

An interrupt is delivered once, when no shield is open, to whoever owns the work: the code in the main thread, or the
asyncio task of the op. Knows signals, asyncio and what Dagster wants; not how a process learns of a cancellation.

SIGTERM interrupts the work of the process. A step that takes longer than its limit is interrupted alone, by another
signal (`STEP_SIGNAL`), which only has the handler look at what the worker has sent: when it comes too late, and another
step is at work, it does nothing.
"""

import _thread
import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.child.op_token import OpCancelled
from dagster_taskiq.dagster_compat.interrupts import (
    DagsterExecutionInterruptedError,
    check_captured_interrupt,
    interrupt_here,
    raise_where_wanted,
    route_interrupts,
    run_coroutines_with,
)

if TYPE_CHECKING:
    from dagster_taskiq.child.step_limits import StepLimit

STEP_SIGNAL: Final = signal.SIGURG
"""The one that wakes who has missed an interrupt (`process.shim.NUDGE`): who does not expect it ignores it."""

REACTS_WITHIN_S: Final = 1.0
"""An event loop that has not reacted to its task's cancellation within this time is taken for blocked."""
_AGAIN_S: Final = 0.01
"""Between two signals to the main thread, of which the first is enough nearly always."""


class Interrupts:
    """Whether an interrupt has come to this process, whether it waits for the end of a shield, and where it goes."""

    def __init__(
        self, cancelled: CancelSignal, record: Callable[[], None], listen: Callable[[], None] = lambda: None
    ) -> None:
        """Takes over SIGTERM and SIGINT. `record` is called in the signal handler, before the work sees the interrupt.

        `cancelled`: what is known of the cancellation, and which shields are open. `listen`: called in the signal
        handler of `STEP_SIGNAL`, to receive what the worker has sent.
        """
        self.came = check_captured_interrupt()
        """Whether a signal has come, whatever became of it."""
        self.delivered = False
        """Whether the work was interrupted. Once is enough: another one would tear its `finally` blocks."""
        self._cancelled = cancelled
        self._record = record
        self._listen = listen
        self._limit: StepLimit | None = None
        self._waits = False
        self._received = 0
        self._coroutine: _Coroutine | None = None
        self._generators: dict[Any, asyncio.AbstractEventLoop] = {}
        self._is_routed = False
        self.route()
        run_coroutines_with(self._outputs)

    def route(self) -> None:
        """Take over the signals, which only the main thread can. Harmless in another one, and when it has been done."""
        if self._is_routed or threading.current_thread() is not threading.main_thread():
            return
        self._is_routed = True
        route_interrupts(self._receive, self._interrupt_step)
        signal.signal(STEP_SIGNAL, lambda *_: self._look_after_step())

    def forget(self) -> None:
        """In a fork of the process: nothing has come to this one, and it does with an interrupt what Dagster wants."""
        self.came = self.delivered = self._waits = False
        self._coroutine = self._limit = None
        self._record = lambda: None

    def step_begins(self, limit: "StepLimit") -> None:
        """Until `step_is_over` the step at work may be interrupted alone."""
        self._limit = limit

    def step_is_over(self) -> None:
        """It is written how it has ended. An interrupt of the process that came to its `finally` blocks comes now."""
        interrupted = self._limit is not None and self._limit.interrupted
        self._limit = None
        if interrupted and self._waits and not self.delivered:
            self._waits = False
            interrupt_here()

    def take(self) -> None:
        """The work interrupts itself because it knows of the cancellation: the signal that follows comes too late."""
        if self._is_delivered or threading.current_thread() is not threading.main_thread():
            return  # in another thread it ends that thread's work, and the op is still to be interrupted
        loop = _running_loop()
        if loop is None:
            self._deliver_by_token()
        elif self._coroutine is None or self._coroutine.loop is not loop:
            self._deliver_by_token()
            _cancel_others(loop)
        elif self._coroutine.is_current():
            self._coroutine.taken = True
            self._deliver_by_token()

    def shields_ended(self, *, abandoned: bool) -> None:
        """No shield is open any more: deliver the interrupt that waits, here or to the owner of the work.

        `abandoned`: the block was left because its generator is thrown away, where an error would be lost.
        """
        due = self._waits or self._cancelled.came_while_shielded or (self._limit is not None and self._limit.is_due)
        if self._is_delivered or not due:
            return
        loop = _running_loop()
        if abandoned or threading.current_thread() is not threading.main_thread():
            _thread.start_new_thread(self._interrupt_main_thread, ())
        elif loop is None:
            self._raise_here()
        elif self._coroutine is None or self._coroutine.loop is not loop:
            self._deliver_by_token()
            _cancel_others(loop)
            raise asyncio.CancelledError(self._reason)
        elif self._coroutine.is_current():
            self._coroutine.taken = True
            self._deliver_by_token()
            raise asyncio.CancelledError(self._reason)
        else:
            self._coroutine.interrupt()

    def close_generators(self) -> None:
        """At the end of a step: of an asynchronous generator that waits for its next turn the `finally` blocks run.

        Dagster leaves it to the garbage collector, which cannot await anything.
        """
        for outputs, loop in list(self._generators.items()):
            del self._generators[outputs]
            if not loop.is_closed():
                loop.run_until_complete(outputs.aclose())

    @property
    def _reason(self) -> str | None:
        cancellation = self._cancelled.cancellation
        if cancellation is None and self._limit is not None:
            cancellation = self._limit.signal.own
        return cancellation.reason if cancellation is not None else None

    @property
    def _is_alone(self) -> bool:
        """Whether what interrupts the work is the limit of the step, and the process is to go on."""
        return not self._cancelled.is_set and self._limit is not None and self._limit.signal.own is not None

    @property
    def _is_delivered(self) -> bool:
        """Whether what is at work was interrupted."""
        return self.delivered or (self._limit is not None and self._limit.interrupted)

    def note_delivery(self) -> None:
        """The work was interrupted: the process, or the step alone."""
        if self._is_alone and self._limit is not None:
            self._limit.interrupted = True
        else:
            self.delivered = True

    def _receive(self, wanted: Callable[[], object]) -> None:
        """In the signal handler."""
        self.came = True
        self._received += 1
        if self.delivered:
            return
        # In this order: a shield that is closed meanwhile, in another thread, sees that there is one.
        self._waits = True
        if self._cancelled.has_shields or self._is_delivered:  # or its step is in its `finally` blocks already
            self._record()
        elif self._coroutine is not None:
            self._record()
            self._coroutine.interrupt()
        else:
            self._waits = False
            try:
                wanted()
            except DagsterExecutionInterruptedError:
                self._record()
                self.delivered = True
                raise

    def _look_after_step(self) -> None:
        """In the signal handler: perhaps the worker has said that the step at work takes too long."""
        self._received += 1
        if self._limit is not None:
            self._listen()
            self._interrupt_step()

    def _interrupt_step(self) -> None:
        """In a signal handler, or when Dagster gives way to code of users: if it is due, and interrupts are raised."""
        limit = self._limit
        if limit is None or not limit.is_due or not self._is_alone or self.delivered or self._cancelled.has_shields:
            return
        if self._coroutine is not None:
            self._coroutine.interrupt()
            return
        try:
            raise_where_wanted()
        except BaseException:
            limit.interrupted = True
            raise

    def _interrupt_main_thread(self) -> None:
        """In a thread of its own: again and again, until the handler has run.

        CPython goes to sleep without a look at a signal that comes at the last moment, and nobody else sends another.
        The first one waits a moment, because what is raised in a generator that is thrown away is lost.
        """
        before = self._received
        while self._received == before and not self._is_delivered:
            time.sleep(_AGAIN_S)
            self.signal_main_thread()

    def signal_main_thread(self) -> None:
        """Have the handler look again."""
        ident = threading.main_thread().ident
        if ident is not None:
            signal.pthread_kill(ident, STEP_SIGNAL if self._is_alone else signal.SIGTERM)

    def _deliver_by_token(self) -> None:
        if not self._is_alone:
            self._record()
        self.note_delivery()

    def _raise_here(self) -> None:
        try:
            if self._is_alone:
                self._interrupt_step()
            else:
                interrupt_here()
        except DagsterExecutionInterruptedError:
            self.note_delivery()
            raise OpCancelled(self._reason) from None

    def _outputs(self, loop: asyncio.AbstractEventLoop, outputs: Any) -> Iterator[Any]:
        self._generators[outputs] = loop
        while True:
            try:
                output = self._run(loop, anext(outputs))
            except BaseException as error:
                self._generators.pop(outputs, None)  # it has ended
                if isinstance(error, StopAsyncIteration):
                    return
                raise
            yield output

    def _run(self, loop: asyncio.AbstractEventLoop, awaitable: Any) -> Any:
        task: asyncio.Future[Any] = asyncio.ensure_future(awaitable, loop=loop)
        if threading.current_thread() is not threading.main_thread():
            return loop.run_until_complete(task)
        self._coroutine = running = _Coroutine(self, loop, task)
        try:
            return loop.run_until_complete(task)
        except asyncio.CancelledError:
            if running.taken or self._cancelled.is_set or self._is_alone:
                raise DagsterExecutionInterruptedError from None
            raise
        finally:
            self._coroutine = None
            running.over.set()
            if running.asked and not running.taken:  # it had ended before it could be cancelled
                if self._is_alone:
                    self._interrupt_step()
                else:
                    interrupt_here()


class _Coroutine:
    """The asyncio task of an op. It is cancelled by its loop; if that is blocked, by an error in what blocks it."""

    def __init__(self, interrupts: Interrupts, loop: asyncio.AbstractEventLoop, task: "asyncio.Future[Any]") -> None:
        self.loop = loop
        self.asked = False
        self.taken = False
        """Whether it was cancelled."""
        self.over = threading.Event()
        """Set when the loop has reacted, or there is nothing more to do."""
        self._interrupts = interrupts
        self._task = task
        self._asked_at = 0.0
        self._blocked: asyncio.Future[Any] | None = None
        """Another task of the loop, that was interrupted because it blocked it."""

    def is_current(self) -> bool:
        """Whether it is the task that calls this, and not one that it has started."""
        return asyncio.current_task(self.loop) is self._task

    def interrupt(self) -> None:
        """Have it cancelled. Called again, after a while, by the watchdog's signal: interrupt what blocks the loop."""
        if not self.asked:
            self.asked = True
            self._asked_at = time.monotonic()
            self.over.clear()
            self.loop.call_soon_threadsafe(self._cancel)
            # Not threading.Thread: its locks may be held by the very code that the signal has come into.
            _thread.start_new_thread(self._watch, (self.over,))
        elif not self.over.is_set() and time.monotonic() - self._asked_at >= REACTS_WITHIN_S:
            self._raise_in_what_blocks()

    def _cancel(self) -> None:
        self.over.set()
        if self.taken or self._task.done() or (self._blocked is not None and not self._blocked.done()):
            return
        if self._interrupts._cancelled.has_shields:  # noqa: SLF001 - one piece in two classes
            self.asked = False  # it waits again
            return
        self.taken = True
        self._interrupts.note_delivery()
        self._task.cancel()

    def _raise_in_what_blocks(self) -> None:
        current = asyncio.current_task(self.loop)
        if current is None:
            return  # between two steps: it will react
        self.over.set()
        if current is self._task:
            self.taken = True
            self._interrupts.note_delivery()
        else:
            # Whoever waits for it is cancelled when its `finally` blocks have run: through them it would reach these.
            self._blocked = current
            current.add_done_callback(lambda _: self._cancel())
        raise asyncio.CancelledError(self._interrupts._reason)  # noqa: SLF001

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(REACTS_WITHIN_S):
            self._interrupts.signal_main_thread()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _cancel_others(loop: asyncio.AbstractEventLoop) -> None:
    """In a loop that the op runs itself: which task is the outermost is not known, and in an inner one it is lost."""
    current = asyncio.current_task(loop)
    for task in asyncio.all_tasks(loop):
        if task is not current:
            task.cancel()
