"""Running the cleanup handlers of a run that was cancelled, in a process of its own, after its work has stopped.

Knows Dagster's definitions and events and the handlers; not how the process was started. What was done is in the
event log. So if this process is killed, the next one continues with the rest. A handler runs at least once.
"""

import asyncio
import heapq
import inspect
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dagster import DagsterInstance, DagsterRun, build_resources

from dagster_taskiq._attempt_limit import attempt_limit
from dagster_taskiq._last_words import print_traceback
from dagster_taskiq._text import clean_text, duration
from dagster_taskiq.cleanup.plan import CleanupHistory, PendingHandler, read_history
from dagster_taskiq.dagster_compat.definitions import job_of, resource_config, resources_for, run_logger
from dagster_taskiq.dagster_compat.interrupts import raise_interrupts_as
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.storage import outages
from dagster_taskiq.storage import cleanup_events, engine_events
from dagster_taskiq.storage.engine_events import ATTEMPTS_KEY, NEXT_KEY, OF_KEY
from dagster_taskiq.storage.event_log import append_event
from dagster_taskiq.storage.step_state import forget_states, state_of

logger = logging.getLogger(__name__)

_MOST_BEGINNINGS: Final = 10
"""After so many beginnings without the end of a single attempt, the cleanup itself ends its workers."""
_MAX_ERROR: Final = 500


@dataclass(frozen=True, slots=True)
class CleanupContext:
    """What a cleanup handler gets."""

    run_id: str
    job_name: str
    step_key: str | None
    """The step that was cut short; for a graph its path; None for the handler of the whole job."""
    op_config: Any
    """The op's configuration, with its defaults; None for a graph or a job."""
    tags: Mapping[str, str]
    """The run's tags."""
    state: Mapping[str, Any]
    """What the op has kept in `token.state`; may be changed. For a graph or a job: by step key, to read only."""
    reason: str | None
    """The reason that was given with the cancellation, or None."""
    requested_by: str | None
    """Who cancelled the run, or None if that is not known."""
    attempt: int
    """Number of the attempt of this handler, from 1."""
    log: logging.Logger
    """Writes to the run's event log."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run's cleanup ended. `failures`: one line for each handler that has no attempt left."""

    failures: tuple[str, ...] = ()
    stopped: bool = False
    """Whether it was interrupted, and has to continue on another worker."""


class Stopped(BaseException):
    """SIGTERM: the worker shuts down."""


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
        """`who` runs it. `anew`: earlier failed attempts do not count. `tell` is called with what is being done."""
        self._instance = instance
        self._run = run
        self._who = who
        self._anew = anew
        self._tell = tell
        self._job: Any = None
        self._history = CleanupHistory()

    def run(self) -> Outcome:
        """Run the handlers that are due, each of them until it succeeds or has no attempt left."""
        self._history = read_history(self._instance, self._run)
        if self._anew:
            self._history.attempts.clear()
            self._history.beginnings = 0
        try:
            self._job = job_of(self._run, self._instance)
            handlers = list(self._history.outstanding(self._job, self._run))
        except outages():
            raise  # an outage ends, and has nothing to do with the handlers
        except Exception as error:  # noqa: BLE001 - mostly, the user's code cannot be loaded
            print_traceback()
            return self._end([f"the handlers could not be looked up: {_in_words(error)}"])
        if self._history.beginnings >= _MOST_BEGINNINGS:
            return self._end([f"{self._history.beginnings} workers ended while they ran it"])
        if handlers:
            self._write(cleanup_events.cleanup_began(self._who, [pending.name for pending in handlers]))
        try:
            self._run_all(handlers)
        except Stopped:
            return Outcome(stopped=True)
        failures = [f"{pending.name}: {pending.failed[-1]}" for pending in handlers if not pending.done]
        return self._end(failures)

    def run_for_step(self, step_key: str, reason: str) -> Outcome:
        """Run those of one step that has timed out, and whose run goes on; `reason` is what they are told.

        Its state stays for its next attempt. Of graphs and of the job none is due.
        """
        self._history = read_history(self._instance, self._run)
        self._history.reason, self._history.requested_by = reason, None
        self._job = job_of(self._run, self._instance)
        due = self._history.outstanding(self._job, self._run)
        handlers = [pending for pending in due if pending.step_key == step_key and not pending.whole]
        try:
            self._run_all(handlers)
        except Stopped:
            return Outcome(stopped=True)
        return Outcome(tuple(f"{pending.name}: {pending.failed[-1]}" for pending in handlers if not pending.done))

    def _end(self, failures: Sequence[str]) -> Outcome:
        self._write(cleanup_events.cleanup_ended(failures))
        if not failures:
            forget_states(self._instance, self._run.run_id)
        return Outcome(tuple(failures))

    def _run_all(self, handlers: Sequence[PendingHandler]) -> None:
        order = itertools.count()
        due = [(0.0, next(order), pending) for pending in handlers if not pending.exhausted]
        heapq.heapify(due)
        while due:
            at, _, pending = heapq.heappop(due)
            with raise_interrupts_as(Stopped):
                time.sleep(max(0.0, at - time.monotonic()))
            pause_s = self._attempt(pending)
            if pause_s is not None:
                heapq.heappush(due, (time.monotonic() + pause_s, next(order), pending))

    def _attempt(self, pending: PendingHandler) -> float | None:
        """Run one attempt and write its event; return the seconds until the next attempt, if there is one."""
        attempt = len(pending.failed) + 1
        self._tell(
            {
                "of": pending.step_key,
                "whole": pending.whole,
                "handler": pending.handler.name,
                "identity": pending.handler.identity,
                "attempt": attempt,
                "timeout_s": pending.handler.timeout_s,
                "at": time.time(),
            }
        )
        began = time.monotonic()
        try:
            self._call(pending, attempt)
        except (Stopped, KeyboardInterrupt):
            raise Stopped from None
        except BaseException as error:  # noqa: BLE001 - any error of a handler ends its attempt
            print_traceback()
            pending.failed.append(_in_words(error))
        else:
            pending.done = True
        seconds = time.monotonic() - began
        failure = None if pending.done else pending.failed[-1]
        pause_s, then = None, "" if failure is None else "no attempt is left"
        if failure is not None and not pending.exhausted and pending.policy is not None:
            pause_s = float(pending.policy.calculate_delay(attempt))
            then = f"the next one in {duration(pause_s)}"
        handler = pending.handler
        event = cleanup_events.cleanup(handler.name, handler.identity, attempt, seconds, failure, then)
        facts = {ATTEMPTS_KEY: 1 + (pending.policy.max_retries if pending.policy is not None else 0)}
        event = engine_events.with_facts(event, facts | ({NEXT_KEY: pause_s} if pause_s is not None else {}))
        write_attempt(self._instance, self._run, pending.step_key, event, whole=pending.whole)
        self._tell({"ended": "failed" if failure else "succeeded"})
        return pause_s

    def _call(self, pending: PendingHandler, attempt: int) -> None:
        run, history = self._run, self._history
        states = {key: state_of(self._instance, run.run_id, key) for key in pending.steps}
        log = run_logger(self._instance, run, None if pending.whole else pending.step_key)
        context = CleanupContext(
            run_id=run.run_id,
            job_name=run.job_name,
            step_key=pending.step_key,
            op_config=pending.op_config,
            tags=run.tags,
            state=states if pending.whole else states[pending.steps[0]],
            reason=history.reason,
            requested_by=history.requested_by,
            attempt=attempt,
            log=log,
        )
        keys = _resource_keys(pending.handler.call)
        with attempt_limit(pending.handler.timeout_s), raise_interrupts_as(Stopped):
            definitions = resources_for(self._job, keys)
            config = resource_config(run, definitions)
            with build_resources(
                definitions, instance=self._instance, resource_config=config, dagster_run=run, log_manager=log
            ) as resources:
                asked = {key: getattr(resources, key) for key in keys}
                result = pending.handler.call(context, **asked)
                if inspect.isawaitable(result):
                    asyncio.run(_await(result))

    def _write(self, event: engine_events.EngineEvent) -> None:
        retry_storage(lambda: append_event(self._instance, self._run, event), "write to the event log")


async def _await(result: Any) -> None:
    await result


def write_attempt(
    instance: DagsterInstance, run: DagsterRun, step_key: str | None, event: engine_events.EngineEvent, *, whole: bool
) -> None:
    """Write how an attempt has ended. Waits for the database, because otherwise the attempt would be repeated."""
    event = engine_events.with_facts(event, {OF_KEY: step_key or ""})
    retry_storage(
        lambda: append_event(instance, run, event, None if whole else step_key), "write how a cleanup attempt has ended"
    )


def _resource_keys(handler: Callable[..., Any]) -> list[str]:
    """The parameters of a handler after the first one: the names of the resources that it needs."""
    parameters = list(inspect.signature(handler).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        parameter.name
        for parameter in parameters[1:]
        if parameter.kind in named and parameter.default is inspect.Parameter.empty
    ]


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return clean_text(f"{type(error).__name__}: {text}" if text else type(error).__name__, _MAX_ERROR)
