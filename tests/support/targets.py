"""What children do in tests of the process layer. Each is called as a child's target: argument, channel."""

import functools
import gc
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

INTERRUPTS = {signal.SIGTERM, signal.SIGINT}


def say(channel: socket.socket, **message: Any) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def ends(argument: dict[str, Any], channel: socket.socket) -> int:
    say(channel, stdin=os.read(0, 1).decode(), session=os.getsid(0), pid=os.getpid())
    return int(argument.get("code", 0))


def leaves_one_behind(argument: dict[str, Any], channel: socket.socket) -> int:
    """Ends by itself; what it has started goes on."""
    left = subprocess.Popen(["sleep", "600"])
    say(channel, left=left.pid, shim=os.getppid())
    return 0


def polite(argument: dict[str, Any], channel: socket.socket) -> int:
    def handle(*_: object) -> None:
        say(channel, interrupted=True, heard=channel.recv(4096, socket.MSG_DONTWAIT).decode())
        sys.exit(0)

    signal.signal(signal.SIGTERM, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    say(channel, up=True)
    time.sleep(300)
    return 1


def falls_asleep(argument: dict[str, Any], channel: socket.socket) -> int:
    """Is told to stop after the interpreter's last look and before the system call in which it sleeps.

    That moment lasts a microsecond or so. Here it is made long: what computes the length of the sleep is C code.
    """

    class Slowly:
        __index__ = functools.partial(sum, itertools.repeat(0, 30_000_000), 300)

    def handle(*_: object) -> None:
        say(channel, interrupted=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    say(channel, up=True)
    time.sleep(Slowly())
    return 1


def stubborn(argument: dict[str, Any], channel: socket.socket) -> int:
    """Ignores the signal, and hides processes in every way there is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    apart = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            time.sleep(300)
        os._exit(0)
    os.wait()
    daemon = int(os.read(read, 20))
    say(channel, pids=[plain.pid, apart.pid, daemon])
    while True:
        time.sleep(1)


def finishes_but_stays(argument: dict[str, Any], channel: socket.socket) -> int:
    """Its work is over, perhaps after an interrupt, but a thread of its own keeps the process."""
    import threading

    from dagster_taskiq.child.stays import tell_what_stays

    if argument.get("waits"):
        interrupted = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: interrupted.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        say(channel, up=True)
        while not interrupted.wait(0.05):
            pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    threading.Thread(target=time.sleep, args=(argument["seconds"],), name="upload-1").start()
    say(channel, finished=True)
    tell_what_stays(functools.partial(say, channel))
    return 0


def slow_to_set_up(argument: dict[str, Any], channel: socket.socket) -> int:
    """Stands its handlers late; signals are blocked until then."""
    time.sleep(0.3)
    return polite(argument, channel)


def storms(argument: dict[str, Any], channel: socket.socket) -> int:
    """Forks faster than one can look."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    say(channel, up=True)
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if os.fork() == 0:
            os.setsid()
            time.sleep(300)
            os._exit(0)
        time.sleep(0.002)
    return 0


def looks_around(argument: dict[str, Any], channel: socket.socket) -> int:
    """Says what it and its shim have, and ends as interpreters do."""
    files = {int(fd.name): str(fd.readlink()) for fd in Path(f"/proc/{os.getppid()}/fd").iterdir()}
    say(
        channel,
        own_files=sorted(
            name for fd, name in files.items() if fd > 2 and name != os.devnull and not name.startswith("pipe:")
        ),
        stdin=str(Path("/proc/self/fd/0").readlink()),
        session=os.getsid(os.getppid()),
        main=getattr(sys.modules["__main__"], "__file__", None),
        arguments=sys.argv,
        path=sys.path[0],
        handlers=len(logging.root.handlers),
        levels=[logging.root.level, logging.getLogger("tests").level],
        sigterm=signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        collects=gc.isenabled(),
        threads=len([*Path("/proc/self/task").iterdir()]),
    )
    return 0


def start_a_thread(argument: Any) -> None:
    import threading

    threading.Thread(target=time.sleep, args=(300,), daemon=True).start()


def has_helpers(argument: dict[str, Any], channel: socket.socket) -> int:
    """Has multiprocessing's resource tracker, which ends when its parent has ended; and a script that does not."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    script = Path(argument["folder"], "goes_on.py")
    script.write_text("import time; time.sleep(300)")
    process = subprocess.Popen(
        [sys.executable, str(script), "--password", "secret"], start_new_session=argument["leaves"]
    )
    tracker: Any = resource_tracker._resource_tracker
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if argument["obeys"] else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    say(channel, up=[tracker._pid, process.pid])
    while True:
        time.sleep(300)
