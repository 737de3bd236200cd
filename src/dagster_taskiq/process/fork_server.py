"""The warm process from which children are forked, as the worker sees it: start it, have it fork, end it.

The other side of `fork_server_main`. Knows processes and asyncio; not what a child is for.
"""

import asyncio
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Final

from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.process.child_handle import STOP_TIMEOUT_S, Child, ChildSpec, connect
from dagster_taskiq.process.fork_server_main import serve
from dagster_taskiq.process.forked import Forked, fork_into, why_not

logger = logging.getLogger(__name__)

_START_TIMEOUT_S: Final = 120
_TITLE: Final = b"dagster-taskiq fork server"
ANSWER_S: Final = 15.0
"""A server that has answered nobody for so long hangs. It forks in milliseconds, one child after the other."""
_LOOKS: Final = 5
"""In so many looks: when the whole machine was frozen, the server has its chance after it."""
_FULL_S: Final = 0.02
_HANGS: Final = "the fork server does not answer"
_IS_GONE: Final = "the fork server is gone"


class ForkServer:
    """The warm process from which children are forked. Started at first use, started anew should it have died.

    It is executed, and then imports everything once more; unless `fork_early` was called before there was anything
    that must not be shared.
    """

    def __init__(
        self, *, fresh: bool = False, preload: Sequence[str] = (), warm_up: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """`preload`: modules to import. `warm_up`: functions ("module:name") to call, with their arguments.

        `fresh`: children are fresh interpreters, so there is nothing to import or warm up beforehand.
        """
        self._fresh = fresh
        self._setup: dict[str, Any] = {
            "preload": [] if fresh else list(preload),
            "warm_up": {} if fresh else dict(warm_up or {}),
        }
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._socket: socket.socket | None = None
        self._is_set_up = False
        self._is_warm = False
        self._answers = 0
        """How often this server, and those before it, have forked."""
        self._starting: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The server's pid while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def fork_early(self) -> None:
        """Fork the server from this process, with all that is imported. It waits until it is told to `warm_up`.

        Only a process with one thread and no socket is forked; otherwise, and for fresh children, `start` executes it.
        """
        if self._fresh:
            return
        if (reason := why_not()) is not None:
            logger.warning("the fork server is executed, which takes longer than a fork: %s", reason)
            return
        with self._connect() as theirs:
            self._process = fork_into(serve, theirs, title=_TITLE)

    def warm_up(self) -> None:
        """Have a server that was forked early import and open what children need, while this process goes on.

        Not before this process has opened it: what opens a database for the first time also creates its tables.
        """
        if self._process is not None and self._socket is not None and not self._is_set_up:
            self._is_set_up = True
            with suppress(OSError):  # it is gone: `start` says so
                self._socket.send(json.dumps(self._setup).encode())

    async def start(self) -> None:
        """Start the server unless it runs, and wait until it is warm. Raises `ChildStartFailed`.

        Whoever is cancelled while he waits does not keep others from it.
        """
        if self._is_warm and self.pid is not None:
            return
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start(), name="start the fork server")
        starting = self._starting
        await asyncio.wait({starting})
        starting.result()

    async def _start(self) -> None:
        has_died = self._is_warm and self.pid is None
        if has_died:
            logger.warning("the fork server is gone; starting another")
        if self._process is None or has_died:
            self.discard()
            self._execute()
        self.warm_up()
        if not self._is_warm:
            await self._until_warm()

    def _execute(self) -> None:
        code = "from dagster_taskiq.process.fork_server_main import serve_from_argv; serve_from_argv()"
        with self._connect() as theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, "-c", code, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C in a terminal goes to the worker's group alone: it decides what becomes of its children.
                start_new_session=True,
            )

    def _connect(self) -> socket.socket:
        """A new connection; returns the server's end of it."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        return theirs

    async def _until_warm(self) -> None:
        if self._socket is None:
            raise ChildStartFailed("the fork server was stopped")
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                reply = json.loads(await asyncio.get_running_loop().sock_recv(self._socket, 65536) or b"{}")
        except (TimeoutError, OSError) as error:
            await self._kill()
            raise ChildStartFailed(f"the fork server did not come up within {_START_TIMEOUT_S} s") from error
        if "ready" not in reply:
            await self._end()
            raise ChildStartFailed(
                f"the fork server could not be warmed up ({reply.get('error', 'it ended')});"
                " correct preload_modules, or set start_method: spawn"
            )
        if not self._fresh and reply["threads"] > 1:
            await self._end()
            raise ChildStartFailed(
                f"importing preload_modules started {reply['threads'] - 1} threads, which do not survive a fork;"
                " take that module off the list, or set start_method: spawn"
            )
        self._is_warm = True

    async def fork(self, spec: ChildSpec) -> Child:
        """Start one child, which waits for `Child.begin`.

        Raises `ChildStartFailed`. Then, and when the caller is cancelled, there is no process, or it ends by itself
        before it has begun.
        """
        for attempt in (1, 2):
            await self.start()
            server = self._socket
            try:
                return await self._fork(spec)
            except (OSError, EOFError) as error:
                # It died (out of memory, an operator's kill), or hangs. What it forked goes on, in its shims' care.
                cause = error
                if server is self._socket:
                    logger.warning("%s; starting another", error, extra={"attempt": attempt})
                    await self._kill()
        raise ChildStartFailed(f"no child could be forked: {cause!r}") from cause

    async def _fork(self, spec: ChildSpec) -> Child:
        request = {
            "target": spec.target,
            "mark": spec.mark,
            "grace_s": spec.grace_s,
            "linger_s": spec.linger_s,
            "hung_after_s": spec.hung_after_s,
            "fresh": self._fresh,
        }
        control, shims_end = socket.socketpair()
        channel, childs_end = socket.socketpair()
        try:
            with shims_end, childs_end:
                await self._ask(json.dumps(request).encode(), [shims_end.fileno(), childs_end.fileno()])
            return await self._answered(connect(spec, control, channel))
        except BaseException:
            # A shim that comes later finds that the worker is gone, and a child that it was given nothing to do.
            control.close()
            channel.close()
            raise

    async def _ask(self, request: bytes, fds: Sequence[int]) -> None:
        give_up_at = monotonic() + ANSWER_S
        while self._socket is not None:
            try:
                socket.send_fds(self._socket, [request], fds)
            except BlockingIOError:  # so many are waiting already
                if monotonic() > give_up_at:
                    raise TimeoutError(_HANGS) from None
                await asyncio.sleep(_FULL_S)
            else:
                return
        raise EOFError(_IS_GONE)

    async def _answered(self, connecting: Coroutine[Any, Any, Child]) -> Child:
        """The child, once it is there. Raises `TimeoutError` when the server forks nothing any more, for anybody."""
        answer = asyncio.create_task(connecting, name="await a child")
        try:
            await self._until_answered(answer)
        except BaseException:
            answer.cancel()
            await asyncio.wait({answer})
            if not answer.cancelled() and answer.exception() is None:
                await answer.result().abandon()
            raise
        self._answers += 1
        return answer.result()

    async def _until_answered(self, answer: "asyncio.Task[Child]") -> None:
        looks, answers = 0, self._answers
        while not answer.done():
            if looks == _LOOKS:
                raise TimeoutError(_HANGS)
            await asyncio.wait({answer}, timeout=ANSWER_S / _LOOKS)
            looks, answers = (looks + 1, answers) if answers == self._answers else (0, self._answers)

    async def _kill(self) -> None:
        """End a server that hangs or is gone, at once; whoever else waits for it notices."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        await self._end()

    async def _end(self) -> None:
        """From now on there is no server. Its process may take seconds to end, in which others have their turn."""
        await asyncio.to_thread(_until_over, self._forget())

    def discard(self) -> None:
        """End the server, as `stop`, from outside an event loop. Takes half a second at most, unless it hangs."""
        _until_over(self._forget())

    def _forget(self) -> subprocess.Popen[bytes] | Forked | None:
        """Have no server any more, and return its process: without its connection it ends."""
        if self._socket is not None:
            self._socket.close()
        process = self._process
        self._process, self._socket = None, None
        self._is_set_up = self._is_warm = False
        return process

    async def stop(self) -> None:
        """End the server. Children in their shims' care are not touched."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._end()


def _until_over(process: subprocess.Popen[bytes] | Forked | None) -> None:
    """Blocks until the process has ended, half a second at most before it is killed."""
    if process is None:
        return
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.5)
    if process.poll() is None:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, where nothing reaches it
            process.wait(STOP_TIMEOUT_S)
