"""The one writer of a process tree's stdout and stderr, which makes of every line one JSON object.

Whatever has inherited the two descriptors is covered: children and what they start, libraries in C, the interpreter's
last words. The collector is a process of its own and ends with the last of them, after the worker: without a reader a
`finally` that prints would fail. It handles no signal, runs no code of users, and goes on reading when nobody reads
what it writes. Needs the standard library only.
"""

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic, time
from typing import Any, Final, NoReturn

from dagster_taskiq.process.forked import Forked, fork_into

_TITLE: Final = b"dagster-taskiq output collector"
_CHUNK: Final = 1 << 16
_LONGEST_BEGINNING: Final = 3 * _CHUNK
"""A longer line is cut; so none has more than 256 KiB, which is what CloudWatch takes in one event."""
_FLUSH_AFTER_S: Final = 1.0
"""The beginning of a line, whose end does not come, is written after so long a silence."""
_LAST_LINES_WITHIN_S: Final = 5.0
_PAUSE_S: Final = 1.0
"""Between two tries to replace a collector: none may work, or each end at once."""
_LOG_LINE: Final = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4} - (\S+) - ([A-Z]+) - (.*)")
_RUN_ID: Final = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_TRACEBACK: Final = "Traceback (most recent call last):"


def timestamp(at: float) -> str:
    """Seconds since the epoch in ISO 8601, with milliseconds and the offset of the local time zone."""
    return datetime.fromtimestamp(at, UTC).astimezone().isoformat(timespec="milliseconds")


class OutputCollector:
    """The collector as seen from the process that has started it."""

    def __init__(self) -> None:
        """Fork it, and have it collect what is written to the descriptors 1 and 2 from now on. Raises `OSError`.

        Takes over SIGCHLD and SIGALRM: a collector that was killed is replaced.
        """
        pipes = [os.pipe() for _ in range(3)]
        # Kept open: without a reader, even for an instant, who prints would fail.
        self._reads = [read for read, _ in pipes]
        self._real = {fd: os.dup(fd) for fd in (1, 2)}
        self._next_at = 0.0
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._process: Forked | subprocess.Popen[bytes] = fork_into(_collect, theirs, title=_TITLE)
            socket.send_fds(ours, [b"\0"], self._reads)
        self.log_fd: Final = pipes[0][1]
        """For lines of this process that are JSON objects; no other process has it."""
        for fd, (_, write) in zip((1, 2), pipes[1:], strict=True):
            os.dup2(write, fd)
            os.close(write)
        for number in (signal.SIGCHLD, signal.SIGALRM):
            signal.signal(number, self._replace)

    def _replace(self, *_: object) -> None:
        if self._process.poll() is None:
            return
        left_s = self._next_at - monotonic()
        signal.setitimer(signal.ITIMER_REAL, left_s if left_s > 0 else _PAUSE_S)  # then it is looked at again
        if left_s > 0:
            return
        self._next_at = monotonic() + _PAUSE_S
        # Executed: this process has threads by now.
        program = f"from {__name__} import collect_from_argv; collect_from_argv()"
        with suppress(OSError):  # no memory, say; raised from here, it would hit whatever this process is doing
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, "-c", program, *map(str, self._reads)],
                stdin=subprocess.DEVNULL,
                stdout=self._real[1],
                stderr=self._real[2],
                pass_fds=self._reads,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Give this process its own stdout and stderr back, and wait until the last lines of all others are written."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        for fd, real in ((1, 1), (2, 2), (self.log_fd, 2)):
            os.dup2(self._real[real], fd, inheritable=fd != self.log_fd)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_LINES_WITHIN_S)


def collect_from_argv() -> NoReturn:
    """Entry of a collector that is executed: its arguments are the descriptors to read from."""
    _serve([int(fd) for fd in sys.argv[1:]])


def _collect(end: socket.socket) -> NoReturn:
    _, fds, _, _ = socket.recv_fds(end, 1, 3)
    end.close()
    _serve(fds)


def _serve(fds: list[int]) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with selectors.DefaultSelector() as selector:
        for fd, source in zip(fds, (_Source("", 2), _Source("stdout", 1), _Source("stderr", 2)), strict=True):
            selector.register(fd, selectors.EVENT_READ, source)
        while sources := selector.get_map():
            held = any(key.data.begun for key in sources.values())
            ready = selector.select(_FLUSH_AFTER_S if held else None)
            for key, _ in ready:
                data = os.read(key.fd, _CHUNK)
                key.data.feed(data)
                if not data:
                    selector.unregister(key.fd)
            for key in sources.values() if not ready else ():
                key.data.feed(b"")
    os._exit(0)


class _Source:
    """What comes from one pipe. `name` is its logger for lines that have none; `to`: the descriptor to write to."""

    def __init__(self, name: str, to: int) -> None:
        self._name = name
        self._to = to
        self.begun = b""
        """The line whose end has not come yet."""

    def feed(self, data: bytes) -> None:
        """Write all lines that are complete; without data, also the one that is not."""
        *lines, self.begun = (self.begun + data).split(b"\n")
        if not data or len(self.begun) >= _LONGEST_BEGINNING:
            lines.append(self.begun)
            self.begun = b""
        written = b"".join(json_lines(lines, self._name, time()))
        with suppress(OSError):  # nobody reads it; those who write to us are not to suffer from that
            while written:
                written = written[os.write(self._to, written) :]


def json_lines(lines: list[bytes], name: str, at: float) -> list[bytes]:
    """Each line that is a JSON object unchanged; of the others, which were written together, one or several objects.

    Together are a traceback, a line "time - logger - LEVEL - text" with all that follows, and lines that are indented.
    """
    written: list[bytes] = []
    block: list[str] = []

    def end_block() -> None:
        if any(line.strip() for line in block):
            written.append(json.dumps(_described(block, name, at)).encode() + b"\n")
        block.clear()

    for line in lines:
        if _is_object(line):
            end_block()
            written.append(line + b"\n")
            continue
        text = line.decode(errors="replace").rstrip("\r")
        if not _belongs(text, block):
            end_block()
        block.append(text)
    end_block()
    return written


def _is_object(line: bytes) -> bool:
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _belongs(line: str, block: list[str]) -> bool:
    if not block or _LOG_LINE.match(line):
        return False
    if block[0] == _TRACEBACK and block[-1][:1].isspace():
        return True  # a frame, or the error itself
    return line[:1].isspace() or _LOG_LINE.match(block[0]) is not None


def _described(block: list[str], name: str, at: float) -> dict[str, Any]:
    text = "\n".join(block).rstrip()
    found = {"time": timestamp(at), "level": "INFO" if name == "stdout" else "WARNING", "logger": name}
    if event := _LOG_LINE.match(block[0]):
        found["logger"], found["level"], text = event[1], event[2], text[event.start(3) :]
        if run_id := _RUN_ID.search(event[3]):
            found["run_id"] = run_id[0]
    elif block[0] == _TRACEBACK:
        found["level"] = "ERROR"
    return {**found, "message": text}
