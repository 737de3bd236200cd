"""A proxy in front of an SQS endpoint that does what networks and SQS do on bad days.

It understands the JSON protocol of SQS: which action, on which queue. What goes wrong is said by rules:

    with sqs_proxy(endpoint) as proxy:
        queue_url = proxy.through(queue_url)              # what workers and launcher are told
        proxy.away(); ...; proxy.back()                   # no request gets through; as in the beginning
        proxy.fail_with(500, action="SendMessage")        # for good, until `back`
        proxy.hang("-cancels")                            # requests about one queue are never answered
        with proxy.having(Rule(Fault.TWICE, action="SendMessage", share=0.2)): ...

A message to a work queue is never lost here, because SQS does not lose one: only cancel messages can be.
"""

import asyncio
import enum
import hashlib
import json
import random
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from anyio.from_thread import BlockingPortal, start_blocking_portal

CANCELS = "-cancels"
STEPS = "-steps"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "date", "server"}
_SENDS = ("SendMessage", "SendMessageBatch")
_JSON = "application/x-amz-json-1.0"


class Fault(enum.Enum):
    """What is done to a request."""

    RESET = "the connection is reset, the request is not carried out"
    ANSWER_LOST = "the request is carried out, the connection is reset"
    ERROR = "an answer with an HTTP status, not carried out"
    THROTTLE = "an answer that says: too many requests, not carried out"
    HANG = "no answer, not carried out; reset after `seconds`"
    SLOW = "carried out after `seconds`"
    LOST = "answered as if sent, and never sent; cancel messages only"
    LATE = "answered as if sent, and sent after `seconds`: so messages overtake each other"
    TWICE = "a message is sent twice"
    AGAIN = "what is received becomes visible again after `seconds`: somebody else receives it, too"
    SHUFFLE = "what is received together is handed out in another order"


@dataclass(frozen=True)
class Rule:
    """One fault, for the requests that match. The first rule that matches and whose turn it is decides."""

    fault: Fault
    queue: str | None = None
    """`-cancels`, `-steps`, `` (the work queue itself), a whole name; None: all."""
    action: str | None = None
    """`SendMessage`, which includes batches of them, `ReceiveMessage`, …; None: all that it makes sense for."""
    share: float = 1.0
    """Of the matching requests."""
    seconds: float = 60.0
    status: int = 500


_MAKES_SENSE_FOR: Mapping[Fault, tuple[str, ...]] = {
    Fault.LOST: _SENDS,
    Fault.LATE: _SENDS,
    Fault.TWICE: _SENDS,
    Fault.AGAIN: ("ReceiveMessage",),
    Fault.SHUFFLE: ("ReceiveMessage",),
}


@dataclass
class Asked:
    """A request as far as it is understood."""

    action: str
    queue: str
    body: dict[str, Any]
    raw: bytes
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/"


class SqsProxy:
    """Made by `sqs_proxy`. The methods can be called from any thread; a change holds for the next request."""

    def __init__(self, portal: BlockingPortal, endpoint: str, seed: int) -> None:
        self.url = ""
        self.rules: tuple[Rule, ...] = ()
        self.seen: Counter[tuple[str, str]] = Counter()
        """Requests by action and queue."""
        self.done: Counter[tuple[Fault, str, str]] = Counter()
        """Faults by action and queue."""
        self._portal = portal
        self._endpoint = endpoint
        self._chance = random.Random(seed)  # noqa: S311 - no secret
        self._open: set[asyncio.BaseTransport] = set()
        self._later: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    def through(self, queue_url: str) -> str:
        """The URL of that queue by way of this proxy."""
        return self.url + urlsplit(queue_url).path

    def away(self) -> None:
        """Reset all connections, those of waiting requests, too."""
        self.rules = (Rule(Fault.RESET),)
        self._portal.call(self._reset_all)

    def back(self) -> None:
        """Nothing goes wrong any more."""
        self.rules = ()

    def fail_with(self, status: int, queue: str | None = None, action: str | None = None) -> None:
        """Answer with an HTTP status from now on."""
        self.rules += (Rule(Fault.ERROR, queue, action, status=status),)

    def throttle(self, queue: str | None = None, action: str | None = None, share: float = 1.0) -> None:
        """Say "too many requests" from now on."""
        self.rules += (Rule(Fault.THROTTLE, queue, action, share),)

    def hang(self, queue: str | None = None, action: str | None = None, seconds: float = 60.0) -> None:
        """Do not answer from now on."""
        self.rules += (Rule(Fault.HANG, queue, action, seconds=seconds),)

    @contextmanager
    def having(self, *rules: Rule) -> Iterator[None]:
        """These rules before all others, for a while."""
        self.rules = rules + self.rules
        try:
            yield
        finally:
            self.rules = tuple(rule for rule in self.rules if rule not in rules)

    def on_their_way(self) -> int:
        """Messages that are late, and what is received and becomes visible later."""
        return len(self._later)

    # Inside the thread

    async def open(self) -> web.ServerRunner:
        self._session = aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        # The access log would need the library's logger, and nobody reads it.
        runner = web.ServerRunner(web.Server(self._serve, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return runner

    async def close(self, runner: web.ServerRunner) -> None:
        for task in self._later:
            task.cancel()
        self._reset_all()
        await runner.cleanup()
        assert self._session is not None
        await self._session.close()

    def _reset_all(self) -> None:
        for transport in [*self._open]:
            _abort(transport)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        request._client_max_size = 2 * 1024 * 1024  # the server itself has no way to say it; SQS takes 1 MiB
        asked = _understand(request, await request.read())
        self.seen[asked.action, asked.queue] += 1
        transport = request.transport
        if transport is None:
            return web.Response(status=400)
        self._open.add(transport)
        try:
            return await self._answer(asked, self._rule_for(asked), transport)
        except aiohttp.ClientError:
            _abort(transport)
            return web.Response(status=502)
        finally:
            self._open.discard(transport)

    def _rule_for(self, asked: Asked) -> Rule | None:
        for rule in self.rules:
            if _matches(rule, asked) and self._chance.random() < rule.share:
                self.done[rule.fault, asked.action, asked.queue] += 1
                return rule
        return None

    async def _answer(self, asked: Asked, rule: Rule | None, transport: asyncio.BaseTransport) -> web.Response:
        early = await self._instead(asked, rule, transport) if rule is not None else None
        if early is not None:
            return early
        answer, body = await self._forward(asked)
        if rule is not None:
            body = await self._afterwards(asked, rule, transport, body)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        return web.Response(status=answer.status, body=body, headers=kept)

    async def _instead(self, asked: Asked, rule: Rule, transport: asyncio.BaseTransport) -> web.Response | None:
        """What is answered instead of carrying the request out; None: it is to be carried out."""
        if rule.fault in (Fault.ERROR, Fault.THROTTLE):
            return _refusal(rule)
        if rule.fault in (Fault.HANG, Fault.SLOW):
            await asyncio.sleep(rule.seconds)
        if rule.fault in (Fault.RESET, Fault.HANG):
            _abort(transport)
            return web.Response(status=500)
        if rule.fault is Fault.LATE:
            self._do_later(rule.seconds, asked)
        return _as_if_sent(asked) if rule.fault in (Fault.LOST, Fault.LATE) else None

    async def _afterwards(self, asked: Asked, rule: Rule, transport: asyncio.BaseTransport, body: bytes) -> bytes:
        """What is done when the request has been carried out; the body of its answer."""
        if rule.fault is Fault.ANSWER_LOST:
            _abort(transport)
        elif rule.fault is Fault.TWICE:
            await self._forward(asked)
        elif rule.fault is Fault.AGAIN:
            for message in _messages(body):
                self._do_later(rule.seconds, _visible_at_once(asked, message["ReceiptHandle"]))
        elif rule.fault is Fault.SHUFFLE and (messages := _messages(body)):
            self._chance.shuffle(messages)
            return json.dumps({"Messages": messages}).encode()
        return body

    async def _forward(self, asked: Asked) -> tuple[aiohttp.ClientResponse, bytes]:
        assert self._session is not None
        url = self._endpoint + asked.path
        async with self._session.post(url, data=asked.raw, headers=asked.headers) as answer:
            return answer, await answer.read()

    def _do_later(self, seconds: float, asked: Asked) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            try:
                await self._forward(asked)
            except aiohttp.ClientError:
                return  # the endpoint is gone, and the test over

        task = asyncio.create_task(later(), name=f"{asked.action} later")
        self._later.add(task)
        task.add_done_callback(self._later.discard)


def _understand(request: web.BaseRequest, raw: bytes) -> Asked:
    target = request.headers.get("X-Amz-Target", "")
    body = json.loads(raw) if raw and target.startswith("AmazonSQS.") else {}
    queue = str(body.get("QueueUrl") or body.get("QueueName") or "").rstrip("/").rpartition("/")[2]
    headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
    return Asked(target.rpartition(".")[2], queue, body, raw, headers, request.path_qs)


def _matches(rule: Rule, asked: Asked) -> bool:
    if rule.fault is Fault.LOST and CANCELS not in asked.queue:
        return False
    if asked.action not in _MAKES_SENSE_FOR.get(rule.fault, (asked.action,)):
        return False
    if rule.action is not None and asked.action.removesuffix("Batch") != rule.action.removesuffix("Batch"):
        return False
    name = asked.queue.removesuffix(".fifo")
    if rule.queue is None or rule.queue == asked.queue:
        return True
    return name.endswith(rule.queue) if rule.queue else not name.endswith((CANCELS, STEPS))


def _abort(transport: asyncio.BaseTransport) -> None:
    if isinstance(transport, asyncio.Transport):
        transport.abort()


def _refusal(rule: Rule) -> web.Response:
    throttled = rule.fault is Fault.THROTTLE
    refused = "AccessDeniedException" if rule.status == 403 else "InternalFailure"
    kind = "RequestThrottled" if throttled else refused
    text = json.dumps({"__type": f"com.amazonaws.sqs#{kind}", "message": "as the test wants it"})
    return web.Response(status=400 if throttled else rule.status, text=text, content_type=_JSON)


def _as_if_sent(asked: Asked) -> web.Response:
    def sent(entry: Mapping[str, Any]) -> dict[str, str]:
        digest = hashlib.md5(str(entry["MessageBody"]).encode(), usedforsecurity=False).hexdigest()
        return {"MD5OfMessageBody": digest, "MessageId": str(uuid.uuid4())}

    if asked.action == "SendMessageBatch":
        entries = [{"Id": entry["Id"], **sent(entry)} for entry in asked.body["Entries"]]
        return web.Response(text=json.dumps({"Successful": entries, "Failed": []}), content_type=_JSON)
    return web.Response(text=json.dumps(sent(asked.body)), content_type=_JSON)


def _visible_at_once(asked: Asked, receipt: str) -> Asked:
    body = {"QueueUrl": asked.body["QueueUrl"], "ReceiptHandle": receipt, "VisibilityTimeout": 0}
    headers = asked.headers | {"X-Amz-Target": "AmazonSQS.ChangeMessageVisibility"}
    return Asked("ChangeMessageVisibility", asked.queue, body, json.dumps(body).encode(), headers)


def _messages(body: bytes) -> list[dict[str, Any]]:
    found = json.loads(body).get("Messages") or [] if body else []
    return list(found)


@contextmanager
def sqs_proxy(endpoint: str, seed: int = 0) -> Iterator[SqsProxy]:
    """A proxy in front of an SQS endpoint, on a free port; it is gone afterwards. `seed`: for what `share` decides."""
    with start_blocking_portal() as portal:
        proxy = SqsProxy(portal, endpoint.rstrip("/"), seed)
        runner = portal.call(proxy.open)
        try:
            yield proxy
        finally:
            portal.call(proxy.close, runner)
