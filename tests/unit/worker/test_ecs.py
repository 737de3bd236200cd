"""What the ECS agent tells and refuses, and a protection that follows the work."""

import asyncio
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from tests.support.ecs_agent import FakeAgent, ecs_agent
from tests.support.tcp_proxy import tcp_proxy

from dagster_taskiq.metrics import METADATA_VARIABLE, on_ecs
from dagster_taskiq.worker import ecs
from dagster_taskiq.worker.ecs import Agent, AgentRefused, Protection, until_stopped
from dagster_taskiq.worker.log_link import log_stream

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeAgent]:
    with ecs_agent() as agent:
        yield agent


@pytest.fixture
def agent(running: FakeAgent) -> FakeAgent:
    running.refusal, running.protected = None, False
    running.asked.clear()
    return running


def here(agent: FakeAgent) -> Agent:
    return Agent.here(agent.environment)


async def test_it_tells_which_task_this_is(agent: FakeAgent) -> None:
    task = await here(agent).task()
    assert task is not None
    assert task.name == "loaders-9c1f27aa"
    assert task.where == "ecs task 9c1f27aa5a5d4a0f8f3a6a4a5b6c7d8e in cluster data"
    assert on_ecs(agent.environment)


async def test_a_run_s_log_is_found_in_the_console_by_the_run(agent: FakeAgent) -> None:
    task = await here(agent).task()
    assert task is not None
    url = task.log_of("8adb1c9d-e6ad-4f25-ae64-4db1fa32c38a")
    assert url is not None
    assert url.startswith(
        "https://us-east-1.console.aws.amazon.com/cloudwatch/home?region=us-east-1#logsV2:log-groups/log-group/"
        "$252Fdagster-taskiq$252Fdata/log-events/worker$252Fworker$252F9c1f27aa5a5d4a0f8f3a6a4a5b6c7d8e"
        "$3FfilterPattern$3D$25228adb1c9d-e6ad-4f25-ae64-4db1fa32c38a$2522$26start$3D"
    )


@pytest.mark.parametrize(
    "log",
    [
        None,
        {},
        {"LogDriver": "awsfirelens", "LogOptions": {"Name": "datadog"}},
        {"LogDriver": "awslogs", "LogOptions": {"awslogs-group": "/no/stream"}},
    ],
)
async def test_a_log_that_is_elsewhere_has_no_address(agent: FakeAgent, log: dict[str, Any] | None) -> None:
    agent.log, before = log, agent.log
    try:
        task = await here(agent).task()
    finally:
        agent.log = before
    assert task is not None
    assert task.log_of("8adb1c9d-e6ad-4f25-ae64-4db1fa32c38a") is None


def test_the_console_of_another_partition() -> None:
    told = {"LogDriver": "awslogs", "LogOptions": {"awslogs-group": "a b", "awslogs-stream": "s"}}
    stream = log_stream(told, "aws-cn", "cn-north-1")
    assert stream is not None
    assert stream.of_run("r", 61.5) == (
        "https://cn-north-1.console.amazonaws.cn/cloudwatch/home?region=cn-north-1#logsV2:log-groups/log-group/"
        "a$2520b/log-events/s$3FfilterPattern$3D$2522r$2522$26start$3D1500"
    )


async def test_it_tells_when_the_task_is_to_stop(agent: FakeAgent) -> None:
    here = Agent.here(agent.environment)
    assert not await here.is_being_stopped()
    agent.desired = "STOPPED"
    assert await here.is_being_stopped()
    await until_stopped(here)


async def test_without_an_answer_nothing_is_to_stop(agent: FakeAgent) -> None:
    gone = Agent.here(agent.environment | {METADATA_VARIABLE: "http://127.0.0.1:1/v4"})
    assert not await gone.is_being_stopped()
    assert not await Agent.here({}).is_being_stopped()


async def test_elsewhere_there_is_none() -> None:
    assert not on_ecs({})
    nobody = Agent.here({})
    assert await nobody.task() is None
    assert not nobody.can_protect


async def test_an_agent_that_does_not_answer_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    away = Agent(agent_uri="http://127.0.0.1:9", metadata_uri="http://127.0.0.1:9")
    assert await away.task() is None
    assert "does not answer which task this is" in caplog.text
    with pytest.raises(AgentRefused):
        await away.protect()


async def test_an_agent_that_never_answers_is_given_up(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ecs, "_TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    url = urlsplit(agent.url)
    with tcp_proxy(str(url.hostname), url.port or 80) as proxy:
        silent = Agent(agent_uri=f"http://{proxy.host}:{proxy.port}", metadata_uri=f"http://{proxy.host}:{proxy.port}")
        proxy.swallow()
        protection = asyncio.create_task(Protection(silent, is_busy=lambda: True).run())
        async with asyncio.timeout(5):
            assert await silent.task() is None
            protection.cancel()
            await asyncio.wait({protection})
    assert protection.cancelled()


@pytest.mark.parametrize(
    ("refuse", "code"),
    [
        (FakeAgent.throttle, "ThrottlingException"),
        (FakeAgent.block, "DEPLOYMENT_BLOCKED"),
        (FakeAgent.no_service, "TASK_NOT_VALID"),
    ],
)
async def test_a_refusal_is_read_from_the_body(agent: FakeAgent, refuse: "object", code: str) -> None:
    refuse(agent)  # type: ignore[operator]
    with pytest.raises(AgentRefused) as refused:
        await here(agent).protect()
    assert refused.value.code == code


async def test_the_protection_follows_the_work(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    now, busy = 1_000.0, False
    monkeypatch.setattr("dagster_taskiq.worker.ecs.time.monotonic", lambda: now)
    protection = Protection(here(agent), lambda: busy)
    await protection.look()
    assert agent.states() == []
    busy = True
    await protection.look()
    await protection.look()
    assert agent.states() == [True]
    now += ecs.PROTECTED_FOR_MIN * 60 / 2 + 1
    await protection.look()
    assert agent.states() == [True, True], "it is renewed before it ends"
    busy = False
    await protection.look()
    assert agent.states() == [True, True], "between two runs it stays on"
    now += 30
    await protection.look()
    await protection.look()
    assert agent.states() == [True, True, False]


async def test_a_throttled_agent_is_asked_less_and_less(agent: FakeAgent, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dagster_taskiq")
    protection = Protection(here(agent), lambda: True)
    agent.throttle()
    pauses = [await protection.look() for _ in range(5)]
    assert [round(2 ** (number - 1), 1) <= pause <= 2**number for number, pause in enumerate(pauses)] == [True] * 5
    assert sum("not protected from scale-in" in line for line in caplog.messages) == 1
    agent.refusal = None
    await protection.look()
    assert agent.protected
    assert "scale-in protection works again, after 5 tries" in caplog.messages


async def test_a_task_of_no_service_asks_once(agent: FakeAgent) -> None:
    protection = Protection(here(agent), lambda: True)
    agent.no_service()
    for _ in range(3):
        await protection.look()
    assert agent.states() == [True]


@pytest.mark.parametrize("answers_after_s", [0, 0.5], ids=["answered", "while the agent has yet to answer"])
async def test_at_the_end_it_is_let_go(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, answers_after_s: float
) -> None:
    monkeypatch.setattr(agent, "answers_after_s", answers_after_s)
    protecting = asyncio.create_task(Protection(here(agent), lambda: True).run())
    while not agent.protected:  # noqa: ASYNC110 - in another thread
        await asyncio.sleep(0.01)
    protecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await protecting
    assert agent.states() == [True, False]
