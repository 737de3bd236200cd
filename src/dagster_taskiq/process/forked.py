"""Fork the fork server from this process, and make of the fork what `python -c` would have started.

A fork has everything that this process has imported, which is the point, and everything else that it has: handlers,
files, buffers, its name. What is not the server's own is taken away here. Needs the standard library only.
"""

import atexit
import ctypes
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

_ARGUMENTS_BEGIN: Final = 48 - 3
"""Of `arg_start` in /proc/PID/stat (proc(5)), counted from the third field on; `arg_end` comes after it."""
_POLL_S: Final = 0.01
_SETS_ITS_OWN_LEVEL: Final = {"sqlalchemy"}
"""Loggers whose level is set when their library is imported."""


class Forked:
    """A child of this process by `os.fork`, with as much of the interface of `subprocess.Popen` as is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has reaped it
                self._code = -signal.SIGKILL
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float) -> int:
        """Wait for the end, for at most so many seconds. Raises `subprocess.TimeoutExpired`."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_S)
        return code

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def why_not() -> str | None:
    """Why this process cannot be forked safely; None: it can.

    A thread may hold a lock, which in the fork nobody releases; and a connection would have two users.
    """
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names only
    if threads > 1 or threading.current_thread() is not threading.main_thread():
        return f"this process has {threads} threads"
    if sockets := [fd for fd in _descriptors() if fd > 2 and _target(fd).startswith("socket:")]:
        return f"this process has {len(sockets)} open sockets"
    return None


def fork_into(main: Callable[[socket.socket], NoReturn], end: socket.socket, *, title: bytes) -> Forked:
    """Fork, and call `main` in the fork with its end of a socket pair. Raises `OSError`.

    `title`: the command by which a list of processes shows the fork.

    No descriptor but that end, stdout and stderr is left to it, and stdin is empty.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a stream that cannot be flushed here has nothing that would be written twice
            stream.flush()
    # What is there now is shared: keep the collector from touching (and so copying) it, here and there.
    gc.freeze()
    pid = os.fork()
    if pid:
        return Forked(pid)
    try:
        os.setsid()  # Ctrl-C in a terminal goes to the worker's group alone: it decides what becomes of its children
        _forget_signals()
        _forget_descriptors({1, 2, end.fileno()})
        _forget_exit_handlers()
        _forget_logging()
        _forget_program(title)
        gc.enable()
        main(end)
    except BaseException:  # noqa: BLE001 - printed as the interpreter would
        traceback.print_exc()
    finally:
        os._exit(1)  # nothing of the caller's runs here, whatever happens


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number is not signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def _forget_descriptors(kept: set[int]) -> None:
    """Have each of the others lead to /dev/null.

    Closing them would free their numbers, and what still has one of them, a file object say, would one day close
    whatever has that number then.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in _descriptors():
        if fd not in kept and fd != null and _target(fd):
            os.dup2(null, fd, inheritable=fd == 0)
    os.close(null)


def _forget_exit_handlers() -> None:
    """Children run their exit handlers, as an interpreter does; those of this program are not for them."""
    atexit._clear()  # noqa: SLF001 - as multiprocessing's children do, and for the same reason
    atexit.register(logging.shutdown)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # noqa: SLF001 - temporary folders, for one
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]  # noqa: SLF001
    if (util := sys.modules.get("multiprocessing.util")) is not None:
        util._finalizer_registry.clear()  # noqa: SLF001
        atexit.register(util._exit_function)  # noqa: SLF001


def _forget_logging() -> None:
    """As in an interpreter in which nobody has configured it: what ops log is theirs to configure."""
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            logger.handlers[:] = [handler for handler in logger.handlers if isinstance(handler, logging.NullHandler)]
            if name not in _SETS_ITS_OWN_LEVEL:
                logger.setLevel(logging.NOTSET)


def _forget_program(title: bytes) -> None:
    """No main module, which multiprocessing would import again; no arguments; the path of `python -c`; another name."""
    script = sys.argv[0] if sys.argv else ""
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv[:] = ["-c"]
    if not sys.flags.safe_path:
        if sys.path and script and sys.path[0] == str(Path(script).resolve().parent):
            del sys.path[0]
        if "" not in sys.path:
            sys.path.insert(0, "")
    with suppress(OSError, ValueError):
        _set_title(title)


def _set_title(title: bytes) -> None:
    """Write over this process's arguments, so that whoever looks for the worker by its command finds only that."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    begin, end = map(int, fields[_ARGUMENTS_BEGIN : _ARGUMENTS_BEGIN + 2])
    if 0 < begin < end < begin + (1 << 21):
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, title, min(len(title), end - begin - 1))


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 - names only


def _target(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:  # the one with which the folder was read
        return ""
