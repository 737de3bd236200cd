"""A server that behaves like the ECS agent beside a container: as its documentation says, refusals included."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from anyio.from_thread import start_blocking_portal

from dagster_taskiq.metrics import METADATA_VARIABLE
from dagster_taskiq.worker.ecs import AGENT_VARIABLE

ARN = "arn:aws:ecs:us-east-1:123456789012:task/data/9c1f27aa5a5d4a0f8f3a6a4a5b6c7d8e"

AWSLOGS = {
    "LogDriver": "awslogs",
    "LogOptions": {
        "awslogs-create-group": "true",
        "awslogs-group": "/dagster-taskiq/data",
        "awslogs-region": "us-east-1",
        "awslogs-stream": "worker/worker/9c1f27aa5a5d4a0f8f3a6a4a5b6c7d8e",
    },
}


@dataclass
class FakeAgent:
    """What it was asked, and how it answers. `refusal`: the body of its next answers instead of an agreement."""

    url: str = ""
    refusal: dict[str, Any] | None = None
    protected: bool = False
    answers_after_s: float = 0
    log: dict[str, Any] | None = field(default_factory=lambda: dict(AWSLOGS))
    """What it says of the container's log; None: it does not answer that."""
    deployed: str = "loaders:7"
    """The task definition of the service."""
    desired: str = "RUNNING"
    """What ECS wants of the task."""
    asked: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {
            AGENT_VARIABLE: f"{self.url}/api/abc",
            METADATA_VARIABLE: f"{self.url}/v4/abc",
            "AWS_ENDPOINT_URL_ECS": self.url,
        }

    def states(self) -> list[bool]:
        """What was asked for, in order."""
        return [bool(body["ProtectionEnabled"]) for _, body in self.asked]

    def throttle(self) -> None:
        self.refusal = {
            "requestID": "1",
            "error": {"Arn": ARN, "Code": "ThrottlingException", "Message": "Rate exceeded"},
        }

    def block(self) -> None:
        self.refusal = {
            "failure": {"Arn": ARN, "Detail": "more protected than desired", "Reason": "DEPLOYMENT_BLOCKED"}
        }

    def no_service(self) -> None:
        self.refusal = {"failure": {"Arn": ARN, "Detail": "no service", "Reason": "TASK_NOT_VALID"}}

    async def _state(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((time.time(), body))
        if self.refusal is not None:
            return web.json_response(self.refusal, status=400 if "error" in self.refusal else 200)
        self.protected = body["ProtectionEnabled"]
        await asyncio.sleep(self.answers_after_s)
        answer: dict[str, Any] = {"ProtectionEnabled": body["ProtectionEnabled"], "TaskArn": ARN}
        if body["ProtectionEnabled"]:
            assert 1 <= body["ExpiresInMinutes"] <= 2880
            answer["ExpirationDate"] = "2026-12-31T23:59:59Z"
        return web.json_response({"protection": answer})

    async def _ecs(self, request: web.Request) -> web.Response:
        assert request.headers["X-Amz-Target"].endswith(".DescribeServices")
        arn = f"arn:aws:ecs:us-east-1:123456789012:task-definition/{self.deployed}"
        services = [{"serviceName": name, "taskDefinition": arn} for name in (await request.json())["services"]]
        return web.json_response({"services": services, "failures": []}, content_type="application/x-amz-json-1.1")

    async def _container(self, _: web.Request) -> web.Response:
        if self.log is None:
            return web.Response(status=500, text="the agent has no answer")
        return web.json_response({"DockerId": "cd18", "Name": "worker", "DockerName": "worker", **self.log})

    async def _task(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "Cluster": "arn:aws:ecs:us-east-1:123456789012:cluster/data",
                "TaskARN": ARN,
                "Family": "loaders",
                "Revision": "7",
                "ServiceName": "loaders",
                "AvailabilityZone": "us-east-1b",
                "LaunchType": "FARGATE",
                "DesiredStatus": self.desired,
            }
        )


@contextmanager
def ecs_agent() -> Iterator[FakeAgent]:
    agent = FakeAgent()
    app = web.Application()
    app.add_routes([web.put("/api/abc/task-protection/v1/state", agent._state), web.get("/v4/abc/task", agent._task)])
    app.add_routes([web.get("/v4/abc", agent._container)])
    app.add_routes([web.post("/", agent._ecs)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        agent.url = f"http://{host}:{port}"

    with start_blocking_portal(name="ecs agent") as portal:
        portal.call(start)
        try:
            yield agent
        finally:
            portal.call(runner.cleanup)
