"""Jobs for what may happen around a step's limit. Each op makes marks in the file that the run's tag `marks` names."""

import time
from collections.abc import Iterator
from typing import Any

import dagster as dg

from dagster_taskiq import CleanupContext, cancellation_token, on_cancel, taskiq_executor
from dagster_taskiq.storage.tags import TIMEOUT_TAG
from tests.support.op_kinds import NEVER_S, say, undo

LIMIT_S = 1.0


def limit(seconds: object) -> dict[str, str]:
    return {TIMEOUT_TAG: str(seconds)}


@dg.op(tags=limit(LIMIT_S))
def tidies_up(context: dg.OpExecutionContext) -> None:
    token = cancellation_token()
    try:
        time.sleep(NEVER_S)
    finally:
        say(context.run.tags, f"late {token.kind.name if token.kind else None}")
        while token.kind is not None and token.kind.name != "REQUESTED":
            time.sleep(0.01)
        say(context.run.tags, f"finally {token.kind.name if token.kind else None}")


def slow_undo(context: CleanupContext) -> None:
    say(context.tags, f"undoing {context.reason}")
    time.sleep(2)
    say(context.tags, "undone")


@on_cancel(slow_undo)
@dg.op(tags=limit(LIMIT_S))
def with_slow_handler(context: dg.OpExecutionContext) -> None:
    time.sleep(NEVER_S)


@dg.op
def z_after(context: dg.OpExecutionContext) -> None:
    say(context.run.tags, "after")


@dg.job(executor_def=dg.in_process_executor)
def tidies_up_job() -> None:
    tidies_up()
    z_after()


@dg.job(executor_def=dg.in_process_executor)
def with_slow_handler_job() -> None:
    with_slow_handler()
    z_after()


@dg.resource
def opened(context: dg.InitResourceContext) -> Iterator[str]:
    assert context.run is not None
    yield "it"
    say(context.run.tags, "closed")


@dg.op(required_resource_keys={"opened"}, retry_policy=dg.RetryPolicy(max_retries=1, delay=NEVER_S))
def fails_once(context: dg.OpExecutionContext) -> None:
    say(context.run.tags, "started")
    raise RuntimeError("not yet")


@dg.job(executor_def=dg.in_process_executor, resource_defs={"opened": opened})
def waits_for_its_retry_job() -> None:
    fails_once()


@dg.failure_hook
def slow_hook(context: dg.HookContext) -> None:
    time.sleep(2)
    say({"marks": context.op_config["marks"]}, "hook")


@dg.op(tags=limit(LIMIT_S), config_schema={"marks": str})
def with_hook(context: dg.OpExecutionContext) -> None:
    time.sleep(NEVER_S)


@dg.job(executor_def=taskiq_executor, hooks={slow_hook})
def with_hook_job() -> None:
    with_hook()


@dg.job(executor_def=dg.in_process_executor, hooks={slow_hook})
def with_hook_in_process_job() -> None:
    with_hook()


NUMBERS = range(25)


def at_its_limit(number: int) -> Any:
    """It ends about when its limit does: a bit before, or after."""

    @dg.op(name=f"at_its_limit_{number:02}", tags=limit(0.3))
    def op(context: dg.OpExecutionContext) -> None:
        time.sleep(0.27 + 0.002 * number)

    return op


@dg.job(executor_def=dg.in_process_executor)
def at_the_limit_job() -> None:
    for number in NUMBERS:
        at_its_limit(number)()
    z_after()


@on_cancel(undo)
@dg.op(tags=limit("soon"))
def no_number(context: dg.OpExecutionContext) -> None:
    pass


@dg.op(tags=limit(0), retry_policy=dg.RetryPolicy(max_retries=1))
def nothing(context: dg.OpExecutionContext) -> None:
    if context.retry_number == 0:
        raise dg.Failure


@dg.job(executor_def=dg.in_process_executor)
def invalid_limits_job() -> None:
    no_number()
    nothing()


@dg.op(tags=limit(LIMIT_S))
def in_a_shield(context: dg.OpExecutionContext) -> None:
    with cancellation_token().shield("writing the table"):
        time.sleep(NEVER_S)


@dg.job(executor_def=taskiq_executor)
def in_a_shield_job() -> None:
    in_a_shield()
