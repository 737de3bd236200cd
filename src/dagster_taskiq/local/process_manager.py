"""Processes that start, run and end together. Knows processes, signals and ports; not what the processes are for."""

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Final

from dagster_taskiq.errors import DagsterTaskiqError

LOOPBACK: Final = "127.0.0.1"
_TICK_S: Final = 0.05


class StartFailed(DagsterTaskiqError):
    """A process of the local environment did not start, or ended too early."""


class StopRequested(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived."""


class StopRequest:
    """Whether a signal to stop has arrived, and how many."""

    def __init__(self) -> None:
        # A plain number: a signal handler that takes a lock (Event, Condition) could wait for its own thread.
        self.times = 0

    def wait(self, seconds: float) -> None:
        """Sleep. Raises `StopRequested` as soon as a signal has arrived."""
        end = time.monotonic() + seconds
        while not self.times:
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _TICK_S))
        raise StopRequested


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a `StopRequest`, as long as the block lasts."""
    request = StopRequest()

    def record(*_: object) -> None:
        request.times += 1

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class ManagedProcess:
    """One process of the manager, in a session of its own, so that a Ctrl-C in the terminal reaches only its parent."""

    name: str
    process: subprocess.Popen[str]
    stop_signal: signal.Signals
    patience_s: float
    reader: threading.Thread
    last_lines: list[str] = field(default_factory=list)

    @property
    def end(self) -> str:
        """How the process ended, in words."""
        code = self.process.returncode
        return f"exit code {code}" if code is None or code >= 0 else f"killed by {signal.Signals(-code).name}"


class ProcessManager:
    """Processes that start one after the other, run together, and end together, the last one started first."""

    def __init__(self, request: StopRequest, print_line: Callable[[str, str], None]) -> None:
        self._request = request
        self._print_line = print_line
        self._managed: list[ManagedProcess] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        stop_signal: signal.Signals = signal.SIGTERM,
        patience_s: float = 5,
        quiet: bool = False,
    ) -> ManagedProcess:
        """Start a process. Its lines are printed (unless `quiet`), and the last ones are kept."""
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own arguments
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: list[str] = []
        reader = threading.Thread(
            target=self._read_output,
            args=(name, process.stdout, lines),
            kwargs={"quiet": quiet},
            name=f"output of {name}",
        )
        reader.daemon = True
        managed = ManagedProcess(name, process, stop_signal, patience_s, reader, lines)
        self._managed.append(managed)
        reader.start()
        return managed

    def _read_output(self, name: str, output: IO[str] | None, lines: list[str], *, quiet: bool) -> None:
        for line in output or ():
            lines.append(line.rstrip())
            del lines[:-20]
            if not quiet:
                self._print_line(name, line.rstrip())

    def check(self) -> None:
        """Raises `StartFailed` when one of the processes has ended."""
        for managed in self._managed:
            if managed.process.poll() is not None:
                managed.reader.join(1)
                last = next((line for line in reversed(managed.last_lines) if line.strip()), "it printed nothing")
                raise StartFailed(f"the {managed.name} process ended ({managed.end}): {last.strip()}")

    def wait_until(self, reached: Callable[[], bool], *, within_s: float, what: str) -> None:
        """Wait until the processes have reached something. Raises `StartFailed`, or `StopRequested`."""
        end = time.monotonic() + within_s
        while not reached():
            self.check()
            if time.monotonic() > end:
                raise StartFailed(f"no sign of {what} within {within_s:g} s")
            self._request.wait(_TICK_S)

    def stay(self) -> None:
        """Wait for the signal to stop. Raises `StopRequested`, or `StartFailed` when a process ends before."""
        while True:
            self.check()
            self._request.wait(0.2)

    def stop(self) -> None:
        """End all: each gets its signal and its time, then it is killed with its group. A second signal skips that."""
        asked_before = self._request.times
        for managed in reversed(self._managed):
            if managed.process.poll() is None:
                managed.process.send_signal(managed.stop_signal)
            end = time.monotonic() + managed.patience_s
            while managed.process.poll() is None and time.monotonic() < end:
                if self._request.times > max(1, asked_before):
                    break
                time.sleep(_TICK_S)
            with suppress(ProcessLookupError):  # its group may be gone, or have processes that it left behind
                os.killpg(managed.process.pid, signal.SIGKILL)
            managed.process.wait()
            managed.reader.join(1)
        self._managed.clear()


def free_port() -> int:
    """A free TCP port on loopback."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def answers(port: int, path: str) -> bool:
    """Whether an HTTP server on loopback answers with success."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < http.HTTPStatus.BAD_REQUEST
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
