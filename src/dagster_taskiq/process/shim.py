"""The fork server and the shims: the processes between a worker and its children.

    worker ── fork server (warm, single-threaded) ── shim ── child (leader of its own session) ── whatever it starts

A *shim* has one child and one duty: that nothing of the child's process tree outlives it. It is the tree's
subreaper, so whatever double-forks or leaves the session falls to it, and "no children left" (ECHILD) is the
kernel's own proof that the tree is gone. It runs no code of users, so nothing that they do can block it; when the
worker disappears (end of file on the control socket), or hangs (no sign of life on it), it climbs the ladder by itself.

Knows processes and signals; not asyncio, not what the child is for. Needs the standard library only.
"""

import atexit
import ctypes
import hashlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Final, NoReturn

from dagster_taskiq._last_words import flush_output, print_traceback
from dagster_taskiq.process import procfs
from dagster_taskiq.process.json_lines import Splitter, line_of

PR_SET_PDEATHSIG: Final = 1
PR_SET_NAME: Final = 15
PR_SET_CHILD_SUBREAPER: Final = 36
INTERRUPTS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
"""Blocked from before the fork until the child's own handlers stand, so that none is lost and none kills too early."""
NUDGE: Final = signal.SIGURG
"""Wakes a leader that has missed its interrupt (`_Shim._nudge`). The Go runtime uses it in this way, and for these
reasons: nobody else does, and who does not know it ignores it."""
NUDGES_S: Final = (0.05, 0.25, 1.0, 5.0)
MARK_VARIABLE: Final = "DAGSTER_TASKIQ_TASK"
"""In the environment of every child: by it a process is recognised that lost its shim."""
NAME_PREFIX: Final = "dagster-"
MAX_REQUEST: Final = 1 << 16
MAX_SETUP: Final = 1 << 20
_LENGTH_BYTES: Final = 8
FDS: Final = 2
SILENT_LOOKS: Final = 4
"""A worker hangs when so many looks in a row have found no sign of life. Looks, not seconds: when the whole machine was
frozen, the worker has its chance after it."""
_MOMENT_S: Final = 0.2
"""What is left of an interrupted tree has so long to end by itself, when its leader has."""
_POLL_WHILE_KILLING_S: Final = 0.02
_NEVER: Final = float("inf")
_NAMES_KEPT: Final = 10
_NAME_LENGTH: Final = 15  # prctl(2): 16 bytes with the terminating one
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Linux `prctl(2)`. Raises OSError."""
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def name_for(mark: str) -> str:
    """The name (`comm`) of a child: a process that it forks without executing anything keeps it."""
    return NAME_PREFIX + hashlib.blake2s(mark.encode()).hexdigest()[: _NAME_LENGTH - len(NAME_PREFIX)]


def run_shim(request: dict[str, Any], control: socket.socket, channel: socket.socket) -> Callable[[], int]:
    """Become a shim, start the child, stay until its tree is gone. Returns only in the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    shim = os.getpid()
    leader = os.fork()
    if leader == 0:
        control.close()
        return lambda: _become_child(request, shim, channel)
    channel.close()
    for ignored in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        _Shim(leader, control, **{name: request[name] for name in ("grace_s", "linger_s", "hung_after_s")}).run()
    finally:
        os._exit(0)


def _become_child(request: dict[str, Any], shim: int, channel: socket.socket) -> int:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != shim:
        os._exit(1)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(NUDGE, _wake_up)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ[MARK_VARIABLE] = request["mark"]
    _libc.prctl(PR_SET_NAME, name_for(request["mark"]).encode(), 0, 0, 0)
    if request["fresh"]:
        channel.set_inheritable(True)
        code = f"from {__name__} import run_fresh; run_fresh()"
        arguments = [str(channel.fileno()), request["target"]]
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments])  # noqa: S606 - our own interpreter
    return int(load_target(request["target"])(receive_argument(channel), channel))


def _wake_up(*_: object) -> None:
    """Nothing: what a system call that was interrupted does on its way to here is enough."""


def run_fresh() -> None:
    """Entry of a child in a fresh interpreter (start method "spawn"); the signals are still blocked."""
    signal.signal(NUDGE, _wake_up)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    target = sys.argv[2]
    del sys.argv[1:]
    live_and_leave(lambda: load_target(target)(receive_argument(channel), channel))


def packed_argument(argument: Any) -> bytes:
    """A child's argument as the worker sends it: first of all on the channel, because it may be large."""
    data = json.dumps(argument).encode()
    return len(data).to_bytes(_LENGTH_BYTES) + data


def receive_argument(channel: socket.socket) -> Any:
    """The argument, and not a byte of what may follow. Raises EOFError when the worker is gone before that."""
    length = int.from_bytes(_receive_exactly(channel, _LENGTH_BYTES))
    return json.loads(_receive_exactly(channel, length))


def _receive_exactly(channel: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        more = channel.recv(min(length - len(data), 1 << 20))
        if not more:
            raise EOFError("the worker is gone")
        data += more
    return bytes(data)


def live_and_leave(work: Callable[[], int]) -> NoReturn:
    """Do the work and end as an interpreter does: threads joined, exit handlers run, buffers flushed.

    But without dismantling the interpreter module by module, which takes a cancelled run another 60 ms (measured).
    """
    code = 1
    try:
        code = work()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - printed as the interpreter would
        print_traceback()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing ends its children
        atexit._run_exitfuncs()  # noqa: SLF001
        flush_output()
        os._exit(code)


class _EndingStep:
    """A step whose processes are being killed. `pid`: the one that executes it, if that is to end, too.

    `mark`: `name=value` in the environment of what it has started.
    """

    def __init__(self, pid: int | None, mark: str) -> None:
        self.pid = pid
        self.mark = mark
        self.names: dict[int, str] = {}

    def note(self, pid: int) -> None:
        """It is about to be killed."""
        if pid not in self.names and not procfs.ends_with_its_parent(pid):
            self.names[pid] = f"{procfs.program_of(pid)}[{pid}]"


class _Shim:
    """The life of one child, seen from its parent. Speaks JSON lines with the worker."""

    def __init__(
        self, leader: int, control: socket.socket, *, grace_s: float, linger_s: float, hung_after_s: float
    ) -> None:
        self._leader = leader
        self._leader_lives = True
        self._control = control
        self._grace_s = grace_s
        self._linger_s = linger_s
        self._look_every_s = hung_after_s / SILENT_LOOKS
        self._look_at = monotonic() + self._look_every_s if hung_after_s else _NEVER
        self._silent_looks = 0
        self._interrupted = False
        self._nudges: list[tuple[float, int]] = []
        """When which process gets one; in this order."""
        self._ending: dict[str, _EndingStep] = {}
        """Steps whose processes are being killed, by the name of their limit."""
        self._killing = False
        self._kill_at: float | None = None
        self._names: dict[int, str] = {}
        """Of the processes that a SIGKILL was sent to; empty for those that do not count."""
        self._killed: list[str] = []
        self._told = Splitter()
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._control.setblocking(False)
        self._selector.register(self._control, selectors.EVENT_READ, self._read_worker)
        self._selector.register(wake_read, selectors.EVENT_READ, lambda: os.read(wake_read, 4096))
        self._send(started=self._leader, shim=os.getpid())
        while not self._reap():
            if self._kill_at is not None and monotonic() >= self._kill_at:
                self._killing = True
            if self._killing:
                self._kill_what_is_left()
            self._kill_steps()
            self._nudge()
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._look_after_the_worker()
        more = len(self._killed) - _NAMES_KEPT
        self._send(gone=True, killed=self._killed[:_NAMES_KEPT] + ([f"{more} more"] if more > 0 else []))

    def _patience(self) -> float | None:
        if self._killing or self._ending:
            return _POLL_WHILE_KILLING_S
        due = min([self._look_at, *(at for at, _ in self._nudges[:1]), self._kill_at or _NEVER])
        return None if due == _NEVER else max(0.0, due - monotonic())

    def _look_after_the_worker(self) -> None:
        if monotonic() < self._look_at:
            return
        self._look_at = monotonic() + self._look_every_s
        self._silent_looks += 1
        if self._silent_looks >= SILENT_LOOKS:
            self._look_at = _NEVER
            self._send(abandoned=True)
            self._go_on_alone()

    def _read_worker(self) -> None:
        try:
            data = self._control.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._worker_is_gone()
            return
        self._silent_looks = 0
        for message in self._told.feed(data):
            if message["do"] == "interrupt":
                self._interrupt()
            elif message["do"] == "kill":
                self._killing = True
            elif message["do"] == "nudge":
                self._nudge_often(int(message["pid"]), at_once=True)
            elif message["do"] == "end_step":
                pid = int(message["pid"]) if message["pid"] is not None else None
                self._ending[str(message["name"])] = _EndingStep(pid, str(message["mark"]))

    def _worker_is_gone(self) -> None:
        self._selector.unregister(self._control)
        self._look_at = _NEVER
        self._go_on_alone()

    def _go_on_alone(self) -> None:
        """No child outlives its worker: interrupt, and kill after the grace."""
        self._interrupt()
        self._kill_at = min(self._kill_at or _NEVER, monotonic() + self._grace_s)

    def _interrupt(self) -> None:
        # Once, and the leader only: a second one, or one to the group, would abort users' `finally` blocks half way.
        if self._leader_lives and not self._interrupted:
            self._interrupted = True
            os.kill(self._leader, signal.SIGTERM)
            self._nudge_often(self._leader)

    def _nudge(self) -> None:
        # A signal that arrives between an interpreter's last look and the system call in which it then waits is noted
        # by the interpreter and acted upon when the call returns: perhaps in an hour. Any further signal ends the
        # wait, and then the handler of the first one runs. A second SIGTERM would do that, too, and abort `finally`.
        while self._nudges and monotonic() >= self._nudges[0][0]:
            _, pid = self._nudges.pop(0)
            if (pid == self._leader and self._leader_lives) or procfs.is_below(pid, os.getpid()):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, NUDGE)

    def _nudge_often(self, pid: int, *, at_once: bool = False) -> None:
        now = monotonic()
        self._nudges = sorted(self._nudges + [(now + delay, pid) for delay in ([0.0] if at_once else []) + [*NUDGES_S]])

    def _kill_steps(self) -> None:
        """Of steps that have timed out: what they have started, and their process, if it is one of their own."""
        for name, step in list(self._ending.items()):
            pid = step.pid if step.pid is not None and procfs.is_below(step.pid, os.getpid()) else None
            left = [one for one in procfs.processes() if self._is_of_step(one, pid, step.mark)]
            if pid is not None and procfs.is_alive(pid):
                if not left:
                    step.note(pid)
                # It starts nothing any more, and what is below it stays there until the last of that is gone.
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if not left else signal.SIGSTOP)
            elif not left:
                self._send(step_ended=name, killed=list(step.names.values())[:_NAMES_KEPT])
                del self._ending[name]
            for one in left:
                step.note(one)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(one, signal.SIGKILL)

    def _is_of_step(self, pid: int, process: int | None, mark: str) -> bool:
        if pid in (self._leader, process) or not procfs.is_alive(pid) or not procfs.is_below(pid, os.getpid()):
            return False
        below = process is not None and procfs.is_below(pid, process)
        return below or procfs.has_in_environment(pid, mark)

    def _reap(self) -> bool:
        """Take in whoever ended; whether nobody is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if (name := self._names.get(pid)) and os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                self._killed.append(f"{name}[{pid}]")
            if pid == self._leader:
                self._leader_lives = False
                self._send(exited=os.waitstatus_to_exitcode(status))
                # What a leader that ended by itself left behind may go on for a while; after an interrupt it may only
                # end, which some do when they see that their parent is gone.
                self._kill_at = monotonic() + (min(_MOMENT_S, self._linger_s) if self._interrupted else self._linger_s)

    def _kill_what_is_left(self) -> None:
        # The group in one go, so that it cannot spawn meanwhile; whoever left the group falls to us, its subreaper,
        # when its parent is dead, and is found on the next round. A pid of ours cannot be reused before we reap it.
        if self._leader_lives:
            if not self._names:
                self._names[self._leader] = "main process"
                for pid in procfs.members_of(self._leader):
                    self._note(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._leader, signal.SIGKILL)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self._leader, signal.SIGKILL)  # should it die before it led its group
        for pid in procfs.children():
            self._note(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _note(self, pid: int) -> None:
        """Its name, while it can be read. Whether it had to be killed, or has ended before, its exit status says."""
        if pid not in self._names:
            self._names[pid] = "" if procfs.ends_with_its_parent(pid) else procfs.program_of(pid)

    def _send(self, **message: Any) -> None:
        with suppress(OSError):  # the worker is gone; the duty stays
            self._control.send(line_of(message))


def load_target(target: str) -> Callable[..., Any]:
    """The function that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
