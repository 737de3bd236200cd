"""Which cleanup handlers are due after a run was cancelled, for which step, and with how many attempts so far.

Knows the run's event log, the job's definition and its handlers; does not call any of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun

from dagster_taskiq.cancellation.handlers import Handler, RetryPolicyLike, handlers_of
from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.dagster_compat.definitions import nodes_of, op_config, parents_of
from dagster_taskiq.dagster_compat.execution import was_interrupted
from dagster_taskiq.dagster_compat.retry import retry_storage
from dagster_taskiq.dagster_compat.storage import event_of
from dagster_taskiq.storage.engine_events import BY_KEY, FAILED_KEY, IDENTITY_KEY, OF_KEY, REASON_KEY, Stage
from dagster_taskiq.storage.event_log import parse_event
from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, own_tags

_AT_WORK: Final = {DagsterEventType.STEP_START, DagsterEventType.STEP_RESTARTED, DagsterEventType.STEP_UP_FOR_RETRY}
_BEGINS: Final = {DagsterEventType.STEP_START, DagsterEventType.STEP_RESTARTED}
_OVER: Final = {DagsterEventType.STEP_SUCCESS, DagsterEventType.STEP_SKIPPED}
_OF_STEPS: Final = {*_AT_WORK, *_OVER, DagsterEventType.STEP_FAILURE}
_WANTED: Final = {
    *_OF_STEPS,
    DagsterEventType.RUN_START,
    DagsterEventType.RUN_CANCELING,
    DagsterEventType.RUN_CANCELED,
    DagsterEventType.ENGINE_EVENT,
}
_STOPPING: Final = {DagsterEventType.RUN_CANCELING, DagsterEventType.RUN_CANCELED}


@dataclass(slots=True)
class PendingHandler:
    """One handler that has to be run for one step, graph, or the job."""

    step_key: str | None
    handler: Handler
    policy: RetryPolicyLike | None
    op_config: Any
    steps: tuple[str, ...]
    """The steps whose states it can read."""
    whole: bool
    """Whether it is the handler of a graph or of the job."""
    failed: list[str]
    """How each attempt failed."""
    done: bool = False

    @property
    def key(self) -> tuple[str | None, str]:
        """What identifies it in the event log: what it is for, and where it was declared; names need not differ."""
        return self.step_key, self.handler.identity

    @property
    def name(self) -> str:
        """For people: "abort_upload of upload"."""
        return f"{self.handler.name} of {self.step_key}" if self.step_key else self.handler.name

    @property
    def exhausted(self) -> bool:
        """Whether no attempt is left."""
        return len(self.failed) > (self.policy.max_retries if self.policy is not None else 0)


@dataclass(slots=True)
class CleanupHistory:
    """What the event log says about the run, its steps, and earlier cleanups."""

    started: bool = False
    stopping: bool = False
    requested: bool = False
    steps: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Step key to node handle and how it is: "cut short", "over", "failed"."""
    done: set[tuple[str | None, str]] = field(default_factory=set)
    attempts: dict[tuple[str | None, str], list[str]] = field(default_factory=dict)
    """How each attempt failed, by `PendingHandler.key`, as `done`."""
    beginnings: int = 0
    reason: str | None = None
    requested_by: str | None = None
    interrupted_at: float = float("inf")

    def handle_event(self, event: DagsterEvent, at: float) -> None:
        """Process the next event. `at`: its time."""
        kind = event.event_type
        parsed = parse_event(event)
        if parsed is not None:
            self._handle_engine_event(parsed[0], parsed[1], at)
        elif kind is DagsterEventType.RUN_START:
            self.started = True
        elif kind in _STOPPING:
            self.stopping = True
        elif event.step_key is not None and kind in _OF_STEPS:
            interrupted = was_interrupted(event) or self.stopping or at >= self.interrupted_at
            cut_short = kind in _AT_WORK or (kind is DagsterEventType.STEP_FAILURE and interrupted)
            how = "over" if kind in _OVER else "cut short" if cut_short else "failed"
            self.steps[event.step_key] = (event.node_handle, how)
            if kind in _BEGINS:  # what has run for an earlier attempt, which had timed out, is due again
                self.done = {key for key in self.done if key[0] != event.step_key}
                self.attempts = {key: how for key, how in self.attempts.items() if key[0] != event.step_key}

    def _handle_engine_event(self, stage: Stage, facts: Mapping[str, Any], at: float) -> None:
        if stage in (Stage.REQUESTED, Stage.REACHED) and _ends_the_work(facts):
            self.reason = facts.get(REASON_KEY) or self.reason
            self.requested_by = facts.get(BY_KEY) or self.requested_by
            self.requested = True
        elif stage is Stage.INTERRUPTING and self.requested:  # not when a worker stopped
            self.interrupted_at = min(self.interrupted_at, at)
        elif stage is Stage.CLEANUP_BEGAN:
            self.beginnings += 1
        elif stage is Stage.CLEANUP:
            self.beginnings = 0
            key = (facts.get(OF_KEY) or None, str(facts[IDENTITY_KEY]))
            if FAILED_KEY in facts:
                self.attempts.setdefault(key, []).append(str(facts[FAILED_KEY]))
            else:
                self.done.add(key)

    def outstanding(self, job: Any, run: DagsterRun) -> Iterator[PendingHandler]:
        """Handlers of ops first, in reverse order of their start; then those of their graphs; then those of the job."""
        nodes = dict(nodes_of(job))
        cut_short = {key: handle for key, (handle, how) in self.steps.items() if how == "cut short"}
        for step_key in reversed(list(cut_short)):
            handle = cut_short[step_key]
            node = nodes[str(handle)]
            default = node.retry_policy or getattr(node.definition, "retry_policy", None) or job.op_retry_policy
            for handler in handlers_of(node.definition):
                config = op_config(job, run, handle)
                yield from self._pending(step_key, handler, default, config, (step_key,), whole=False)
        around = {str(parent): None for handle in cut_short.values() for parent in parents_of(handle)}
        for path in around:
            inside = tuple(key for key, (handle, _) in self.steps.items() if str(handle).startswith(f"{path}."))
            for handler in handlers_of(nodes[path].definition):
                yield from self._pending(path, handler, nodes[path].retry_policy, None, inside, whole=True)
        if self.started:
            for handler in handlers_of(job):
                yield from self._pending(None, handler, job.op_retry_policy, None, tuple(self.steps), whole=True)

    def _pending(
        self,
        step_key: str | None,
        handler: Handler,
        default: RetryPolicyLike | None,
        config: Any,
        steps: tuple[str, ...],
        *,
        whole: bool,
    ) -> Iterator[PendingHandler]:
        key = step_key, handler.identity
        if key not in self.done:
            failed = self.attempts.get(key, [])
            yield PendingHandler(step_key, handler, handler.retry_policy or default, config, steps, whole, list(failed))


def _ends_the_work(facts: Mapping[str, Any]) -> bool:
    """Of what was requested, or has reached the worker: not a shutdown, after which the run may go on elsewhere."""
    kind = str(facts.get("kind", CancelKind.REQUESTED.name))
    return kind in CancelKind.__members__ and CancelKind[kind].ends_the_work


def read_history(instance: DagsterInstance, run: DagsterRun) -> CleanupHistory:
    """Read the history from the event log. Waits for the database, and raises when it does not come back."""
    tags = own_tags(run)
    history = CleanupHistory(reason=tags.get(CANCEL_REASON_TAG), requested_by=tags.get(CANCELLED_BY_TAG))
    for entry in retry_storage(lambda: instance.all_logs(run.run_id, of_type=_WANTED), "read the event log"):
        event = event_of(entry)
        if event is not None:
            history.handle_event(event, entry.timestamp)
    return history


def handler_names(job: Any) -> list[str]:
    """The handlers of a job and of everything in it: "abort_upload of upload"."""
    own = [handler.name for handler in handlers_of(job)]
    inner = [
        f"{handler.name} of {handle}" for handle, node in nodes_of(job) for handler in handlers_of(node.definition)
    ]
    return own + inner
