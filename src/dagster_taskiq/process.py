"""A child process as the worker sees it: start, tell, interrupt, kill, wait until its whole tree is gone.

The other side of `keeper`. Knows processes, signals and asyncio; not what a child is for.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from dagster_taskiq import keeper, procfs
from dagster_taskiq.errors import ChildStartFailed

logger = logging.getLogger(__name__)

_START_TIMEOUT_S: Final = 120
_STOP_TIMEOUT_S: Final = 5
_NEVER_S: Final = 3600.0
_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a child is started for: `target` is `module:function`, called with `argument` (JSON) and its channel."""

    target: str
    argument: Any
    mark: str
    """Unique for the piece of work; in the environment of every process of the tree."""
    grace_s: float
    """Between interrupt and kill, should the worker disappear or hang."""
    hung_after_s: float = 0.0
    """Without a sign of life (`Child.live`) for so long, the worker hangs; 0: it is not looked after."""
    linger_s: float = 2.0
    """How long processes may go on that a child left behind when it ended by itself."""


@dataclass(slots=True)
class Child:
    """One started child. `exited` and `gone` are set by what the keeper says; `messages` are the child's own lines."""

    pid: int
    spec: ChildSpec
    exited: asyncio.Future[int]
    """The leader's exit code; negative: the signal that killed it."""
    gone: asyncio.Future[tuple[str, ...]]
    """Set when the whole tree is gone: the processes (name and pid) that had to be killed."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the child says that its work is over and only its exit remains."""
    patience_s: float = 0.0
    """What the child asks for instead of the grace, because it waits for others (a run for its steps)."""
    abandoned: bool = False
    """Whether its keeper has interrupted it because the worker hung."""
    _control: "_Lines | None" = None
    _channel: "_Lines | None" = None
    _readers: tuple[asyncio.Task[None], ...] = ()

    def tell(self, message: dict[str, Any]) -> None:
        """Write one line to the child itself. Never raises: a child that is gone hears nothing."""
        if self._channel is not None:
            self._channel.say(message)

    async def live(self) -> NoReturn:
        """Give signs of life to the keeper for as long as this runs, and the event loop does."""
        while True:
            self._command("live")
            await asyncio.sleep(self.spec.hung_after_s / (2 * keeper.SILENT_LOOKS) or _NEVER_S)

    def interrupt(self) -> None:
        """SIGTERM to the leader; however often this is called, it is sent once."""
        self._command("interrupt")

    def kill(self) -> None:
        """SIGKILL to the leader, its group and every descendant."""
        self._command("kill")

    def _command(self, what: str) -> None:
        if self._control is not None:
            self._control.say({"do": what})

    def hear(self, message: dict[str, Any]) -> None:
        """Take in one line of the child's."""
        self.messages.append(message)
        if "finished" in message:
            self.finished.set()
        if "patience_s" in message:
            self.patience_s = float(message["patience_s"])

    async def close(self) -> None:
        """Release what belongs to the child; only after `gone`."""
        await asyncio.wait(self._readers)
        for lines in (self._control, self._channel):
            if lines is not None:
                lines.close()


class _Lines:
    """Our end of a socket pair on which JSON lines travel.

    Not asyncio's streams: when the other side ends without having read all that we said, which is the rule here, they
    throw away what it had said before.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._unsent = bytearray()
        self._loop = asyncio.get_running_loop()

    def say(self, message: dict[str, Any]) -> None:
        """Send it, now if the other side takes it; never raises: who is gone hears nothing."""
        self.send(json.dumps(message).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """As `say`, for anything."""
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        if self._end.fileno() < 0:
            return
        try:
            del self._unsent[: self._end.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()
        if self._unsent:
            self._loop.add_writer(self._end, self._flush)
        else:
            self._loop.remove_writer(self._end)

    async def heard(self) -> AsyncIterator[dict[str, Any]]:
        """What the other side says, until it ends."""
        unfinished = b""
        while True:
            try:
                data = await self._loop.sock_recv(self._end, _CHUNK)
            except OSError:
                return
            if not data:
                return
            *lines, unfinished = (unfinished + data).split(b"\n")
            for line in lines:
                with suppress(ValueError):
                    yield json.loads(line)

    def close(self) -> None:
        """Nothing more to say or to hear."""
        self._loop.remove_writer(self._end)
        self._end.close()


class ForkServer:
    """The warm process from which children are forked. Started at first use, started anew should it have died."""

    def __init__(
        self, *, fresh: bool = False, preload: Sequence[str] = (), warm_up: str | None = None, argument: Any = None
    ) -> None:
        """`fresh`: children are fresh interpreters, so there is nothing to import or warm up beforehand."""
        self._fresh = fresh
        self._setup = {
            "preload": [] if fresh else list(preload),
            "warm_up": None if fresh else warm_up,
            "argument": argument,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The server's pid while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Start the server unless it runs, and wait until it is warm. Raises `ChildStartFailed`."""
        async with self._lock:
            if self.pid is None:
                await self._start()

    async def _start(self) -> None:
        self._discard()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = "from dagster_taskiq.keeper import serve_from_argv; serve_from_argv()"
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220 - our own interpreter; a fork takes a millisecond
                [sys.executable, "-c", code, str(theirs.fileno()), json.dumps(self._setup)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C in a terminal goes to the worker's group alone: it decides what becomes of its children.
                start_new_session=True,
            )
        ours.setblocking(False)
        self._socket = ours
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                reply = json.loads(await asyncio.get_running_loop().sock_recv(ours, 65536) or b"{}")
        except (TimeoutError, OSError) as error:
            self._discard()
            raise ChildStartFailed(f"the fork server did not come up within {_START_TIMEOUT_S} s") from error
        if "ready" not in reply:
            self._discard()
            raise ChildStartFailed(
                f"the fork server could not be warmed up ({reply.get('error', 'it ended')});"
                " correct preload_modules, or set start_method: spawn"
            )
        if not self._fresh and reply["threads"] > 1:
            self._discard()
            raise ChildStartFailed(
                f"importing preload_modules started {reply['threads'] - 1} threads, which do not survive a fork;"
                " take that module off the list, or set start_method: spawn"
            )

    async def fork(self, spec: ChildSpec) -> Child:
        """Start one child. Raises `ChildStartFailed`, in which case there is no process."""
        for attempt in (1, 2):
            await self.start()
            try:
                return await self._fork(spec)
            except (OSError, EOFError) as error:
                # The server died (out of memory, an operator's kill). What it forked goes on, in its keepers' care.
                logger.warning("the fork server is gone; starting another", extra={"attempt": attempt})
                self._discard()
                cause = error
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
        control, keepers_end = socket.socketpair()
        channel, childs_end = socket.socketpair()
        with keepers_end, childs_end:
            try:
                if self._socket is None:
                    raise EOFError  # noqa: TRY301 - the clean-up below is for this, too
                socket.send_fds(
                    self._socket, [json.dumps(request).encode()], [keepers_end.fileno(), childs_end.fileno()]
                )
            except BaseException:
                control.close()
                channel.close()
                raise
        return await _connect(spec, control, channel)

    def _discard(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait(_STOP_TIMEOUT_S)
        self._process, self._socket = None, None

    async def stop(self) -> None:
        """End the server. Children in their keepers' care are not touched."""
        async with self._lock:
            await asyncio.to_thread(self._discard)


async def _connect(spec: ChildSpec, control: socket.socket, channel: socket.socket) -> Child:
    keepers, childs = _Lines(control), _Lines(channel)
    keeper_says = keepers.heard()
    hello = await anext(keeper_says, None)
    if hello is None:
        keepers.close()
        childs.close()
        raise EOFError("the fork server forked nothing")
    loop = asyncio.get_running_loop()
    child = Child(hello["started"], spec, loop.create_future(), loop.create_future())
    child._control, child._channel = keepers, childs  # noqa: SLF001 - made here
    childs.send(keeper.packed_argument(spec.argument))
    hear_child = loop.create_task(_hear_child(child, childs), name=f"hear child {child.pid}")
    child._readers = (  # noqa: SLF001
        hear_child,
        loop.create_task(_hear_keeper(child, keeper_says, hear_child), name=f"hear keeper of {child.pid}"),
    )
    return child


async def _hear_child(child: Child, lines: _Lines) -> None:
    async for message in lines.heard():
        child.hear(message)


async def _hear_keeper(child: Child, messages: AsyncIterator[dict[str, Any]], hear_child: asyncio.Task[None]) -> None:
    killed: tuple[str, ...] | None = None
    async for message in messages:
        if "exited" in message:
            child.exited.set_result(message["exited"])
        child.abandoned = child.abandoned or "abandoned" in message
        if "gone" in message:
            killed = tuple(message["killed"])
    if killed is None:
        # The keeper itself was killed, and the kernel killed its child with it (parent-death signal). Its place
        # as subreaper is the fork server's now, so look for what carries the session or the mark.
        logger.warning("the keeper of a child is gone; killing what is left", extra={"pid": child.pid})
        killed = await asyncio.to_thread(_kill_stragglers, child.pid, child.spec.mark)
    if not child.exited.done():
        child.exited.set_result(-signal.SIGKILL)
    # The tree is gone, so the child's end of its channel is closed and all that it said can be read.
    await asyncio.wait({hear_child}, timeout=_STOP_TIMEOUT_S)
    hear_child.cancel()
    child.gone.set_result(killed)


def _kill_stragglers(leader: int, mark: str) -> tuple[str, ...]:
    killed: list[str] = []
    while left := find_processes(mark, session=leader):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed.append(f"pid {pid}")
    return tuple(dict.fromkeys(killed))


def find_processes(mark: str, *, session: int | None = None) -> list[int]:
    """Living processes that carry the mark, or belong to the session; this one excepted.

    The mark is in the environment of what was executed, and in the name of what was only forked.
    """
    name = keeper.name_for(mark)
    wanted = f"{keeper.MARK_VARIABLE}={mark}".encode()
    found = []
    for pid in procfs.processes():
        if pid == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            environment = []
        its_session = procfs.session_of(pid)
        marked = its_session == session or wanted in environment or procfs.command_of(pid) == name
        if its_session is not None and marked:
            found.append(pid)
    return found
