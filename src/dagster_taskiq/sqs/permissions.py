"""What launcher and worker ask of AWS, and what IAM says of it: `iam:SimulatePrincipalPolicy`, which tries nothing.

Knows IAM's requests; not what the answers mean. IAM knows the policies of a role or user, their boundary and those of
the organization. It does not know the policies of queues, buckets and VPC endpoints.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.sqs.errors import translated
from dagster_taskiq.sqs.s3_payloads import PAYLOAD_PREFIX

SEND: Final = "sqs:SendMessage"
_TAKES: Final = ("sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility", "sqs:GetQueueAttributes")
NEEDS: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    "launcher": {"work": (SEND,), "cancels": (SEND,)},
    "worker": {
        "work": _TAKES,
        "steps": (SEND, *_TAKES),
        "cancels": (SEND, *_TAKES),
        "payloads": ("s3:PutObject", "s3:GetObject", "s3:DeleteObject"),
    },
}
"""Who needs which actions on which queue of a route, or on the objects in the payload bucket.

Of a route that it does not serve, a worker needs to send to the same queues, and nothing else.
"""

_WITHIN_S: Final = 10.0
_ROLE: Final = re.compile(r"arn:[a-z-]+:sts::\d{12}:assumed-role/(?P<name>[^/]+)/.+")
_SOURCE: Final = re.compile(r"arn:[a-z-]+:iam::\d{12}:(role|user)/.+")


@dataclass(frozen=True, slots=True)
class Simulated:
    """What IAM said. `decisions`: by resource and action: `allowed`, `implicitDeny` or `explicitDeny`."""

    source: str
    """The ARN of the role or user, with its path."""
    decisions: Mapping[tuple[str, str], str]


def queue_arn(queue_url: str, partition: str, region_name: str) -> str | None:
    """The queue's ARN; None when its URL has no account in it, as those of some emulators."""
    account = urlsplit(queue_url).path.strip("/").partition("/")[0]
    is_account = re.fullmatch(r"\d{12}", account) is not None
    return f"arn:{partition}:sqs:{region_name}:{account}:{queue_name(queue_url)}" if is_account else None


def payloads_arn(bucket: str, partition: str) -> str:
    """One object of those that a worker writes: a policy that ends in `*` matches it."""
    return f"arn:{partition}:s3:::{bucket}/{PAYLOAD_PREFIX}doctor"


async def simulate(caller: str, needs: Mapping[str, Sequence[str]], region_name: str) -> Simulated | None:
    """Ask IAM whether that caller may do what it needs: actions by the ARN of the resource.

    `caller`: as STS tells it. Needs `iam:SimulatePrincipalPolicy`, and for an assumed role `iam:GetRole`, because its
    ARN lacks the role's path. None when IAM refuses, does not answer within ten seconds, or cannot know: the root user
    and federated users have no policies.
    """
    import aioboto3
    from botocore.config import Config

    config = Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 1})
    try:
        with translated("AWS IAM"):
            async with (
                asyncio.timeout(_WITHIN_S),
                aioboto3.Session().client("iam", region_name=region_name, config=config) as iam,
            ):
                source = await _source(iam, caller)
                if source is None:
                    return None
                asked = [_ask(iam, source, resource, actions) for resource, actions in needs.items()]
                found = {one: said for answer in await asyncio.gather(*asked) for one, said in answer.items()}
    except DagsterTaskiqError:
        return None
    complete = all((resource, action) in found for resource, actions in needs.items() for action in actions)
    return Simulated(source, found) if complete else None


async def _source(iam: Any, caller: str) -> str | None:
    role = _ROLE.fullmatch(caller)
    if role is not None:
        return str((await iam.get_role(RoleName=role["name"]))["Role"]["Arn"])
    return caller if _SOURCE.fullmatch(caller) else None


async def _ask(iam: Any, source: str, resource: str, actions: Sequence[str]) -> dict[tuple[str, str], str]:
    """One resource in a request, so that each action has one answer."""
    found = {}
    pages = iam.get_paginator("simulate_principal_policy")
    async for page in pages.paginate(PolicySourceArn=source, ActionNames=[*actions], ResourceArns=[resource]):
        for one in page["EvaluationResults"]:
            found[resource, str(one["EvalActionName"])] = str(one["EvalDecision"])
    return found
