"""What the fork server's process does: import, warm up, then fork a shim and a child for each request.

Needs the standard library only, until it imports what it is told to preload.
"""

import array
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from dagster_taskiq.process.shim import (
    FDS,
    INTERRUPTS,
    MAX_REQUEST,
    MAX_SETUP,
    PR_SET_CHILD_SUBREAPER,
    live_and_leave,
    load_target,
    prctl,
    run_shim,
)


def serve_from_argv() -> None:
    """Entry of the fork server's process when it is executed: `argv[1]` is its socket."""
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(server: socket.socket) -> NoReturn:
    """Set up as the first message says, then fork a shim and a child per request, until the worker closes its end."""
    live_and_leave(_serve(server))  # only a child comes here


def _serve(server: socket.socket) -> Callable[[], int]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    setup = json.loads(server.recv(MAX_SETUP) or b"null")
    if setup is None:
        os._exit(0)
    try:
        for module in setup["preload"]:
            importlib.import_module(module)
        for target, arguments in setup["warm_up"].items():
            load_target(target)(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever an import raises, the worker is told and stops
        _tell(server, error=f"{type(error).__name__}: {error}"[:2000])
        os._exit(1)
    # What is there now is shared by all children: keep the collector from touching (and so copying) it.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, lambda *_: _reap_all())
    _tell(server, ready=os.getpid(), threads=len(os.listdir("/proc/self/task")))  # noqa: PTH208
    while True:
        request, fds = _receive(server)
        if not request:
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        if os.fork() == 0:
            server.close()
            return run_shim(json.loads(request), *(socket.socket(fileno=fd) for fd in fds))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        for fd in fds:
            os.close(fd)


def _tell(server: socket.socket, **message: Any) -> None:
    with suppress(OSError):  # a worker that is gone meanwhile; the next request would be the end of file
        server.send(json.dumps(message).encode())


def _reap_all() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _receive(server: socket.socket) -> tuple[bytes, list[int]]:
    """One request and its descriptors; empty at the end of file."""
    descriptors = array.array("i")
    try:
        data, ancillary, _, _ = server.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(FDS * descriptors.itemsize))
    except ConnectionResetError:
        return b"", []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return data, list(descriptors)
