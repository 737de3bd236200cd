"""A warm interpreter that forks our command line on request, so that a test's worker need not import for seconds.

Started once for each pytest process. Single-threaded, opens no connection and no event loop of its own. A child is
what `dagster-taskiq …` would be: a session of its own, the environment, the pipes and the arguments that it was given,
default signal handlers, and the interpreter's own end. When pytest is gone, so are the children.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

MODULES = (
    "dagster_taskiq.cli",
    "dagster_taskiq.cli.configured",
    "dagster_taskiq.cli.logs",
    "dagster_taskiq.cli.explain",
    "dagster_taskiq.executor",
    "dagster_taskiq.launcher",
    "dagster_taskiq.runs",
    "dagster_taskiq.child.main",
    "dagster_taskiq.worker.service",
    "dagster._core.storage.runs.sqlite.sqlite_run_storage",
    "dagster._core.storage.event_log.sqlite.sqlite_event_log",
    "dagster._core.storage.schedules.sqlite.sqlite_schedule_storage",
    "dagster._core.storage.local_compute_log_manager",
    "rich.console",
    "rich.table",
)
"""What workers and short commands import anyway; nothing of it reads the environment of a test."""
LARGEST_REQUEST = 1 << 18
FDS = 3


def serve(server: socket.socket) -> list[str]:
    """Fork a child per request until pytest closes its end. Returns only in a child, with its arguments."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's, which then closes its end
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    reporting: dict[int, int] = {}
    """Child to the pipe on which its exit code is awaited."""
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    server.send(json.dumps({"threads": threads}).encode())
    while True:
        ready, _, _ = select.select([server.fileno(), wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(reporting)
        if server.fileno() in ready:
            try:
                data, fds, _, _ = socket.recv_fds(server, LARGEST_REQUEST, FDS)
            except ConnectionResetError:  # its client has ended and never used it
                data = b""
            if not data:
                _end(reporting)
            request = json.loads(data)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for fd in (server.detach(), wake_read, wake_write, *reporting.values()):
                    os.close(fd)
                return _become(request, fds)
            out, error, status = fds
            os.close(out)
            os.close(error)
            reporting[pid] = status
            server.send(json.dumps({"pid": pid}).encode())


def _become(request: dict[str, Any], fds: list[int]) -> list[str]:
    """As if executed: nothing of the server's is left but its modules."""
    out, error, status = fds
    os.close(status)
    os.setsid()
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(out, 1)
    os.dup2(error, 2)
    os.close(out)
    os.close(error)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["directory"])
    time.tzset()
    tempfile.tempdir = None
    arguments: list[str] = request["arguments"]
    return arguments


def _reap(reporting: dict[int, int]) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            pipe = reporting.pop(pid)
            with suppress(BrokenPipeError):  # nobody asks any more
                os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(pipe)


def _end(reporting: dict[int, int]) -> None:
    for pid in reporting:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def warm_up() -> None:
    """Once what every worker does anyway: a new instance, a run's event log, an SQS client. All is closed again."""
    from dagster import DagsterInstance

    from dagster_taskiq.dagster_compat.storage import read_migration_scripts_once
    from dagster_taskiq.sqs.client import warm_up as make_a_client

    read_migration_scripts_once()
    with tempfile.TemporaryDirectory() as home, DagsterInstance.local_temp(home) as instance:
        instance.all_logs("warm-up")
    make_a_client()


def main() -> None:
    server = socket.socket(fileno=int(sys.argv[1]))
    server.set_inheritable(False)
    for module in MODULES:
        importlib.import_module(module)
    warm_up()
    gc.collect()
    gc.freeze()  # or else the first collection of every child copies all of this
    arguments = serve(server)
    # Only a child comes here.
    sys.argv = ["dagster-taskiq", *arguments]
    from dagster_taskiq.cli import main as command

    command(prog_name="dagster-taskiq")


if __name__ == "__main__":
    main()
