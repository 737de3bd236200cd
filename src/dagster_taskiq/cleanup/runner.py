"""Running the cleanup handlers of a run that was cancelled, in a process of its own, after its work has stopped.

Knows Dagster's definitions and events and the handlers; not how the process came about. What was done is in the
event log, so that whoever comes next (this process may be killed) goes on with what is left. At least once.
"""

import asyncio
import faulthandler
import heapq
import inspect
import itertools
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, build_resources

from dagster_taskiq.cleanup.plan import CleanupHistory, PendingHandler, read_history
from dagster_taskiq.dagster_compat.definitions import job_of, resource_config, resources_for, run_logger
from dagster_taskiq.dagster_compat.interrupts import raise_interrupts_as
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.storage import outages
from dagster_taskiq.storage import engine_events
from dagster_taskiq.storage.engine_events import OF_KEY
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.step_state import forget_states, state_of

logger = logging.getLogger(__name__)

HARD_TIMEOUT_S: Final = 5.0
"""After its timeout, what a handler has that does not react to it; then its process is ended."""
_MOST_BEGINNINGS: Final = 10
"""Without a single attempt that came to an end: then it is the cleanup that ends its workers."""
_MAX_ERROR: Final = 500


@dataclass(frozen=True, slots=True)
class CleanupContext:
    """What a cleanup handler is told."""

    run_id: str
    job_name: str
    step_key: str | None
    """The step that was cut short; of a graph its path; None: the handler is that of the whole job."""
    op_config: Any
    """The op's configuration, with its defaults; None for a graph or a job."""
    tags: Mapping[str, str]
    """Of the run."""
    state: Mapping[str, Any]
    """What the op has kept in `token.state`; may be changed, too. For a graph or a job: by step key, to be read."""
    reason: str | None
    """What the canceller said, or None."""
    requested_by: str | None
    """Who asked for it, or None if that is not known."""
    attempt: int
    """Of this handler, from 1."""
    log: logging.Logger
    """Writes into the run's event log."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a run's cleanup. `failures`: one line for each handler that has no attempt left."""

    failures: tuple[str, ...] = ()
    stopped: bool = False
    """Whether it was interrupted, and has to go on elsewhere."""


class Stopped(BaseException):
    """SIGTERM: the worker shuts down."""


class _OutOfTime(BaseException):
    """An attempt has used up its time; no `except Exception` of the handler's may hide that."""


class Cleanup:
    """The cleanup of one run."""

    def __init__(
        self,
        instance: DagsterInstance,
        run: DagsterRun,
        who: str,
        *,
        anew: bool = False,
        tell: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        """`who` does it. `anew`: attempts that have failed so far do not count. `tell` is told what is being done."""
        self._instance = instance
        self._run = run
        self._who = who
        self._anew = anew
        self._tell = tell
        self._job: Any = None
        self._history = CleanupHistory()

    def run(self) -> Outcome:
        """Run what is outstanding, each handler until it succeeds or has no attempt left."""
        self._history = read_history(self._instance, self._run)
        if self._anew:
            self._history.attempts.clear()
            self._history.beginnings = 0
        try:
            self._job = job_of(self._run, self._instance)
            duties = list(self._history.outstanding(self._job, self._run))
        except outages():
            raise  # that passes, and says nothing of the handlers
        except Exception as error:  # noqa: BLE001 - the user's code cannot be loaded, above all
            traceback.print_exc()
            return self._end([f"the handlers could not be looked up: {_in_words(error)}"])
        if self._history.beginnings >= _MOST_BEGINNINGS:
            return self._end([f"{self._history.beginnings} workers ended while they ran it"])
        if duties:
            self._note(engine_events.cleanup_began(self._who, [duty.name for duty in duties]))
        try:
            self._work_off(duties)
        except Stopped:
            return Outcome(stopped=True)
        failures = [f"{duty.name}: {duty.failed[-1]}" for duty in duties if duty.key not in self._history.done]
        return self._end(failures)

    def _end(self, failures: Sequence[str]) -> Outcome:
        self._note(engine_events.cleanup_ended(failures))
        if not failures:
            forget_states(self._instance, self._run.run_id)
        return Outcome(tuple(failures))

    def _work_off(self, duties: Sequence[PendingHandler]) -> None:
        order = itertools.count()
        due = [(0.0, next(order), duty) for duty in duties if not duty.exhausted]
        heapq.heapify(due)
        while due:
            at, _, duty = heapq.heappop(due)
            with raise_interrupts_as(Stopped):
                time.sleep(max(0.0, at - time.monotonic()))
            pause_s = self._attempt(duty)
            if pause_s is not None:
                heapq.heappush(due, (time.monotonic() + pause_s, next(order), duty))

    def _attempt(self, duty: PendingHandler) -> float | None:
        """One attempt, and its event; the seconds until the next one."""
        attempt = len(duty.failed) + 1
        self._tell(
            {
                "of": duty.step_key,
                "whole": duty.whole,
                "handler": duty.handler.name,
                "attempt": attempt,
                "timeout_s": duty.handler.timeout_s,
                "at": time.time(),
            }
        )
        began = time.monotonic()
        try:
            self._call(duty, attempt)
        except (Stopped, KeyboardInterrupt):
            raise Stopped from None
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises is the end of an attempt
            traceback.print_exc()
            duty.failed.append(_in_words(error))
        else:
            self._history.done.add(duty.key)
        seconds = time.monotonic() - began
        failure = None if duty.key in self._history.done else duty.failed[-1]
        pause_s, then = None, "" if failure is None else "no attempt is left"
        if failure is not None and not duty.exhausted and duty.policy is not None:
            pause_s = float(duty.policy.calculate_delay(attempt))
            then = f"the next one in {pause_s:.3g} s"
        note = engine_events.cleanup(duty.handler.name, attempt, seconds, failure, then)
        write_attempt(self._instance, self._run, duty.step_key, note, whole=duty.whole)
        self._tell({"ended": "failed" if failure else "succeeded"})
        return pause_s

    def _call(self, duty: PendingHandler, attempt: int) -> None:
        run, history = self._run, self._history
        states = {key: state_of(self._instance, run.run_id, key) for key in duty.steps}
        log = run_logger(self._instance, run, None if duty.whole else duty.step_key)
        context = CleanupContext(
            run_id=run.run_id,
            job_name=run.job_name,
            step_key=duty.step_key,
            op_config=duty.op_config,
            tags=run.tags,
            state=states if duty.whole else states[duty.steps[0]],
            reason=history.reason,
            requested_by=history.requested_by,
            attempt=attempt,
            log=log,
        )
        keys = _resource_keys(duty.handler.call)
        with _limited(duty.handler.timeout_s), raise_interrupts_as(Stopped):
            definitions = resources_for(self._job, keys)
            config = resource_config(run, definitions)
            with build_resources(
                definitions, instance=self._instance, resource_config=config, dagster_run=run, log_manager=log
            ) as resources:
                asked = {key: getattr(resources, key) for key in keys}
                result = duty.handler.call(context, **asked)
                if inspect.isawaitable(result):
                    asyncio.run(_await(result))

    def _note(self, note: engine_events.EngineEvent) -> None:
        retry_storage(lambda: append_event(self._instance, self._run, note), "write to the event log")


async def _await(result: Any) -> None:
    await result


def write_attempt(
    instance: DagsterInstance, run: DagsterRun, step_key: str | None, note: engine_events.EngineEvent, *, whole: bool
) -> None:
    """Tell how an attempt has ended; patient with the database, because otherwise it would be made again."""
    note = engine_events.with_facts(note, {OF_KEY: step_key or ""})
    retry_storage(
        lambda: append_event(instance, run, note, None if whole else step_key), "tell how a cleanup attempt has ended"
    )


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTime` in the block when it is over; and what does not react to that ends with the process.

    The latter by a thread that needs no interpreter lock, because it may be held by what does not react.
    """

    def out_of_time(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, out_of_time)
    faulthandler.dump_traceback_later(seconds + HARD_TIMEOUT_S, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(f"it took longer than its timeout of {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def _resource_keys(handler: Callable[..., Any]) -> list[str]:
    """The parameters of a handler after the first: resources that it asks for by their names."""
    parameters = list(inspect.signature(handler).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        parameter.name
        for parameter in parameters[1:]
        if parameter.kind in named and parameter.default is inspect.Parameter.empty
    ]


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:_MAX_ERROR]
