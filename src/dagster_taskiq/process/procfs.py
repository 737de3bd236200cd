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


def is_alive(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def is_below(pid: int, ancestor: int) -> bool:
    """Whether the other one is its parent, or its parent's, and so on."""
    parent = parent_of(pid)
    while parent is not None and parent > 1:
        if parent == ancestor:
            return True
        parent = parent_of(parent)
    return False


def has_in_environment(pid: int, variable: str) -> bool:
    """Whether it was started with that `name=value` in its environment."""
    try:
        return variable.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def session_of(pid: int) -> int | None:
    """The session id, None when the process is gone or a zombie."""
    fields = _stat(pid)
    return int(fields[3]) if fields and fields[0] not in "ZX" else None


def members_of(session: int) -> list[int]:
    """The living processes of a session."""
    return [pid for pid in processes() if session_of(pid) == session]


def command_of(pid: int) -> str:
    """The process's name (`comm`)."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "?"


def arguments_of(pid: int) -> list[str]:
    """The process's command line; empty when it is gone, or a zombie."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return line.removesuffix("\0").split("\0") if line else []


def program_of(pid: int) -> str:
    """The process's name; of a Python interpreter also which script or module it runs.

    No other argument: there may be passwords among them.
    """
    name, arguments = command_of(pid), arguments_of(pid)[1:]
    if not name.startswith("python"):
        return name
    for number, argument in enumerate(arguments):
        if argument in ("-c", "-m"):
            return " ".join([name, *arguments[number : number + (1 if argument == "-c" else 2)]])
        if not argument.startswith("-"):
            return f"{name} {Path(argument).name}"
    return name


def ends_with_its_parent(pid: int) -> bool:
    """Whether it is a helper of the interpreter's, which tidies up when its parent is gone, and then ends."""
    return any("multiprocessing.resource_tracker" in argument for argument in arguments_of(pid))
