"""Freezing a process as a debugger or a paused container does, and letting it go on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.waiting import wait_until


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process `pid` is stopped in here, at a moment in which it holds no lock of a SQLite database.

    Whoever stops in the middle of a write, or of the clean-up with which SQLite closes a database, keeps its locks:
    then everybody else gets "database is locked" or "locking protocol" until it goes on. That is SQLite's (PostgreSQL's
    readers wait for nobody), and not what a test of a worker that hangs is about.
    """

    def freeze() -> bool:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: _state(pid) in "TZX", f"{pid} is stopped", within=10, seen=lambda: _state(pid))
        if not _holds_a_lock(pid):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    try:
        wait_until(freeze, f"{pid} holds no lock of a file", within=30)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _holds_a_lock(pid: int) -> bool:
    """Whether it has locked a part of a file against others.

    The columns are in proc(5): number, type, mode, access, process, file, start and end.
    """
    locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return any(lock[1:5] == ["POSIX", "ADVISORY", "WRITE", str(pid)] for lock in locks)
