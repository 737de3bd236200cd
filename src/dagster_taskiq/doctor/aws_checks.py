"""What is wrong with credentials, queues, permissions, clock and bucket? The part of `doctor` that asks AWS.

Knows how a queue of this package has to be configured; asks AWS with `sqs.probe`. Does not know Dagster.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Final

from dagster_taskiq.doctor.finding import Finding, line, ok, unknown
from dagster_taskiq.doctor.permission_checks import look_at_permissions
from dagster_taskiq.errors import AccessDenied, DagsterTaskiqError, QueueUnreachable
from dagster_taskiq.queue_names import DEFAULT_ROUTE, is_fifo, queue_name
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.admin import CANCEL_RETENTION_S, CANCEL_VISIBILITY_S, WORK_RETENTION_S, identity, queue_urls
from dagster_taskiq.sqs.client import Connection, split_endpoint
from dagster_taskiq.sqs.probe import BucketTried, QueueFacts, has_credentials, look_at_queue, try_bucket
from dagster_taskiq.sqs.s3_payloads import PAYLOAD_PREFIX

_MANY_CANCELS: Final = 20
_SKEW_S: Final = 5.0
_FATAL_SKEW_S: Final = 300.0
"""AWS refuses signatures that are five minutes too old or too new."""
_FEW_RECEIVES: Final = 30
"""Waiting for its code is up to fifteen, and each deployment one more."""
_DAY_S: Final = 86_400
_LONG_S: Final = 345_600
_LONG_HIDDEN_S: Final = 30
_LONG_KEPT_S: Final = 3_600


async def look_at_aws(
    settings: Settings, routes: Sequence[str], queues: dict[tuple[str, str], QueueFacts]
) -> AsyncIterator[Finding]:
    """Credentials, queues, clock, permissions, bucket. Adds the facts about each queue to `queues`, by route and role.

    `routes`: whose queues, and permissions on them, are looked at.
    """
    credentials, caller = await _credentials(settings)
    yield credentials
    if credentials.verdict == "error":
        return
    bucket = await try_bucket(settings.payload_bucket, settings.region_name) if settings.payload_bucket else None
    connection = Connection(settings.region_name, settings.endpoint_url)
    try:
        client = await connection.client()
        for route in routes:
            for role, url in queue_urls(settings.of_route(route).queue_url).items():
                facts = queues[route, role] = await look_at_queue(client, url)
                for finding in _queue(role, url, facts, settings, route):
                    yield finding
        yield _clock(queues)
        for finding in await look_at_permissions(client, settings, routes, caller, bucket):
            yield finding
    finally:
        await connection.close()
    if settings.payload_bucket and bucket is not None:
        yield _bucket(settings.payload_bucket, bucket)


def _bucket(bucket: str, tried: BucketTried) -> Finding:
    check = "payload bucket"
    if tried.error is None:
        return ok(check, f"{bucket}: an object was written, read and deleted under {PAYLOAD_PREFIX}")
    if tried.denied:
        repair = "attach PayloadPolicy of infra/queues.yaml (Payloads=true in infra/workers.yaml)"
        return Finding(check, "warning", tried.error, f"{repair}, if this is the role of a worker")
    if tried.missing:
        return Finding(check, "error", tried.error, f"aws s3 mb s3://{bucket}, or correct payload_bucket")
    return Finding(check, "error", tried.error, "check the network, and AWS_ENDPOINT_URL_S3")


async def _credentials(settings: Settings) -> tuple[Finding, str | None]:
    """And whose they are: an ARN; None when that is not known."""
    check = "credentials"
    repair = "give the task an IAM role (taskRoleArn), or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    endpoint, own = split_endpoint(settings.endpoint_url)
    if not own and not await has_credentials():
        return Finding(check, "error", "there are none", repair), None
    if endpoint is not None:
        return ok(check, f"found; {endpoint} is not asked for their owner"), None
    try:
        caller = await identity(settings.region_name)
    except AccessDenied as error:
        wrong = f"{repair}; the current ones have expired, or are wrong"
        return Finding(check, "error", line(error), wrong), None
    except (DagsterTaskiqError, TimeoutError) as error:
        return unknown(check, f"AWS STS does not answer whose they are: {line(error)}", "check the network"), None
    return ok(check, caller), caller


def _queue(role: str, url: str, facts: QueueFacts, settings: Settings, route: str = DEFAULT_ROUTE) -> Iterator[Finding]:
    of_route = "" if route == DEFAULT_ROUTE else f" of route {route}"
    check, name = f"queue {role}{of_route}", queue_name(url)
    if not facts.exists:
        create = f"dagster-taskiq queue create{f' --route {route}' if of_route else ''}"
        yield Finding(check, "error", f"{name} does not exist in {settings.region_name}", create)
    elif isinstance(facts.error, AccessDenied):
        what = "attach LauncherPolicy or WorkerPolicy of infra/queues.yaml to this role (sqs:GetQueueAttributes)"
        if role == "steps":
            what = "nothing, for a launcher; for a worker attach WorkerPolicy of infra/queues.yaml"
        yield unknown(check, f"no permission to read the attributes of {name}: {facts.error}", what)
    elif isinstance(facts.error, QueueUnreachable):
        yield Finding(check, "error", str(facts.error), "check the network, endpoint_url, and the queue's address")
    elif facts.error is not None:
        reason, _, repair = str(facts.error).partition("; ")
        yield Finding(check, "error", reason, repair or "check endpoint_url, and the queue's address")
    else:
        wrong = list(_wrong_with(check, role, url, facts.attributes, settings))
        yield from wrong or [ok(check, f"{name}: {facts.attributes.get('ApproximateNumberOfMessages', '?')} waiting")]


def _wrong_with(check: str, role: str, url: str, has: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    name = queue_name(url)
    if (has.get("FifoQueue") == "true") != is_fifo(url):
        reason = f"{name} is {'a FIFO' if has.get('FifoQueue') == 'true' else 'a standard'} queue"
        yield Finding(check, "error", reason, "delete it, then dagster-taskiq queue create")
    if int(has.get("DelaySeconds", 0)):
        reason = f"{name} delays messages by {has['DelaySeconds']} s"
        yield Finding(check, "warning", reason, _change(url, "DelaySeconds", 0))
    yield from (_of_cancels if role == "cancels" else _of_work)(check, url, has, settings)


def _change(url: str, attribute: str, value: object) -> str:
    return f"aws sqs set-queue-attributes --queue-url {url} --attributes '{attribute}={value}'"


def _of_work(check: str, url: str, has: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    name, wanted = queue_name(url), settings.visibility_timeout_seconds
    visibility, retention = int(has.get("VisibilityTimeout", wanted)), int(has.get("MessageRetentionPeriod", _LONG_S))
    if visibility != wanted:
        # Harmless: the worker sends its own value with each receive. But the attribute misleads its readers.
        reason = f"{name}: its VisibilityTimeout is {visibility} s, and visibility_timeout_seconds is {wanted}"
        yield Finding(check, "warning", reason, _change(url, "VisibilityTimeout", wanted))
    if retention < _DAY_S:
        reason = f"{name} drops runs that wait for {retention} s, so they never start"
        yield Finding(check, "error", reason, _change(url, "MessageRetentionPeriod", WORK_RETENTION_S))
    if has.get("RedrivePolicy"):
        most = int(json.loads(has["RedrivePolicy"]).get("maxReceiveCount", _FEW_RECEIVES))
        if most <= _FEW_RECEIVES:
            reason = (
                f"{name}: {most} receives move work to the dead-letter queue; waiting for its code takes up to fifteen"
            )
            yield Finding(check, "warning", reason, _change(url, "RedrivePolicy", ""))


def _of_cancels(check: str, url: str, has: Mapping[str, str], _: Settings) -> Iterator[Finding]:
    name = queue_name(url)
    visibility = int(has.get("VisibilityTimeout", CANCEL_VISIBILITY_S))
    retention = int(has.get("MessageRetentionPeriod", CANCEL_RETENTION_S))
    if has.get("RedrivePolicy"):
        reason = f"{name} has a RedrivePolicy; it takes cancel messages that workers hand on"
        yield Finding(check, "error", reason, _change(url, "RedrivePolicy", ""))
    if visibility > _LONG_HIDDEN_S:
        reason = f"{name}: VisibilityTimeout {visibility} s; a killed worker's last poll hides a cancel for so long"
        yield Finding(check, "warning", reason, _change(url, "VisibilityTimeout", CANCEL_VISIBILITY_S))
    if retention > _LONG_KEPT_S:
        reason = f"{name}: MessageRetentionPeriod {retention} s; old cancels only cost"
        yield Finding(check, "warning", reason, _change(url, "MessageRetentionPeriod", CANCEL_RETENTION_S))
    depth = int(has.get("ApproximateNumberOfMessages", 0)) + int(has.get("ApproximateNumberOfMessagesNotVisible", 0))
    if depth > _MANY_CANCELS:
        reason = f"{name}: {depth} cancels that no worker takes; a worker deletes those older than cancel_ttl"
        yield Finding(check, "warning", reason, "dagster-taskiq worker list, and start a worker if none is alive")


def _clock(queues: Mapping[tuple[str, str], QueueFacts]) -> Finding:
    ahead = [facts.clock_ahead_s for facts in queues.values() if facts.clock_ahead_s is not None]
    if not ahead:
        return unknown("clock", "no answer of AWS had its time", "correct what is wrong with the queues first")
    skew = min(ahead, key=abs)
    if abs(skew) < _SKEW_S:
        return ok("clock", f"{abs(skew):.0f} s from AWS's")
    reason = f"this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} AWS's"
    fatal = abs(skew) >= _FATAL_SKEW_S
    return Finding("clock", "error" if fatal else "warning", reason, "start a time service: timedatectl set-ntp true")
