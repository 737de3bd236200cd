"""Jobs whose ops leave something behind, and handlers that clear it up. Marks as in `jobs`; handlers make some, too."""

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_taskiq import CleanupContext, OpCancelled, cancellation_token, on_cancel, taskiq_executor
from tests.support.jobs import Marks, mark


def marks_of(context: CleanupContext) -> Marks:
    return Marks(marks=context.tags["marks"])


def undo(context: CleanupContext) -> None:
    """Says all that it was told."""
    state = str(dict(context.state)).replace(" ", "")
    reason, by = (str(said).replace(" ", "_") for said in (context.reason, context.requested_by))
    mark(marks_of(context), f"undo {os.getpid()} {context.step_key} attempt={context.attempt} state={state}")
    mark(marks_of(context), f"told reason={reason} by={by}")
    mark(marks_of(context), f"config {context.op_config['seconds']}")
    context.log.info("undone by the handler")


def note_job(context: CleanupContext) -> None:
    text = ",".join(f"{key}:{dict(state)}" for key, state in sorted(context.state.items())).replace(" ", "")
    mark(marks_of(context), f"job-undone {context.step_key} {text}")


async def undo_later(context: CleanupContext) -> None:
    await asyncio.sleep(0.01)
    mark(marks_of(context), f"undo-async {context.attempt}")


def fails_twice(context: CleanupContext) -> None:
    mark(marks_of(context), f"tried {context.attempt}")
    if context.attempt <= 2:
        raise RuntimeError(f"not yet, attempt {context.attempt}")


def fails_until_mended(context: CleanupContext) -> None:
    mark(marks_of(context), f"tried {context.attempt}")
    if not Path(f"{context.tags['marks']}-mended").exists():
        raise RuntimeError("the bucket is not mended")


def always_fails(context: CleanupContext) -> None:
    mark(marks_of(context), f"always-fails {context.attempt}")
    raise ValueError("never in my life")


def sleeps_too_long(context: CleanupContext) -> None:
    mark(marks_of(context), f"sleeps {context.attempt}")
    time.sleep(300)


def stuck_in_c(context: CleanupContext) -> None:
    mark(marks_of(context), f"stuck {context.attempt}")
    deque(itertools.repeat(None, 10**12), maxlen=0)


def slow(context: CleanupContext) -> None:
    mark(marks_of(context), f"slow-begin {os.getpid()}")
    time.sleep(float(context.tags.get("slow", "3")))
    mark(marks_of(context), "slow-end")


def counts_starts(context: CleanupContext) -> None:
    """Ends its worker, twice."""
    mark(marks_of(context), f"begun {os.getpid()}")


class Store(dg.ConfigurableResource):  # type: ignore[type-arg]
    place: str

    def delete(self, what: str) -> None:
        with Path(self.place).open("a") as file:
            file.write(f"deleted {what}\n")


def uses_a_resource(context: CleanupContext, store: Store, plain: str, unused: int = 0) -> None:
    store.delete(f"{plain} {context.state['what']}")


def work(config: Marks, **state: Any) -> None:
    token = cancellation_token()
    if state:
        token.state.update(state)
    try:
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
        mark(config, "slept")
    except BaseException:
        kind = token.kind.name if token.kind is not None else None
        by = (token.requested_by or "nobody").replace("Dagster UI or API", "ui")
        mark(config, f"interrupted {token.is_cancelled} {kind} {token.reason} {by}")
        raise


@dg.op
@on_cancel(undo)
def uploads(config: Marks) -> None:
    work(config, upload_id="u-1")


@on_cancel(undo)
@dg.op
def uploads_outer(config: Marks) -> None:
    work(config, upload_id="u-2")


@dg.op(retry_policy=dg.RetryPolicy(max_retries=3, delay=0.1))
@on_cancel(fails_twice)
@on_cancel(undo)
@on_cancel(undo_later)
def many_handlers(config: Marks) -> None:
    work(config)


@dg.op
@on_cancel(fails_until_mended, retry_policy=dg.RetryPolicy(max_retries=1, delay=0.1))
@on_cancel(always_fails)
@on_cancel(undo)
def cannot_be_cleaned_up(config: Marks) -> None:
    work(config, what="x")


@dg.op
@on_cancel(fails_until_mended)
def can_be_mended(config: Marks) -> None:
    work(config, what="x")


@dg.op
@on_cancel(sleeps_too_long, timeout=0.5)
@on_cancel(stuck_in_c, timeout=0.5, retry_policy=dg.RetryPolicy(max_retries=1))
@on_cancel(undo)
def handlers_hang(config: Marks) -> None:
    work(config)


@dg.op
@on_cancel(slow)
def slow_to_clean(config: Marks) -> None:
    work(config, what="slow")


@dg.op
@on_cancel(undo)
def ignores_everything(config: Marks) -> None:
    cancellation_token().state["upload_id"] = "u-3"
    with contextlib.suppress(BaseException):
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    while True:
        try:
            time.sleep(0.05)
        except BaseException:  # noqa: BLE001 - what some code of users does
            mark(config, "swallowed")


@dg.op
@on_cancel(uses_a_resource)
def with_resources(config: Marks) -> None:
    work(config, what="blob")


@dg.op
@on_cancel(undo)
def fails_by_itself(config: Marks) -> None:
    mark(config, f"started {os.getpid()}")
    raise RuntimeError("as it should")


@dg.op
@on_cancel(undo)
def finishes(config: Marks) -> None:
    cancellation_token().state["upload_id"] = "done"
    mark(config, "finished")


@dg.op(ins={"before": dg.In(dg.Nothing)})
@on_cancel(undo)
def then_waits(config: Marks) -> None:
    work(config, upload_id="u-4")


@dg.op(retry_policy=dg.RetryPolicy(max_retries=3, delay=30))
@on_cancel(undo, retry_policy=dg.RetryPolicy(max_retries=0))
def waits_for_its_retry(config: Marks) -> None:
    cancellation_token().state["upload_id"] = "of attempt 1"
    mark(config, f"started {os.getpid()}")
    raise RuntimeError("the first attempt fails")


@dg.op
@on_cancel(undo)
async def a_coroutine(config: Marks) -> None:
    token = cancellation_token()
    mark(config, f"started {os.getpid()}")
    try:
        await asyncio.sleep(config.seconds)
    except asyncio.CancelledError:
        mark(config, f"CancelledError {token.is_cancelled}")
        await asyncio.sleep(0.05)
        mark(config, "awaited-in-cleanup")
        raise
    finally:
        mark(config, "finally")


@dg.op
@on_cancel(undo)
def looks_at_its_token(config: Marks) -> None:
    """Cooperative: a thread of its own that no signal interrupts."""
    token = cancellation_token()
    found: list[object] = []

    def loop() -> None:
        mark(config, f"started {os.getpid()}")
        while not token.is_cancelled:
            time.sleep(0.01)
        found.extend([token.reason, token.wait(1), token.remaining()])

    thread = threading.Thread(target=loop)
    try:
        thread.start()
        while True:
            time.sleep(config.seconds)
    except BaseException:
        thread.join(5)
        left = found[2] if len(found) > 2 else None
        mark(config, f"looked {found[0]} {found[1]} {isinstance(left, float) and 0 < left <= 30}")
        raise


@dg.op
def is_called_back(config: Marks) -> None:
    """Blocked where no interrupt arrives, until the callback opens the door."""
    token = cancellation_token()
    door = threading.Event()

    def open_it() -> None:
        mark(config, f"called-back {threading.current_thread() is threading.main_thread()}")
        door.set()

    token.on_cancelled(open_it)
    taken_back = token.on_cancelled(lambda: mark(config, "must-not-be-called"))
    taken_back()
    token.on_cancelled(lambda: 1 / 0)
    with token.shield("the door"):
        mark(config, f"started {os.getpid()}")
        door.wait(20)
        mark(config, "opened")
    mark(config, "unreachable")


@dg.op
def safe_point(config: Marks) -> None:
    token = cancellation_token()
    try:
        with token.shield():
            mark(config, f"started {os.getpid()}")
            until = time.monotonic() + config.seconds
            while not token.is_cancelled and time.monotonic() < until:
                time.sleep(0.01)
            with token.shield("inner"):
                time.sleep(0.2)
            mark(config, "completed")
        mark(config, "unreachable")
    except OpCancelled as error:
        mark(config, f"OpCancelled {error.reason}")
        raise


@dg.op
def raises_if_cancelled(config: Marks) -> None:
    token = cancellation_token()
    started = False
    while True:
        try:
            if not started:
                started = True
                mark(config, f"started {os.getpid()}")
            time.sleep(config.seconds)
        except dg.DagsterExecutionInterruptedError:
            try:
                token.raise_if_cancelled()
            except OpCancelled as error:
                mark(config, f"OpCancelled {error.reason}")
                raise


@dg.op
@on_cancel(undo)
def never_leaves_its_shield(config: Marks) -> None:
    token = cancellation_token()
    token.state["upload_id"] = "u-5"
    with token.shield("commit of the ledger"):
        mark(config, f"started {os.getpid()}")
        time.sleep(300)


def _job_of(op: dg.OpDefinition, **resources: Any) -> dg.JobDefinition:
    @dg.job(name=f"{op.name}_job", executor_def=dg.in_process_executor, resource_defs=resources)
    def job() -> None:
        op()

    return job


OPS = [
    uploads,
    uploads_outer,
    many_handlers,
    cannot_be_cleaned_up,
    can_be_mended,
    handlers_hang,
    fails_by_itself,
    slow_to_clean,
    ignores_everything,
    waits_for_its_retry,
    a_coroutine,
    looks_at_its_token,
    is_called_back,
    safe_point,
    raises_if_cancelled,
    never_leaves_its_shield,
]
globals().update({f"{op.name}_job": _job_of(op) for op in OPS})
with_resources_job = _job_of(
    with_resources, store=Store.configure_at_launch(), plain=dg.ResourceDefinition.hardcoded_resource("the")
)


@dg.job(executor_def=dg.in_process_executor)
@on_cancel(note_job)
def whole_job() -> None:
    then_waits(finishes())


@dg.job(executor_def=dg.multiprocess_executor)
@on_cancel(note_job)
def processes_job() -> None:
    uploads()
    looks_at_its_token()


@dg.op
@on_cancel(undo)
async def says_nothing(config: Marks) -> None:
    """A coroutine that asks for no token."""
    mark(config, f"started {os.getpid()}")
    try:
        await asyncio.sleep(config.seconds)
    except asyncio.CancelledError:
        mark(config, "CancelledError")
        raise


@dg.job(executor_def=dg.multiprocess_executor)
def coroutine_processes_job() -> None:
    says_nothing()


@dg.job(executor_def=taskiq_executor)
@on_cancel(note_job)
def steps_job() -> None:
    uploads()
    looks_at_its_token()
    then_waits(finishes())


@dg.job(executor_def=taskiq_executor)
def ignoring_steps_job() -> None:
    ignores_everything()


@on_cancel(note_job)
@dg.graph
def inner() -> None:
    then_waits(finishes())


@dg.job(executor_def=dg.in_process_executor)
def with_a_graph_job() -> None:
    inner()


def a_handler(succeeds: bool) -> Callable[[CleanupContext], None]:
    def tidy(context: CleanupContext) -> None:
        mark(marks_of(context), f"tidied {succeeds}")
        if not succeeds:
            raise RuntimeError("on purpose")

    return tidy


@on_cancel(a_handler(succeeds=False))
@dg.graph
def of_one_name() -> None:
    uploads()


same_names_job = on_cancel(a_handler(succeeds=True))(
    of_one_name.to_job(name="same_names_job", executor_def=dg.in_process_executor)
)


class Children(Marks):
    runs: list[str]


@dg.op
@on_cancel(undo)
def launches(context: dg.OpExecutionContext, config: Children) -> None:
    """Launches runs that were made for it, and waits for them."""
    for run_id in config.runs:
        context.instance.add_run_tags(run_id, {"dagster/parent_run_id": context.run_id})
        context.instance.launch_run(run_id, workspace=None)  # type: ignore[arg-type]
    work(config, launched=str(len(config.runs)))


@dg.job(executor_def=dg.in_process_executor)
def launches_job() -> None:
    launches()


@dg.asset
@on_cancel(undo)
def an_asset(config: Marks) -> int:
    work(config, upload_id="a-1")
    return 1


@on_cancel(undo)
@dg.multi_asset(specs=[dg.AssetSpec("left"), dg.AssetSpec("right")])
def two_assets(config: Marks) -> Iterator[dg.MaterializeResult]:  # type: ignore[type-arg]
    work(config, upload_id="a-2")
    yield dg.MaterializeResult(asset_key="left")
    yield dg.MaterializeResult(asset_key="right")


@dg.op
def waits(config: Marks) -> int:
    work(config, upload_id="a-3")
    return 1


@dg.graph_asset
@on_cancel(note_job)
def of_a_graph() -> int:
    return waits()  # type: ignore[no-any-return]


assets_job = on_cancel(note_job)(dg.define_asset_job("assets_job", executor_def=dg.in_process_executor))

defs = dg.Definitions(
    assets=[an_asset, two_assets, of_a_graph],
    jobs=[
        *(globals()[f"{op.name}_job"] for op in OPS),
        with_resources_job,
        same_names_job,
        whole_job,
        processes_job,
        coroutine_processes_job,
        steps_job,
        ignoring_steps_job,
        with_a_graph_job,
        launches_job,
        assets_job,
    ],
)
