"""What may these credentials do? IAM is asked first; what it does not tell is tried.

Knows who needs which permission (`sqs.permissions`) and what to add; does not know Dagster.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dagster_taskiq.doctor.finding import Finding, ok, unknown
from dagster_taskiq.queue_names import queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.admin import queue_urls
from dagster_taskiq.sqs.permissions import NEEDS, Simulated, payloads_arn, queue_arn, simulate
from dagster_taskiq.sqs.probe import BucketTried, may

_POLICIES: Final = {"launcher": "LauncherPolicy", "worker": "WorkerPolicy"}


@dataclass(frozen=True, slots=True)
class _Answer:
    """Whether one action is allowed on one resource; None: not known."""

    action: str
    resource: str
    """A queue's name; the ARN, where IAM was asked."""
    allowed: bool | None
    decision: str = ""
    """IAM's word for it."""


async def look_at_permissions(
    client: Any, settings: Settings, caller: str | None, bucket: BucketTried | None
) -> Iterator[Finding]:
    """One finding for the launcher, and one for the worker.

    `caller`: the ARN of these credentials; None: unknown, or an emulator's. `bucket`: what came of trying it.
    """
    resources = _resources(settings, caller)
    said = await _simulated(settings, caller, resources)
    answers: dict[str, list[_Answer]] = {}
    for who in NEEDS:
        if said is None:
            answers[who] = await _tried(client, settings, who)
        else:
            answers[who] = await _confirmed(client, settings, who, said, resources, bucket)
    return (_finding(who, answers, said) for who in NEEDS)


def _resources(settings: Settings, caller: str | None) -> Mapping[str, str | None]:
    """Role of a queue, or "payloads", to the ARN."""
    if caller is None:
        return {}
    partition = caller.split(":")[1]
    found = {
        role: queue_arn(url, partition, settings.region_name) for role, url in queue_urls(settings.queue_url).items()
    }
    if settings.payload_bucket is not None:
        found["payloads"] = payloads_arn(settings.payload_bucket, partition)
    return found


async def _simulated(settings: Settings, caller: str | None, resources: Mapping[str, str | None]) -> Simulated | None:
    if caller is None or None in resources.values():
        return None
    actions: dict[str, list[str]] = {}
    for needs in NEEDS.values():
        for role, wanted in needs.items():
            if arn := resources.get(role):
                known = actions.setdefault(arn, [])
                known += [action for action in wanted if action not in known]
    return await simulate(caller, actions, settings.region_name)


async def _tried(client: Any, settings: Settings, who: str) -> list[_Answer]:
    found = []
    for role, url in queue_urls(settings.queue_url).items():
        actions = NEEDS[who].get(role, ())
        allowed = await asyncio.gather(*[may(client, url, action) for action in actions])
        found += [_Answer(action, queue_name(url), one) for action, one in zip(actions, allowed, strict=True)]
    return found


async def _confirmed(
    client: Any,
    settings: Settings,
    who: str,
    said: Simulated,
    resources: Mapping[str, str | None],
    bucket: BucketTried | None,
) -> list[_Answer]:
    """What IAM denies is tried, too: the policy of the queue or bucket may allow it, and IAM does not read that."""
    found = []
    urls = queue_urls(settings.queue_url)
    for role, actions in NEEDS[who].items():
        arn = resources.get(role)
        for action in actions if arn is not None else ():
            decision = said.decisions[arn or "", action]
            allowed = decision == "allowed"
            if not allowed and role in urls:
                allowed = await may(client, urls[role], action) is True
            elif not allowed:
                allowed = bucket is not None and bucket.error is None
            found.append(_Answer(action, arn or "", allowed, decision))
    return found


def _finding(who: str, answers: Mapping[str, list[_Answer]], said: Simulated | None) -> Finding:
    check = f"permissions of a {who}"
    missing = [one for one in answers[who] if one.allowed is False]
    unsure = dict.fromkeys(one.resource for one in answers[who] if one.allowed is None)
    if missing:
        lacks = ", ".join(
            f"{one.action} on {one.resource}{f' ({one.decision})' if one.decision else ''}" for one in missing
        )
        if said is not None:
            reason = f"{said.source} lacks {lacks}, says iam:SimulatePrincipalPolicy"
        else:
            reason = f"these credentials lack {lacks}; each request was tried"
        # Nobody has said whose role this is. One that fits neither cannot be right.
        others = [found for other, found in answers.items() if other != who]
        fits = any(all(one.allowed is not False for one in found) for found in others)
        return Finding(check, "warning" if fits else "error", reason, _repair(who, missing))
    if unsure:
        return unknown(
            check, f"could not be tried on {', '.join(unsure)}", "correct what is wrong with the queues first"
        )
    if said is not None:
        return ok(check, f"{said.source} has them all, says iam:SimulatePrincipalPolicy")
    return ok(check, "each request that it makes was tried, and none is refused")


def _repair(who: str, missing: list[_Answer]) -> str:
    own = [_POLICIES[who]] if any(one.action.startswith("sqs:") for one in missing) else []
    payloads = ["PayloadPolicy"] if any(one.action.startswith("s3:") for one in missing) else []
    repair = f"attach {' and '.join(own + payloads)} of infra/queues.yaml, if this is the role of a {who}"
    if any(one.decision == "explicitDeny" for one in missing):
        repair += "; and remove what denies it (explicitDeny): a policy of the role, its boundary, the organization"
    return repair
