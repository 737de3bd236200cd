"""`taskiq_executor`: each step of a run is a task of its own, on whichever worker. Knows no asyncio, no processes.

Works under any run launcher; with `TaskiqRunLauncher` it takes its settings from there.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dagster import (
    DagsterEvent,
    DagsterInstance,
    DagsterRun,
    Executor,
    Field,
    InitExecutorContext,
    Map,
    Noneable,
    Permissive,
)
from dagster import executor as executor_decorator

from dagster_taskiq._route_rules import limits_of
from dagster_taskiq.cancellation.current import current_process
from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.cancellation.words import THE_RUN
from dagster_taskiq.core_execution_loop import TaskiqExecutor, TaskiqStepHandler
from dagster_taskiq.dagster_compat.execution import (
    CheckStepHealthResult,
    RetryMode,
    StepDependencyConfig,
    StepHandlerContext,
    describe_state,
    get_retries_config,
    get_step_dependency_config_field,
    get_tag_concurrency_limits_config,
    multiple_process_executor_requirements,
    needs_history,
)
from dagster_taskiq.errors import (
    DagsterTaskiqError,
    MessageTooLarge,
    QueueError,
    QueueMissing,
    QueueUnreachable,
    UnknownRoute,
)
from dagster_taskiq.launcher import CONFIG_FIELDS, TaskiqRunLauncher
from dagster_taskiq.messages import EXECUTE_STEP, StepMessage, pack
from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
from dagster_taskiq.route_queues import unknown_route
from dagster_taskiq.settings import TOP_LEVEL_KEYS, InterruptedSteps, Settings
from dagster_taskiq.sqs.s3_payloads import WITHIN_S, PayloadBucket
from dagster_taskiq.steps.handler import NONE
from dagster_taskiq.steps.interruptions import begins_again
from dagster_taskiq.steps.routes import route_of_step
from dagster_taskiq.storage import step_events
from dagster_taskiq.storage.event_log import StepRef
from dagster_taskiq.storage.heartbeats import Heartbeats
from dagster_taskiq.storage.routing import Routing, route_of_run
from dagster_taskiq.storage.step_claims import StepClaims
from dagster_taskiq.storage.tags import ROUTE_TAG, TASK_ID_TAG, grace_of, own_tags
from dagster_taskiq.storage.waiting import serving_steps
from dagster_taskiq.storage.workers import list_workers
from dagster_taskiq.tasks.producer import Producer, result_of, work_message

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dagster_taskiq.cancellable_broker import CancellableSQSBroker
    from dagster_taskiq.tasks.cancel_report import TaskCancelReport

logger = logging.getLogger(__name__)

_MOST_STATE: Final = 750_000
"""Characters of packed state that fit into a message of SQS (1 MiB), which has them in base64 once more."""
_KEEP_APART_S: Final = WITHIN_S + 5
"""For one state, in S3; closing the client included."""

EXECUTOR_FIELDS: Final[Mapping[str, Any]] = {
    **CONFIG_FIELDS,
    "retries": get_retries_config(),  # type: ignore[no-untyped-call]
    "max_concurrent": Field(
        Noneable(int),
        default_value=None,
        description="Steps of one run at a time. Default: as many as are due; the workers' slots are the limit then.",
    ),
    "max_concurrent_by_route": Field(
        Noneable(Map(str, int)),  # type: ignore[no-untyped-call]
        default_value=None,
        description="Steps of one run at a time by their route, `{gpu: 2}`; `default` is the unnamed one.",
    ),
    "tag_concurrency_limits": get_tag_concurrency_limits_config(),  # type: ignore[no-untyped-call]
    "step_dependency_config": get_step_dependency_config_field(),  # type: ignore[no-untyped-call]
}


@executor_decorator(
    name="taskiq",
    config_schema=Permissive(dict(EXECUTOR_FIELDS)),  # type: ignore[no-untyped-call]
    requirements=multiple_process_executor_requirements(),
)
def taskiq_executor(init_context: InitExecutorContext) -> Executor:
    """Executes each step of a run as a task of its own, sent over SQS to whichever worker has a slot for it.

    With `TaskiqRunLauncher` no configuration is needed; otherwise, or to use another queue:

    .. code-block:: yaml

        execution:
          config:
            queue_url: "https://sqs.us-east-1.amazonaws.com/123456789012/dagster-tasks"
            max_concurrent: 20

    Steps go over the queue `<queue>-steps`. Raises `SettingsError` for a configuration that is wrong.
    """
    config: Mapping[str, Any] = init_context.executor_config
    own = {key: value for key, value in config.items() if key not in EXECUTOR_FIELDS or key in TOP_LEVEL_KEYS}
    launcher = init_context.instance.run_launcher
    if isinstance(launcher, TaskiqRunLauncher):
        settings = launcher.settings.overridden_by(own)
    else:
        settings = Settings.from_config({key: value for key, value in own.items() if value is not None})
    dependencies = StepDependencyConfig.from_config(config.get("step_dependency_config"))
    return TaskiqExecutor(
        SQSStepHandler(settings),
        retries=RetryMode.from_config(config["retries"]),
        max_concurrent=config.get("max_concurrent"),
        tag_concurrency_limits=_limits(config),
        step_dependency_config=dependencies,
    )


def _limits(config: Mapping[str, Any]) -> list[Any] | None:
    """Those by tags, of Dagster, and those by route: `route_steps` puts the route into the tags of a step."""
    by_route = limits_of("max_concurrent_by_route", config.get("max_concurrent_by_route") or {})
    limits = [{"key": ROUTE_TAG, "value": route, "limit": limit} for route, limit in by_route.items()]
    return [*(config.get("tag_concurrency_limits") or ()), *limits] or None


def _is_large(message: StepMessage) -> bool:
    return len(message.state or "") > _MOST_STATE


class SQSStepHandler(TaskiqStepHandler):
    """Sends steps to the steps queue, and cancels them over the cancel queue."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer = Producer(self._make_broker, name="dagster-taskiq executor")
        self._heartbeats: Heartbeats | None = None

    def _make_broker(self, route: str) -> "CancellableSQSBroker":
        from dagster_taskiq.cancellable_broker import CancellableSQSBroker

        settings = self._settings.of_route(route)
        return CancellableSQSBroker.from_settings(settings, settings.steps_queue_url)

    @property
    def name(self) -> str:
        """For Dagster's engine events."""
        return "TaskiqStepHandler"

    def open(self) -> None:
        """Open the client, while the plan is being looked at."""
        self._producer.submit(lambda broker: broker.startup())

    def close(self) -> None:
        """Close the client and end its thread."""
        self._producer.close()

    @property
    def interrupted_steps(self) -> InterruptedSteps:
        """See the settings."""
        return self._settings.interrupted_steps

    @property
    def max_interruptions(self) -> int:
        """See the settings."""
        return self._settings.max_interruptions

    def launch_steps(
        self, contexts: Sequence[StepHandlerContext], interruptions: Mapping[str, int] = NONE
    ) -> Sequence[str]:
        """Announce and send the steps; the keys of those that could not be sent because SQS does not answer.

        Raises a `DagsterTaskiqError` when another try would not help.
        """
        by_route: dict[str, list[StepMessage]] = {}
        for context, message in zip(contexts, self._messages(contexts, interruptions), strict=True):
            route = route_of_step(context.step_tags[message.step_key])
            by_route.setdefault(route, []).append(message)
            queue = queue_name(self._settings.of_route(route).steps_queue_url)
            event = step_events.step_submitted(message.task_id, queue, route)
            DagsterEvent.step_worker_starting(context.get_step_context(message.step_key), event.message, event.facts)
        instance, job_name = contexts[0].instance, contexts[0].dagster_run.job_name
        return [key for route, some in by_route.items() for key in self._launch(instance, some, job_name, route)]

    def _launch(
        self, instance: DagsterInstance, messages: Sequence[StepMessage], job_name: str, route: str
    ) -> Sequence[str]:
        try:
            refused = self.send(messages, job_name, route)
        except QueueMissing as error:
            if route == DEFAULT_ROUTE:
                raise
            raise self._unknown(instance, route) from error
        except (QueueUnreachable, TimeoutError) as error:
            logger.warning("steps not sent, trying again: %s", str(error) or "no answer")
            return [message.step_key for message in messages]
        for why in sorted(set(refused.values())):
            logger.warning("steps not sent, trying again: SQS refused them: %s", why)
        return [message.step_key for message in messages if message.task_id in refused]

    def route_of(self, instance: DagsterInstance, run: DagsterRun) -> str:
        """Where the run has gone to; of one that another launcher has launched, where ours would have sent it."""
        if TASK_ID_TAG in own_tags(run):
            return route_of_run(run)
        return Routing(instance, self._settings).route_for(run)

    def check_routes(self, instance: DagsterInstance, routes: Sequence[str]) -> None:
        """Raises `UnknownRoute` for one that has no steps queue, or no cancel queue.

        Without an answer, or the permission to ask, nothing is known, and the steps are sent.
        """
        asking = {route: self._producer.submit(lambda broker: broker.check_queues(), route=route) for route in routes}
        for route, request in asking.items():
            try:
                result_of(request)
            except QueueMissing as error:
                raise self._unknown(instance, route) from error
            except (QueueError, TimeoutError) as error:
                logger.warning("route %s not checked: %s", route, str(error) or "no answer")

    def _unknown(self, instance: DagsterInstance, route: str) -> UnknownRoute:
        routing = Routing(instance, self._settings)
        return unknown_route(self._producer, routing, self._settings.queue_url, route)

    def _messages(
        self, contexts: Sequence[StepHandlerContext], interruptions: Mapping[str, int] = NONE
    ) -> list[StepMessage]:
        packed: dict[int, str] = {}  # by identity: the steps of a batch share their state
        messages = []
        for context in contexts:
            arguments = context.execute_step_args
            state, (step_key,) = arguments.known_state, arguments.step_keys_to_execute or ()
            if state is None or arguments.retry_mode is None:
                raise ValueError(f"step {step_key}: neither the known state nor the retry mode may be missing")
            if id(state) not in packed:
                packed[id(state)] = pack(describe_state(state))
            messages.append(
                StepMessage(
                    run_id=arguments.run_id,
                    step_key=step_key,
                    attempt=state.get_retry_state().get_attempt_count(step_key) + 1,
                    retries="disabled" if arguments.retry_mode is RetryMode.DISABLED else "deferred",
                    reexecution=needs_history(state),
                    state=packed[id(state)],
                    interruption=interruptions.get(step_key, 0),
                    begins_again=begins_again(context.step_tags[step_key]),
                )
            )
        return messages

    def send(self, messages: Sequence[StepMessage], job_name: str, route: str = DEFAULT_ROUTE) -> dict[str, str]:
        """Send messages to a route; the task ids of those that SQS refused, with the reason.

        Raises `MessageTooLarge` for a state that fits into no message when there is no payload bucket,
        `PayloadUnavailable` when that cannot be written, a `QueueError` or `TimeoutError`.
        """
        group = job_name if self._settings.is_fair_queue else None
        self._keep_apart_what_is_large(messages)
        return result_of(self._producer.submit(lambda broker: self._send(broker, messages, group), route=route))

    async def _send(
        self, broker: "CancellableSQSBroker", messages: Sequence[StepMessage], group: str | None
    ) -> dict[str, str]:
        arguments = [self._arguments(message) for message in messages]
        return await broker.kick_all(
            [
                work_message(broker, EXECUTE_STEP, message.task_id, group, given)
                for message, given in zip(messages, arguments, strict=True)
            ]
        )

    def _arguments(self, message: StepMessage) -> dict[str, Any]:
        return {**message.to_kwargs(), "state": None} if _is_large(message) else message.to_kwargs()

    def _keep_apart_what_is_large(self, messages: Sequence[StepMessage]) -> None:
        """One after the other, each with the time that a slow S3 may need: SQS has to answer much sooner."""

        def keep_apart(message: StepMessage) -> None:
            result_of(self._producer.submit(lambda _: self._keep_apart(message), within_s=_KEEP_APART_S), _KEEP_APART_S)

        for message in filter(_is_large, messages):
            keep_apart(message)

    async def _keep_apart(self, message: StepMessage) -> None:
        if self._settings.payload_bucket is None:
            raise MessageTooLarge(
                f"step {message.step_key}: what its process has to know of the other steps is"
                f" {len(message.state or ''):,} characters, compressed, and does not fit into a message of SQS;"
                " set payload_bucket to the name of an"
                " S3 bucket, or let fewer dynamic outputs come together in one run"
            )
        payloads = PayloadBucket(self._settings.payload_bucket, self._settings.region_name)
        try:
            await payloads.put(message.task_id, message.state or "")
        finally:
            await payloads.close()

    def terminate_tasks(self, routes: Mapping[str, str]) -> None:
        """Send the cancel messages, ten to a request. What cannot be sent is left to the status watch."""
        if not routes or not self._settings.enable_cancellation:
            return
        by_route: dict[str, list[str]] = {}
        for task_id, route in routes.items():
            by_route.setdefault(route, []).append(task_id)
        failed: dict[str, str] = {}
        try:
            for request in [self._cancel(task_ids, route) for route, task_ids in by_route.items()]:
                try:
                    failed |= result_of(request).failed
                except (DagsterTaskiqError, TimeoutError) as error:
                    failed["one of the routes"] = str(error) or repr(error)
        except RuntimeError as error:
            failed["all"] = str(error)
        for why in sorted(set(failed.values())):
            logger.warning("steps not cancelled by message; their workers see the run's status: %s", why)

    def _cancel(self, task_ids: Sequence[str], route: str) -> "Future[TaskCancelReport]":
        cancellation = current_process().cancellation
        reason = cancellation.reason if cancellation is not None else None
        by = (cancellation.requested_by if cancellation is not None else None) or THE_RUN
        timed_out = cancellation is not None and cancellation.kind is CancelKind.DEADLINE
        return self._producer.submit(
            lambda broker: broker.cancel_tasks(task_ids, reason=reason, requested_by=by, timed_out=timed_out),
            route=route,
        )

    def workers_alive(self, instance: DagsterInstance, worker_ids: set[str]) -> set[str]:
        """Those whose heartbeat is not so old that their children must be gone, too.

        That takes minutes, because they may only lack the database. If one of them is dead, its messages come again,
        and whoever gets them reports its steps lost much sooner.
        """
        return self._judging(instance).alive(worker_ids)

    def unserved(self, instance: DagsterInstance, routes: set[str]) -> set[str]:
        """Those of which no living worker takes steps, by the heartbeats of now."""
        workers = list_workers(instance, self._settings)
        return {route for route in routes if not serving_steps(workers, self._settings, route)}

    def _judging(self, instance: DagsterInstance) -> Heartbeats:
        """One object for all looks: it remembers whom it has seen late."""
        if self._heartbeats is None:
            self._heartbeats = Heartbeats.without_a_message(instance, self._settings)
        return self._heartbeats

    def patience_s(self, run: DagsterRun) -> float:
        """The run's grace, and until its workers know."""
        return self._settings.steps_patience_s(grace_of(run.tags, self._settings.grace_seconds))

    # Dagster's own interface: one step at a time.

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Send one step. Raises `QueueUnreachable` when it could not be sent."""
        if self.launch_steps([step_handler_context]):
            raise QueueUnreachable(f"{self._settings.steps_queue_url}: the step could not be sent")
        yield from ()

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Unhealthy when the worker that has the step is dead. Waiting in its queue, and "cannot tell", is healthy."""
        (message,) = self._messages([step_handler_context])
        instance = step_handler_context.instance
        try:
            claim = StepClaims(instance).find(message.run_id, StepRef(message.step_key, message.task_id))
            alive = claim is None or claim.worker_id in self._judging(instance).alive({claim.worker_id})
        except Exception:
            logger.exception("cannot tell whether a step is healthy", extra={"run_id": message.run_id})
            return CheckStepHealthResult.healthy()
        if alive or claim is None:
            return CheckStepHealthResult.healthy()
        return CheckStepHealthResult.unhealthy(f"worker {claim.worker_id}, which had step {message.step_key}, is gone")

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Ask for one step to be stopped; may be called again, and never raises."""
        tags = step_handler_context.step_tags
        messages = self._messages([step_handler_context])
        self.terminate_tasks({message.task_id: route_of_step(tags[message.step_key]) for message in messages})
        yield from ()
