"""What may these credentials do? IAM is asked first; what it does not tell is tried.

Knows who needs which permission (`sqs.permissions`) and what to add; does not know Dagster.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dagster_taskiq.doctor.finding import Finding, ok, unknown
from dagster_taskiq.queue_names import DEFAULT_ROUTE, queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.admin import queue_urls
from dagster_taskiq.sqs.permissions import NEEDS, SEND, Simulated, payloads_arn, queue_arn, simulate
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


@dataclass(frozen=True, slots=True)
class _Need:
    """What one of them asks of one queue, or of the payloads, whose `url` is None."""

    actions: Sequence[str]
    url: str | None
    arn: str | None
    """None: not known, or nobody to ask IAM about."""


async def look_at_permissions(
    client: Any, settings: Settings, routes: Sequence[str], caller: str | None, bucket: BucketTried | None
) -> list[Finding]:
    """For the unnamed route one finding for the launcher, and one for the worker; for each other route one for both.

    `caller`: the ARN of these credentials; None: unknown, or an emulator's. `bucket`: what came of trying it.
    """
    routes = tuple(dict.fromkeys((DEFAULT_ROUTE, *routes)))
    needs = {(route, who): list(_needs(who, settings, route, caller)) for route in routes for who in NEEDS}
    said = await _simulated(settings, caller, [need for of_one in needs.values() for need in of_one])
    answers: dict[str, dict[str, list[_Answer]]] = {route: {} for route in routes}
    for (route, who), of_one in needs.items():
        answers[route][who] = await (
            _tried(client, of_one) if said is None else _confirmed(client, of_one, said, bucket)
        )
    unnamed = answers.pop(DEFAULT_ROUTE)
    has_routes = bool(answers)
    found = [_finding(f"permissions of a {who}", unnamed, [who], said, has_routes=has_routes) for who in NEEDS]
    for route, of_route in answers.items():
        found.append(_finding(f"permissions for route {route}", of_route, [*NEEDS], said, has_routes=True))
    return found


def _needs(who: str, settings: Settings, route: str, caller: str | None) -> Iterator[_Need]:
    """Of the queues of one route. A worker receives only from those of the routes it serves."""
    partition = caller.split(":")[1] if caller is not None else None
    foreign = who == "worker" and route not in settings.serves
    for role, url in queue_urls(settings.of_route(route).queue_url).items():
        arn = queue_arn(url, partition, settings.region_name) if partition is not None else None
        actions = [one for one in NEEDS[who].get(role, ()) if not foreign or one == SEND]
        if actions:
            yield _Need(actions, url, arn)
    is_first = route == DEFAULT_ROUTE
    if is_first and settings.payload_bucket is not None and partition is not None and "payloads" in NEEDS[who]:
        yield _Need(NEEDS[who]["payloads"], None, payloads_arn(settings.payload_bucket, partition))


def routes_in(settings: Settings) -> tuple[str, ...]:
    """The unnamed route, those that a worker with these settings serves, and those of the rules."""
    return tuple(dict.fromkeys((DEFAULT_ROUTE, *settings.serves, *(rule.route for rule in settings.routes))))


async def _simulated(settings: Settings, caller: str | None, needs: Sequence[_Need]) -> Simulated | None:
    actions: dict[str, list[str]] = {}
    for need in needs:
        if caller is None or need.arn is None:
            return None
        known = actions.setdefault(need.arn, [])
        known += [action for action in need.actions if action not in known]
    return await simulate(caller, actions, settings.region_name) if caller is not None else None


async def _tried(client: Any, needs: Sequence[_Need]) -> list[_Answer]:
    found = []
    for need in needs:
        if need.url is not None:
            allowed = await asyncio.gather(*[may(client, need.url, action) for action in need.actions])
            name = queue_name(need.url)
            found += [_Answer(action, name, one) for action, one in zip(need.actions, allowed, strict=True)]
    return found


async def _confirmed(client: Any, needs: Sequence[_Need], said: Simulated, bucket: BucketTried | None) -> list[_Answer]:
    """What IAM denies is tried, too: the policy of the queue or bucket may allow it, and IAM does not read that."""
    found = []
    for need in needs:
        for action in need.actions:
            decision = said.decisions[need.arn or "", action]
            allowed = decision == "allowed"
            if not allowed and need.url is not None:
                allowed = await may(client, need.url, action) is True
            elif not allowed:
                allowed = bucket is not None and bucket.error is None
            found.append(_Answer(action, need.arn or "", allowed, decision))
    return found


def _finding(
    check: str,
    answers: Mapping[str, list[_Answer]],
    asked: Sequence[str],
    said: Simulated | None,
    *,
    has_routes: bool,
) -> Finding:
    """`answers` of one route, for launcher and worker; `asked`: whose are looked at here."""
    own = [one for who in asked for one in answers[who]]
    missing = list(dict.fromkeys(one for one in own if one.allowed is False))
    unsure = dict.fromkeys(one.resource for one in own if one.allowed is None)
    if missing:
        lacking = [who for who in asked if any(one.allowed is False for one in answers[who])]
        lacks = ", ".join(
            f"{one.action} on {one.resource}{f' ({one.decision})' if one.decision else ''}" for one in missing
        )
        whose = f"a {lacking[0]} needs" if len(lacking) == 1 else "launcher and worker need"
        whose = f", which {whose}" if len(asked) > 1 else ""
        if said is not None:
            reason = f"{said.source} lacks {lacks}{whose}, says iam:SimulatePrincipalPolicy"
        else:
            reason = f"these credentials lack {lacks}{whose}; each request was tried"
        # Nobody has said whose role this is. One that fits neither cannot be right.
        fits = any(all(one.allowed is not False for one in found) for found in answers.values())
        return Finding(check, "warning" if fits else "error", reason, _repair(lacking, missing, has_routes=has_routes))
    if unsure:
        return unknown(
            check, f"could not be tried on {', '.join(unsure)}", "correct what is wrong with the queues first"
        )
    if said is not None:
        return ok(check, f"{said.source} has them all, says iam:SimulatePrincipalPolicy")
    its = "it makes" if len(asked) == 1 else "launcher and worker make"
    return ok(check, f"each request that {its} was tried, and none is refused")


def _repair(lacking: Sequence[str], missing: list[_Answer], *, has_routes: bool) -> str:
    policies, who = (" or ".join(words) for words in ([_POLICIES[who] for who in lacking], lacking))
    own = [policies] if any(one.action.startswith("sqs:") for one in missing) else []
    payloads = ["PayloadPolicy"] if any(one.action.startswith("s3:") for one in missing) else []
    repair = f"attach {' and '.join(own + payloads)} of infra/queues.yaml, if this is the role of a {who}"
    if own and any(one.action == SEND for one in missing) and has_routes:
        repair += " (to send to other routes: that of the unnamed one with SendToRoutes=true)"
    if any(one.decision == "explicitDeny" for one in missing):
        repair += "; and remove what denies it (explicitDeny): a policy of the role, its boundary, the organization"
    return repair
