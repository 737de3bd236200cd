"""The jobs of `op_kinds`, with a limit on the op that works: it takes longer than it may. Marks are made as there.

Beside it there is an op without a limit, `beside`, which says so when it runs: the others go on. Under the in-process
executor it comes later, by its name.
"""

import itertools
import time
from collections import deque
from typing import Any

import dagster as dg

from dagster_taskiq import cancellation_token, on_cancel
from dagster_taskiq.storage.tags import TIMEOUT_TAG
from tests.support.op_kinds import EXECUTORS, NEVER_S, OPS, POOL, at_work, say, undo

SOON_S = 4.0
LIMITS = {"c_call": 2.0, "retried_c_call": 2.0, "process_pool": 8.0, "pipes": 15.0, "cli": 8.0}
"""Seconds: less for those that keep a processor busy, more for those that have to start something before they wait."""


def limit_of(kind: str) -> dict[str, str]:
    return {TIMEOUT_TAG: str(LIMITS.get(kind, SOON_S))}


@dg.op
def z_beside(context: dg.OpExecutionContext) -> None:
    say(context.run.tags, "beside")


def late_graph(op: dg.OpDefinition) -> dg.GraphDefinition:
    @dg.graph(name=f"late_{op.name}_graph")
    def graph() -> None:
        op.tag(limit_of(op.name))()
        z_beside()

    return graph


RETRY = dg.RetryPolicy(max_retries=1)


@on_cancel(undo)
@dg.op(pool=POOL, retry_policy=RETRY)
def retried(context: dg.OpExecutionContext) -> None:
    if context.retry_number == 0:
        with at_work(context):
            time.sleep(NEVER_S)
    say(context.run.tags, f"again {cancellation_token().state.get('kept')} {cancellation_token().is_cancelled}")


@on_cancel(undo)
@dg.op(pool=POOL, retry_policy=RETRY)
def retried_c_call(context: dg.OpExecutionContext) -> None:
    if context.retry_number == 0:
        with at_work(context):
            deque(itertools.repeat(None, 10**12), maxlen=0)
    say(context.run.tags, f"again {cancellation_token().state.get('kept')} {cancellation_token().is_cancelled}")


@on_cancel(undo)
@dg.op(pool=POOL)
def carries_on(context: dg.OpExecutionContext) -> None:
    """It swallows the interrupt, and all that the token says to it."""
    with at_work(context) as token:
        until = time.monotonic() + NEVER_S
        while time.monotonic() < until:
            try:
                time.sleep(NEVER_S)
            except BaseException as error:  # noqa: BLE001 - what some code of users does
                say(context.run.tags, f"swallowed {type(error).__name__} {token.kind!r} {token.reason}")


@on_cancel(undo)
@dg.op(pool=POOL)
def swallows_errors(context: dg.OpExecutionContext) -> None:
    """`except Exception` does not catch it."""
    with at_work(context):
        while True:
            try:
                time.sleep(NEVER_S)
            except Exception:  # noqa: BLE001, S112 - the same
                continue


GRAPHS = {op.name: late_graph(op) for op in (*OPS, retried, retried_c_call, carries_on, swallows_errors)}


def job_name(kind: str, executor: str) -> str:
    return f"late_{kind}_{executor.replace('-', '_')}_job"


late_jobs = {
    job_name(kind, executor): graph.to_job(name=job_name(kind, executor), executor_def=EXECUTORS[executor])  # type: ignore[arg-type]
    for kind, graph in GRAPHS.items()
    for executor in EXECUTORS
}
globals().update(late_jobs)


@on_cancel(undo)
@dg.asset(tags=limit_of("asset"), pool=POOL)
def tagged(context: dg.AssetExecutionContext) -> None:
    with at_work(context):
        time.sleep(NEVER_S)


@on_cancel(undo)
@dg.asset(op_tags=limit_of("asset"), pool=POOL)
def op_tagged(context: dg.AssetExecutionContext) -> None:
    with at_work(context):
        time.sleep(NEVER_S)


@on_cancel(undo)
@dg.multi_asset(
    specs=[dg.AssetSpec("slow", tags={TIMEOUT_TAG: "200"}), dg.AssetSpec("quick", tags=limit_of("asset"))], pool=POOL
)
def several(context: dg.AssetExecutionContext) -> Any:
    """The shortest limit counts."""
    with at_work(context):
        time.sleep(NEVER_S)
    yield dg.MaterializeResult("slow")
    yield dg.MaterializeResult("quick")


@dg.asset
def z_beside_asset(context: dg.AssetExecutionContext) -> None:
    say(context.run.tags, "beside")


ASSETS = {"tagged": tagged, "op_tagged": op_tagged, "several": several}

defs = dg.Definitions(
    assets=[*ASSETS.values(), z_beside_asset],
    jobs=[
        *late_jobs.values(),
        *(
            dg.define_asset_job(
                job_name(kind, executor),
                selection=dg.AssetSelection.assets(asset, z_beside_asset),
                executor_def=EXECUTORS[executor],  # type: ignore[arg-type]
            )
            for kind, asset in ASSETS.items()
            for executor in EXECUTORS
        ),
    ],
)
