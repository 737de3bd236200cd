"""What Linux shows of processes in /proc. A leaf; the standard library only, because the shims use it."""

import os
from pathlib import Path


def children() -> list[int]:
    """The direct children of this process, zombies included."""
    try:
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return [pid for pid in processes() if parent_of(pid) == os.getpid()]
    return [int(pid) for pid in listed.split()]


def processes() -> list[int]:
    """The pids of all processes that this one may see."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names only, and fast


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (proc(5)); empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def parent_of(pid: int) -> int | None:
    """The parent's pid, None when the process is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def session_of(pid: int) -> int | None:
    """The session id, None when the process is gone or a zombie."""
    fields = _stat(pid)
    return int(fields[3]) if fields and fields[0] not in "ZX" else None


def command_of(pid: int) -> str:
    """The process's name (`comm`)."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "?"
