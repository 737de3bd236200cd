"""Processes of our command line, forked from a warm interpreter where there is one (see `warm_server`)."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from tests.support import warm_server

START_WITHIN_S = 120
CLI = (sys.executable, "-m", "dagster_taskiq.cli")


class Process(Protocol):
    """What tests use of a `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


class WarmProcess:
    """A process that somebody else forked and reaps. `status` is a pipe that has its exit code after its end."""

    def __init__(self, pid: int, arguments: Sequence[str], status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._arguments = arguments
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, None while it runs; negative for the signal that killed it."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, at its end. Raises `subprocess.TimeoutExpired`."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self._arguments), timeout or 0)
        return code

    def send_signal(self, number: int, /) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended this instant
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _look(self, within: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], within)[0]:
                told = os.read(self._status, 16)
                os.close(self._status)
                # Without a word: the server was killed, and what it forked cannot be waited for.
                self.returncode = int(told) if told else -signal.SIGKILL
            return self.returncode


class Warm:
    """The client of one server. Used by any thread."""

    def __init__(self) -> None:
        """Start it, without waiting until it is warm."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(START_WITHIN_S)
        self._lock = threading.Lock()
        self._is_warm = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", warm_server.__name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # so that it buffers as into a pipe
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(
        self, arguments: Sequence[str], environ: Mapping[str, str], out: int, error: int | None = None
    ) -> WarmProcess:
        """Start `dagster-taskiq …` with these arguments. `out` and `error` (default: the same) stay the caller's."""
        request = {"arguments": list(arguments), "environ": dict(environ), "directory": os.getcwd()}  # noqa: PTH109
        status, status_end = os.pipe()
        try:
            with self._lock:
                self._wait_until_warm()
                fds = [out, out if error is None else error, status_end]
                socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
                pid = json.loads(self._socket.recv(64))["pid"]
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(status_end)
        return WarmProcess(pid, arguments, status)

    def _wait_until_warm(self) -> None:
        if not self._is_warm:
            said = json.loads(self._socket.recv(64) or b"{}")
            assert said == {"threads": 1}, f"it must be there, with no thread beside: {said}"
            self._is_warm = True

    def stop(self) -> None:
        """End the server, and whatever it forked that still lives."""
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # it still imports
            self._process.kill()
            self._process.wait(10)


_servers: list[Warm] = []


@contextmanager
def warm_processes() -> Iterator[Warm]:
    """As long as this lasts, `start_command` forks."""
    server = Warm()
    _servers.append(server)
    try:
        yield server
    finally:
        _servers.remove(server)
        server.stop()


def start_command(
    arguments: Sequence[str], environ: Mapping[str, str], stdout: int, stderr: int | None = None
) -> Process:
    """Start `dagster-taskiq …` in a session of its own; forked, if something is warm. `stderr`: default `stdout`."""
    if _servers:
        return _servers[-1].start(arguments, environ, stdout, stderr)
    return start_program([*CLI, *arguments], environ, stdout, stderr)


def start_program(
    program: Sequence[str], environ: Mapping[str, str], stdout: int, stderr: int | None = None
) -> "subprocess.Popen[bytes]":
    """Start any program in a session of its own."""
    return subprocess.Popen(
        program,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stdout if stderr is None else stderr,
        start_new_session=True,
    )


class Lines:
    """The lines that a process writes, collected by a thread."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        reader, self.writer = os.pipe()
        self._pump = threading.Thread(target=self._collect, args=(reader,), name="collect lines", daemon=True)
        self._pump.start()

    def _collect(self, reader: int) -> None:
        with os.fdopen(reader, encoding="utf-8", errors="replace") as lines:
            self.lines.extend(lines)

    def close_writer(self) -> None:
        """Leave the pipe to the process, so that its end is the end of the lines."""
        os.close(self.writer)

    def join(self) -> None:
        """Wait until all of them are there; not for long, because what a killed process left may have the pipe."""
        self._pump.join(5)
