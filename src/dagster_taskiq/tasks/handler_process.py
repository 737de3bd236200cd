"""A process for one attempt of a cleanup handler that is a plain function: a thread could not be stopped.

Knows children and what they report; the handler is called in there, by `handler_child`.
"""

import asyncio
import base64
import logging
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Final
from weakref import WeakKeyDictionary

from dagster_taskiq._attempt_limit import HARD_TIMEOUT_S, no_reaction
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.process.child_handle import ChildSpec
from dagster_taskiq.process.fork_server import ForkServer
from dagster_taskiq.process.supervise import ChildEnd, supervise

logger = logging.getLogger(__name__)

_TARGET: Final = "dagster_taskiq.tasks.handler_child:run"
_BEGINS_WITHIN_S: Final = 120.0
"""For the interpreter's start and the import of the handler's module; then the process is ended."""
AT_ONCE: Final = 8
"""Such processes of one worker: each is an interpreter of its own, and a whole group may be cancelled at once."""

_slots: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]] = WeakKeyDictionary()


class HandlerFailed(Exception):
    """An attempt has failed; the text says how."""


class _Observer:
    """See `supervise.Observer`."""

    def interrupting(self, pid: int, grace_s: float) -> None:
        """Nothing to say: what became of the attempt is logged at its end."""

    def staying(self, pid: int, stays: Sequence[str], patience_s: float) -> None:
        """As above."""

    def killing(self, pid: int, waited_s: float, shield: str | None, stays: Sequence[str] | None) -> None:
        """As above."""


def why_not_alone(call: Callable[..., Any]) -> str | None:
    """Why another process cannot find this handler; None: it can, by its module and its name."""
    module, name = getattr(call, "__module__", None), getattr(call, "__qualname__", None)
    if module is None or name is None:
        return "it is no function"
    if module in ("__main__", "__mp_main__"):
        return "its module is run as a program, and has no name to import it by"
    found: Any
    try:
        found = reduce(getattr, name.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        found = None
    return None if found is call else "it is defined inside of a function, or is a lambda or a method"


def packed(given: Mapping[str, Any]) -> str:
    """What the handler's context is made of, for its process. Raises what `pickle` raises."""
    return base64.b64encode(pickle.dumps(dict(given))).decode()


async def call_in_process(
    call: Callable[..., Any], given: str, state: State, *, timeout_s: float, log: logging.Logger, about: dict[str, Any]
) -> None:
    """Run one attempt; returns when its process tree is gone. Raises `HandlerFailed`. Must run inside `shielded`.

    `given`: what was `packed`. `state` is changed as the handler changes its own. `about`: for each line of its log.
    """

    began_at: float | None = None

    def hear(message: dict[str, Any]) -> None:
        nonlocal began_at
        if "began" in message:
            began_at = time.time()
        elif "log" in message:
            line = message["log"]
            logging.getLogger(line["logger"]).log(line["level"], "%s", line["text"], extra=about)
        elif "state" in message:
            state.replace(message["state"])

    argument = {
        "module": call.__module__,
        "name": call.__qualname__,
        "path": sys.path,
        "given": given,
        "state": dict(state),
        "timeout_s": timeout_s,
        "logger": log.name,
        "level": log.getEffectiveLevel(),
    }
    limit_s = HARD_TIMEOUT_S  # also of threads that the handler leaves behind
    spec = ChildSpec(_TARGET, argument, f"cleanup-{uuid.uuid4().hex}", limit_s, limit_s, limit_s, on_message=hear)
    async with _slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)):
        end = await _seen_through(spec, _BEGINS_WITHIN_S + timeout_s + HARD_TIMEOUT_S)
    if not any("succeeded" in message for message in end.messages):
        raise HandlerFailed(_why(end, began_at, timeout_s))


async def _seen_through(spec: ChildSpec, within_s: float) -> ChildEnd:
    server, too_long = ForkServer(fresh=True), CancelSignal()
    timer = asyncio.get_running_loop().call_later(
        within_s, too_long.set, Cancellation(CancelKind.SHUTDOWN, cause="a cleanup handler takes too long")
    )
    try:
        end = await supervise(server, spec, too_long, _Observer(), lambda _: HARD_TIMEOUT_S)
    except ChildStartFailed as error:
        raise HandlerFailed(str(error)) from error
    finally:
        timer.cancel()
        await server.stop()
    if end is None:
        raise HandlerFailed(f"its process did not begin within {within_s:g} s")
    return end


def _why(end: ChildEnd, began_at: float | None, timeout_s: float) -> str:
    failed = next((message["failed"] for message in end.messages if "failed" in message), None)
    if failed is not None:
        return str(failed)
    how = f"was killed by {end.killed_by}" if end.killed_by is not None else f"ended with exit code {end.exit_code}"
    if began_at is None:
        return f"its process {end.pid} {how} before it had begun"
    if end.gone_at - began_at >= timeout_s + HARD_TIMEOUT_S:
        return no_reaction(timeout_s)
    return f"its process {end.pid} {how}"
