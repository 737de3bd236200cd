"""A child process as the worker sees it: send it something, interrupt it, kill it, wait until its whole tree is gone.

The other side of `shim`. Knows processes and asyncio; not how children are started, or what a child is for.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from dagster_taskiq.process import procfs, shim
from dagster_taskiq.process.json_lines import AsyncLines

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5
_OF_STEPS: Final = {"step_limit", "step_stopped", "step_over", "step_finished", "step_gone"}
_NEVER_S: Final = 3600.0
_POLL_WHILE_KILLING_S: Final = 0.02
KILLED_WITHIN_S: Final = 30.0
"""The kernel kills within milliseconds, unless a process waits in it for a device or a file system that hangs."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a child is started for: `target` is `module:function`, called with `argument` (JSON) and its channel."""

    target: str
    argument: Any
    mark: str
    """Unique for the piece of work; in the environment of every process of the tree."""
    grace_s: float
    """Between interrupt and kill, should the worker disappear or hang."""
    exit_patience_s: float
    """How long the child may go on when its work is over: an interpreter waits for its threads."""
    cancelled_exit_patience_s: float
    """The same when it was cancelled; within the grace."""
    hung_after_s: float = 0.0
    """Without a sign of life (`Child.live`) for so long, the worker hangs; 0: it is not looked after."""
    linger_s: float = 2.0
    """How long processes may go on that a child left behind when it ended by itself."""
    is_one_step: bool = False
    """Whether its work is one step: when that has timed out its threads have the time of a cancelled one."""
    on_message: Callable[[dict[str, Any]], object] | None = None
    """Called with each message of the child's as it comes; must not raise."""


@dataclass(slots=True)
class Child:
    """One started child. `exited` and `gone` are set by the shim's messages; `messages` are the child's own."""

    pid: int
    spec: ChildSpec
    exited: asyncio.Future[int]
    """The leader's exit code; negative: the signal that killed it."""
    gone: asyncio.Future[tuple[str, ...]]
    """Set when the whole tree is gone: the processes (name and pid) that had to be killed."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the child reports that its work is over and only its exit remains."""
    finished_at: float = 0.0
    """When that was, by this process's monotonic clock."""
    stays: tuple[str, ...] = ()
    """What it then waits for: the names of threads and processes, as it has last reported them."""
    patience_s: float = 0.0
    """What the child asks for instead of the grace, because it waits for others (a run for its steps)."""
    abandoned: bool = False
    """Whether its shim has interrupted it because the worker hung."""
    on_step: Callable[[str, Any], object] = lambda *_: None
    """Called with what is heard of steps that have a limit; must not raise."""
    _shim: int | None = None
    _control: AsyncLines | None = None
    _channel: AsyncLines | None = None
    _readers: tuple[asyncio.Task[None], ...] = ()

    def begin(self) -> None:
        """Have it do what it was started for. Until then it waits, and does nothing."""
        if self._channel is not None:
            self._channel.send_bytes(shim.packed_argument(self.spec.argument))

    def send(self, message: dict[str, Any]) -> None:
        """Write one line to the child itself. Never raises: a child that is gone receives nothing."""
        if self._channel is not None:
            self._channel.send(message)

    async def live(self) -> NoReturn:
        """Give signs of life to the shim for as long as this runs, and the event loop does."""
        while True:
            self._command("live")
            await asyncio.sleep(self.spec.hung_after_s / (2 * shim.SILENT_LOOKS) or _NEVER_S)

    def interrupt(self) -> None:
        """SIGTERM to the leader; however often this is called, it is sent once."""
        self._command("interrupt")

    def kill(self) -> None:
        """SIGKILL to the leader, its group and every descendant."""
        self._command("kill")

    def nudge(self, pid: int) -> None:
        """Have a process of the tree look at what was sent to it."""
        self._command("nudge", pid=pid)

    def end_step(self, name: str, mark: str, pid: int | None) -> None:
        """SIGKILL to what has that mark in its environment, and to the process of a step with all that is below it.

        `on_step` hears `step_ended`, and this name, when they are gone.
        """
        self._command("end_step", name=name, mark=mark, pid=pid)

    def kill_shim(self) -> None:
        """For a shim that hangs: the kernel kills the leader with it, and the rest of the tree is looked for."""
        if self._shim is not None and not self.gone.done():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self._shim, signal.SIGKILL)

    def _command(self, what: str, **about: Any) -> None:
        if self._control is not None:
            self._control.send({"do": what, **about})

    def handle_message(self, message: dict[str, Any]) -> None:
        """Take in one line of the child's."""
        if "stays" in message:
            self.stays = tuple(map(str, message["stays"]))
            return
        for about in _OF_STEPS & message.keys():
            self.on_step(about, message[about])
            return  # there may be any number of them
        if self.spec.on_message is not None:
            self.spec.on_message(message)
        if "log" in message:  # there may be any number of them
            return
        self.messages.append(message)
        if "finished" in message:
            self.finished_at = time.monotonic()
            self.finished.set()
        if "patience_s" in message:
            self.patience_s = float(message["patience_s"])

    async def abandon(self) -> None:
        """Let a child go that has not begun: it ends by itself when it finds its worker gone."""
        for reader in self._readers:
            reader.cancel()
        await self.close()

    async def close(self) -> None:
        """Release what belongs to the child; only after `gone`."""
        await asyncio.wait(self._readers)
        for lines in (self._control, self._channel):
            if lines is not None:
                lines.close()


async def connect(spec: ChildSpec, control: socket.socket, channel: socket.socket) -> Child:
    """The child that the fork server was asked for, once it is there. Raises `EOFError` when there is none.

    When that fails, or is cancelled, the sockets are for the caller to close.
    """
    to_shim, to_child = AsyncLines(control), AsyncLines(channel)
    from_shim = to_shim.messages()
    hello = await anext(from_shim, None)
    if hello is None:
        raise EOFError("the fork server is gone")
    loop = asyncio.get_running_loop()
    child = Child(hello["started"], spec, loop.create_future(), loop.create_future())
    child._shim = hello["shim"]  # noqa: SLF001 - made here
    child._control, child._channel = to_shim, to_child  # noqa: SLF001
    read_child = loop.create_task(_read_child(child, to_child), name=f"read child {child.pid}")
    child._readers = (  # noqa: SLF001
        read_child,
        loop.create_task(_read_shim(child, from_shim, read_child), name=f"read shim of {child.pid}"),
    )
    return child


async def _read_child(child: Child, lines: AsyncLines) -> None:
    async for message in lines.messages():
        child.handle_message(message)


async def _read_shim(child: Child, messages: AsyncIterator[Any], read_child: asyncio.Task[None]) -> None:
    killed: tuple[str, ...] | None = None
    async for message in messages:
        if "exited" in message:
            child.exited.set_result(message["exited"])
        if "step_ended" in message:
            child.on_step("step_ended", message["step_ended"])
        child.abandoned = child.abandoned or "abandoned" in message
        if "gone" in message:
            killed = tuple(message["killed"])
    if killed is None:
        # The shim itself was killed, and the kernel killed its child with it (parent-death signal). Its place
        # as subreaper is the fork server's now, so look for what carries the session or the mark.
        logger.warning("the shim of a child is gone; killing what is left", extra={"pid": child.pid})
        killed = await asyncio.to_thread(_kill_stragglers, child.pid, child.spec.mark)
    if not child.exited.done():
        child.exited.set_result(-signal.SIGKILL)
    # The tree is gone, so the child's end of its channel is closed and all that it said can be read.
    await asyncio.wait({read_child}, timeout=STOP_TIMEOUT_S)
    read_child.cancel()
    child.gone.set_result(killed)


def _kill_stragglers(leader: int, mark: str) -> tuple[str, ...]:
    killed: dict[int, str] = {}
    give_up_at = time.monotonic() + KILLED_WITHIN_S
    while left := find_processes(mark, session=leader):
        for pid in left:
            name = procfs.program_of(pid)
            counts = not procfs.ends_with_its_parent(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                if counts:
                    killed.setdefault(pid, f"{name}[{pid}]")
        if time.monotonic() > give_up_at:
            # It has its SIGKILL: should the kernel let go of it, it ends before it does anything else.
            text = "processes of a child hang in the kernel, or are another user's; going on without them: %s"
            logger.error(text, ", ".join(f"{procfs.program_of(pid)}[{pid}]" for pid in left), extra={"pid": leader})
            break
        time.sleep(_POLL_WHILE_KILLING_S)
    return tuple(killed.values())


def find_processes(mark: str, *, session: int | None = None) -> list[int]:
    """Living processes that carry the mark, or belong to the session; this one excepted.

    The mark is in the environment of what was executed, and in the name of what was only forked.
    """
    name = shim.name_for(mark)
    wanted = f"{shim.MARK_VARIABLE}={mark}".encode()
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
