"""Cancels of many plain tasks of which nobody has a list: a group, a kind of task, all that a predicate is true for."""

import ast
import asyncio
import json
import re
import sys
import time
import types
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from taskiq import SimpleRetryMiddleware
from tests.contract.test_receiver import Bench, bench, error_of
from tests.support.eventually import eventually
from tests.support.moto import REGION, NewQueues
from tests.support.proxy import sqs_proxy
from tests.support.workers import Outside, broker_for

from dagster_taskiq import TaskCancelled, TaskCleanupContext, on_cancel
from dagster_taskiq.cancellable_broker import CancellableSQSBroker
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages import read_cancel
from dagster_taskiq.tasks.predicates import TaskView

pytestmark = pytest.mark.anyio

Ask = Callable[[CancellableSQSBroker], Any]


def is_of_profile(task: TaskView, profile: str) -> bool:
    return str(task.labels.get("profile")) == profile


def fails(task: TaskView) -> bool:
    raise ZeroDivisionError


async def seen_by_all(benches: list[Bench]) -> None:
    def count() -> int:
        return sum(bool(one.receiver._listener._standing._known) for one in benches)  # type: ignore[union-attr]

    await eventually(lambda: count() == len(benches), "all workers have seen it")


@pytest.mark.parametrize(
    ("ask", "fifo"),
    [
        pytest.param(lambda broker: broker.cancel_group("a", reason="enough"), False, id="group"),
        pytest.param(lambda broker: broker.cancel_type("wait", reason="enough"), True, id="type"),
        pytest.param(
            lambda broker: broker.cancel_where(is_of_profile, profile="p", reason="enough"), False, id="where"
        ),
    ],
)
async def test_what_runs_and_what_waits_is_cancelled_and_new_work_is_not(
    new_queues: NewQueues, endpoint: str, ask: Ask, fifo: bool
) -> None:
    queue_url = new_queues(fifo=fifo)
    handled: list[str] = []

    def undo(context: TaskCleanupContext) -> None:
        handled.append(context.task_id)

    async with AsyncExitStack() as stack:
        benches = [
            await stack.enter_async_context(bench(queue_url, endpoint, receiver={"max_async_tasks": 1}))
            for _ in range(2)
        ]
        for one in benches:
            one.broker.with_result_backend(benches[0].broker.result_backend)
            on_cancel(undo)(one.wait.original_func)
            one.broker.predicate(is_of_profile)
            one.broker.register_task(one.wait.original_func, task_name="other")
        at = benches[0]
        meant = at.wait.kicker().with_labels(group="a", profile="p")
        running = [await meant.kiq() for _ in benches]

        def started() -> list[str]:
            return [task_id for one in benches for task_id in one.diary.started]

        await eventually(lambda: len(started()) == 2, "they have started")
        waiting = await at.wait.kicker().with_labels(group="a", profile="p").kiq()
        spared = await at.broker.find_task("other").kicker().with_labels(group="b", profile="q").kiq()
        await ask(at.broker)
        after = await at.wait.kicker().with_labels(group="a", profile="p").kiq()
        for task in (*running, waiting):
            error = await error_of(task)
            assert isinstance(error, TaskCancelled)
            assert error.reason == "enough"
        await eventually(lambda: set(started()) >= {spared.task_id, after.task_id}, "the others run")
        assert sorted(handled) == sorted(task.task_id for task in running)
        assert waiting.task_id not in started()
        await seen_by_all(benches)
        for one in benches:
            one.diary.release.set()
        assert [await error_of(task) for task in (spared, after)] == [None, None]


async def test_a_worker_that_starts_later_hears_of_it(standard_url: str, endpoint: str) -> None:
    producer = broker_for(standard_url, endpoint)
    task: Any = producer.register_task(asyncio.sleep, task_name="wait")
    sent = await task.kicker().with_labels(group="a").kiq()
    await producer.cancel_group("a")
    async with bench(standard_url, endpoint) as first:
        first.broker.with_result_backend(producer.result_backend)
        assert isinstance(await error_of(sent), TaskCancelled)  # begun or not: who is quicker is open
        async with bench(standard_url, endpoint) as later:
            await seen_by_all([first, later])
    await producer.shutdown()


async def test_a_line_of_json_does_it_too(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start(group="profile:dr-backup")
        at.outside.send(at.outside.cancel_url, '{"group": "profile:dr-backup", "reason": "enough"}')
        assert isinstance(await error_of(task), TaskCancelled)


async def test_a_retry_is_as_old_as_its_first_try(standard_url: str, endpoint: str) -> None:
    tries, go_on = 0, asyncio.Event()

    async def fail() -> None:
        nonlocal tries
        tries += 1
        await go_on.wait()
        raise ValueError("on purpose")

    retry = SimpleRetryMiddleware(default_retry_count=5, default_retry_label=True)
    async with AsyncExitStack() as stack:
        # One that does not listen to cancels, so that the first try fails after the cancel was sent.
        deaf = await stack.enter_async_context(
            bench(standard_url, endpoint, middlewares=(retry,), enable_cancellation=False)
        )
        task = await deaf.broker.register_task(fail, task_name="fail").kicker().with_labels(group="a").kiq()
        await eventually(lambda: tries == 1, "the first try has begun")
        at = await stack.enter_async_context(bench(standard_url, endpoint))
        at.broker.register_task(fail, task_name="fail")
        at.broker.with_result_backend(deaf.broker.result_backend)
        await at.broker.cancel_group("a")
        await seen_by_all([at])
        deaf.receiver._finish.set()  # type: ignore[union-attr]
        go_on.set()
        assert isinstance(await error_of(task), TaskCancelled)
        assert tries == 1


async def test_it_ends_with_its_time_to_live(standard_url: str, endpoint: str) -> None:
    async with bench(standard_url, endpoint) as at:
        sent = await at.broker.cancel_group("a", ttl_s=2)
        assert sent.ttl_s == 2
        await eventually(lambda: at.outside.cancels() == (0, 0), "the message is deleted")
        with pytest.raises(DagsterTaskiqError, match="raise its MessageRetentionPeriod, or lower ttl_s"):
            await at.broker.cancel_group("a", ttl_s=1_000_000)


async def test_a_predicate_that_is_unknown_or_fails_cancels_nothing(
    standard_url: str, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(standard_url, endpoint) as at:
        task = await at.start()
        at.broker.predicate(fails)
        await at.broker.cancel_where(fails)
        at.outside.send(at.outside.cancel_url, '{"predicate": "nowhere:to_be_found"}')
        said = "no predicate 'nowhere:to_be_found' is known here", "cancels nothing: 'ZeroDivisionError()'"
        for text in said:
            await eventually(lambda text=text: text in caplog.text, text)  # type: ignore[misc]
        await at.start()
        assert [caplog.text.count(text) for text in said] == [1, 1]
        assert at.diary.cancelled == []
        at.diary.release.set()
        assert await error_of(task) is None


async def test_only_what_everybody_can_find_is_a_predicate(standard_url: str, endpoint: str) -> None:
    broker = broker_for(standard_url, endpoint)
    with pytest.raises(ValueError, match=r"decorate it with @broker\.predicate"):
        await broker.cancel_where(is_of_profile)
    with pytest.raises(ValueError, match="give it a name"):
        broker.predicate(lambda task: True)
    named = broker.predicate(name="all")(lambda task: True)
    assert broker.predicates.name_of(named) == broker.predicates.name_of("all") == "all"
    with pytest.raises(ValueError, match="plain function"):
        broker.predicate(error_of)
    with pytest.raises(ValueError, match="reason"):
        broker.predicate(name="reasons")(lambda task, reason: True)
    with pytest.raises(DagsterTaskiqError, match="JSON"):
        await broker.cancel_where("all", what=object())
    await broker.shutdown()


async def test_the_page_says_what_works(standard_url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plain-taskiq.md").read_text()
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    address = '"https://sqs.us-east-1.amazonaws.com/123456789012/tasks", "us-east-1"'
    assert address in blocks
    module = types.ModuleType("plain_page")
    monkeypatch.setitem(sys.modules, "plain_page", module)
    names = {"task_id": "t-0", "task_ids": ["t-1", "t-2"], "url": standard_url, "region": REGION, "endpoint": endpoint}
    vars(module).update(names)
    text = blocks.replace(address, "url, region, endpoint_url=endpoint")
    code = compile(text, "plain-taskiq.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    await eval(code, vars(module))  # noqa: S307 - our own page
    outside = Outside(standard_url, endpoint)
    assert (outside.work(), outside.cancels()) == ((1, 0), (6, 0))
    sent = [json.loads(one["Body"]) for one in outside.receive(outside.cancel_url)]
    assert {"predicate": "plain_page:is_below", "arguments": {"folder": "/a/"}, "ttl_s": 300.0}.items() <= {
        key: value for body in sent if "predicate" in body for key, value in body.items()
    }.items()
    examples = re.findall(r"^{.*}$", page, re.MULTILINE)
    assert [bool(read_cancel(line)) for line in examples] == [True] * 4
    await module.broker.shutdown()


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [1, 8])
async def test_what_a_standing_cancel_costs(standard_url: str, endpoint: str, workers: int) -> None:
    """Printed, and bounded: the time until all workers have seen it, and requests per worker and minute afterwards."""
    with sqs_proxy(endpoint) as proxy:
        async with AsyncExitStack() as stack:
            url = proxy.through(standard_url)
            benches = [await stack.enter_async_context(bench(url, proxy.url, wait_time=20)) for _ in range(workers)]
            began = time.monotonic()
            await benches[0].broker.cancel_group("a")
            await seen_by_all(benches)
            spread_s = time.monotonic() - began
            await asyncio.sleep(10)
            before = proxy.seen.total()
            await asyncio.sleep(60)
            a_minute = (proxy.seen.total() - before) / workers
    print(f"{workers} workers: all have seen it after {spread_s:.1f} s; {a_minute:.1f} requests per worker and minute")
    assert a_minute <= 20
