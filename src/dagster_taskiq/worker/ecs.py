"""The ECS agent of this container: which task this is, and protection from scale-in while there is work.

Knows the agent's two endpoints; not what the work is. If the agent does not answer, the work continues.
https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-scale-in-protection-endpoint.html
https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-metadata-endpoint-v4.html
"""

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

import aiohttp

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.metrics import METADATA_VARIABLE
from dagster_taskiq.sqs.ecs_service import task_definition_of
from dagster_taskiq.worker.log_link import LogStream, log_stream

logger = logging.getLogger(__name__)

AGENT_VARIABLE: Final = "ECS_AGENT_URI"
PROTECTED_FOR_MIN: Final = 60
"""After it ECS ends the protection by itself, when a worker hangs; otherwise it is renewed after half of it."""
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)
_LINGER_S: Final = 10.0
_LOOK_EVERY_S: Final = 0.5
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_LOOK_FOR_DEPLOYMENT_EVERY_S: Final = 60.0
_LOOK_FOR_STOP_EVERY_S: Final = 10.0
"""Of the agent on this host. Spot gives two minutes."""
_NO_SERVICE: Final = "TASK_NOT_VALID"
"""The task does not belong to a service, so it is never scaled in."""


class AgentRefused(DagsterTaskiqError):
    """The agent refused or did not answer. `code` is its reason, or the name of the error."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(f"{code}: {text}" if text else code)


@dataclass(frozen=True, slots=True)
class Task:
    """The ECS task that this container is a part of."""

    arn: str
    cluster: str
    family: str
    revision: str
    service: str
    """Its name; empty when the agent does not tell, or when the task belongs to none."""
    log: LogStream | None = None
    """Of this container; None when that is not in CloudWatch."""

    @property
    def partition(self) -> str:
        """That of AWS: "aws", "aws-cn"."""
        return self.arn.split(":")[1]

    @property
    def region(self) -> str:
        """The region that the task runs in."""
        return self.arn.split(":")[3]

    @property
    def task_id(self) -> str:
        """The last part of the ARN."""
        return self.arn.rpartition("/")[2]

    @property
    def name(self) -> str:
        """The name of a worker, made of family and task: "loaders-9c1f27aa"."""
        return f"{self.family}-{self.task_id[:8]}"

    @property
    def where(self) -> str:
        """The place of the worker, for the events of runs."""
        cluster = self.cluster.rpartition("/")[2]
        return f"ecs task {self.task_id} in cluster {cluster}"

    def log_of(self, run_id: str) -> str | None:
        """Where the worker's log of a run that begins now is to be read."""
        return self.log.of_run(run_id, time.time()) if self.log is not None else None


class Agent:
    """The agent's endpoints; each call opens a connection of its own."""

    def __init__(self, *, agent_uri: str | None, metadata_uri: str | None) -> None:
        self._agent_uri = agent_uri
        self._metadata_uri = metadata_uri

    @classmethod
    def here(cls, environ: Mapping[str, str] = os.environ) -> "Agent":
        """The agent that the environment of this container names."""
        return cls(agent_uri=environ.get(AGENT_VARIABLE), metadata_uri=environ.get(METADATA_VARIABLE))

    @property
    def knows_the_task(self) -> bool:
        """Whether the agent has an endpoint that tells of the task."""
        return self._metadata_uri is not None

    @property
    def can_protect(self) -> bool:
        """Whether the agent has an endpoint for protection."""
        return self._agent_uri is not None

    async def task(self) -> Task | None:
        """The task of this container; None outside of ECS, and when the agent does not answer."""
        if self._metadata_uri is None:
            return None
        try:
            found = await self._ask("GET", f"{self._metadata_uri}/task")
            task = Task(
                arn=str(found["TaskARN"]),
                cluster=str(found.get("Cluster", "")),
                family=str(found.get("Family", "task")),
                revision=str(found.get("Revision", "")),
                service=str(found.get("ServiceName", "")),
            )
            return replace(task, log=await self._log(task, self._metadata_uri))
        except (AgentRefused, KeyError) as error:
            logger.warning("the ECS agent does not answer which task this is: %s", error)
            return None

    async def is_being_stopped(self) -> bool:
        """Whether ECS wants this task to stop. False also when the agent does not answer."""
        if self._metadata_uri is None:
            return False
        try:
            found = await self._ask("GET", f"{self._metadata_uri}/task")
        except AgentRefused:
            return False
        return found.get("DesiredStatus") == "STOPPED"

    async def _log(self, task: Task, metadata_uri: str) -> LogStream | None:
        try:
            container = await self._ask("GET", metadata_uri)
        except AgentRefused as error:
            logger.warning("the ECS agent does not answer where this container's log is: %s", error)
            return None
        return log_stream(container, task.partition, task.region)

    async def protect(self) -> None:
        """Keep ECS from scaling this task in, for an hour. Raises `AgentRefused`."""
        await self._set({"ProtectionEnabled": True, "ExpiresInMinutes": PROTECTED_FOR_MIN})

    async def unprotect(self) -> None:
        """Let ECS scale this task in. Raises `AgentRefused`."""
        await self._set({"ProtectionEnabled": False})

    async def _set(self, state: Mapping[str, Any]) -> None:
        answer = await self._ask("PUT", f"{self._agent_uri}/task-protection/v1/state", state)
        # A refusal can come with any HTTP status: what counts is the body.
        if "failure" in answer:
            failure = answer["failure"]
            raise AgentRefused(str(failure.get("Reason", "failure")), str(failure.get("Detail", "")))
        if "protection" not in answer:
            error = answer.get("error", {})
            raise AgentRefused(str(error.get("Code", "no answer")), str(error.get("Message", "")))

    async def _ask(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            async with (
                aiohttp.ClientSession(timeout=_TIMEOUT) as session,
                session.request(method, url, json=body) as response,
            ):
                answer = json.loads(await response.text())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise AgentRefused(type(error).__name__, str(error)) from error
        if not isinstance(answer, dict):
            raise AgentRefused("no answer", f"not an object: {str(answer)[:100]}")
        return answer


async def until_stopped(agent: Agent) -> None:
    """Return when ECS wants this task to stop: Spot, scale-in, a deployment.

    SIGTERM says the same, but a shell that is the container's first process does not hand it on.
    """
    while True:
        if await agent.is_being_stopped():
            return
        await asyncio.sleep(_LOOK_FOR_STOP_EVERY_S)


async def until_outdated(task: Task | None) -> None:
    """Return when the service starts its tasks from another task definition than this one's.

    Without this, a worker that always has work, and so is always protected, would outlive every deployment. Never
    returns when that cannot be found out.
    """
    said = False
    while task is not None and task.service:
        await asyncio.sleep(_LOOK_FOR_DEPLOYMENT_EVERY_S * random.uniform(0.5, 1.0))  # noqa: S311 - not all at once
        try:
            now = await task_definition_of(task.service, task.cluster, task.region)
        except DagsterTaskiqError as error:
            if not said:
                logger.warning("not known whether this worker is outdated, it is tried again: %s", error)
            said = True
            continue
        if now is not None and now.rpartition("/")[2] != f"{task.family}:{task.revision}":
            logger.info("the service has another task definition now: %s", now)
            return
    await asyncio.Event().wait()


class Protection:
    """Protects the task from scale-in as long as there is work, and for a moment after it.

    It does not help when a Spot instance ends, or when a deployment is forced.
    """

    def __init__(self, agent: Agent, is_busy: Callable[[], bool]) -> None:
        self._agent = agent
        self._is_busy = is_busy
        self._until = 0.0
        self._asked = False
        """Whether it may be on, also when no answer came."""
        self._busy_at = 0.0
        self._failures = 0
        self._is_of_no_service = False

    async def run(self) -> NoReturn:
        """Run until cancelled; then end the protection."""
        try:
            while True:
                rest_s = await self.look()
                await asyncio.sleep(rest_s)
        finally:
            if self._asked:
                await asyncio.shield(asyncio.ensure_future(self._change(wanted=False)))

    async def look(self) -> float:
        """Change the protection if needed; return the seconds until the next look."""
        now = time.monotonic()
        if self._is_of_no_service:
            return _LONGEST_PAUSE_S
        if self._is_busy():
            self._busy_at = now
            due = now > self._until - PROTECTED_FOR_MIN * 60 / 2
            if due and not await self._change(wanted=True):
                return self._pause_s()
        elif self._asked and now - self._busy_at > _LINGER_S and not await self._change(wanted=False):
            return self._pause_s()
        return _LOOK_EVERY_S

    async def _change(self, *, wanted: bool) -> bool:
        self._asked = self._asked or wanted
        try:
            await (self._agent.protect() if wanted else self._agent.unprotect())
        except AgentRefused as error:
            self._failures += 1
            if self._failures == 1:
                what = "not protected from scale-in" if wanted else "still protected from scale-in"
                logger.warning("%s; work continues, and it is tried again: %s", what, error)
            self._is_of_no_service = error.code == _NO_SERVICE
            self._asked = self._asked and not self._is_of_no_service
            return False
        if self._failures > 1:
            logger.warning("scale-in protection works again, after %d tries", self._failures)
        self._failures = 0
        self._asked = wanted
        self._until = time.monotonic() + PROTECTED_FOR_MIN * 60 if wanted else 0.0
        logger.info("scale-in protection is %s", "on" if wanted else "off")
        return True

    def _pause_s(self) -> float:
        pause_s: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10))
        return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - so that not all tasks of a service ask at once
