"""The child's end of its channel to the worker: what it says, what it was told, and a thread that listens.

Knows sockets and threads; neither Dagster nor what the work is. A process that the child starts, and that is a worker
process of Dagster's in its turn, can join: it hears what the child hears (`Ear.admit`, `join`).
"""

import json
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from dagster_taskiq.cancellation import CancelKind
from dagster_taskiq.token import Cause, Signal

ADDRESS_VARIABLE: Final = "DAGSTER_TASKIQ_INTENTS"
"""In the environment of what a child starts: where the child's intents can be heard."""

_WORKER_GONE: Final = Cause(CancelKind.SHUTDOWN, "the worker is gone")
_MAX_LINE: Final = 65_536
_GUESTS_PATIENCE_S: Final = 0.5


class Voice:
    """Says lines, and hears whether there is an intent. Never blocks for long."""

    def __init__(self, channel: socket.socket, signal: Signal | None = None) -> None:
        self.channel = channel
        self.signal = signal or Signal()
        self.is_guest = False
        """Whether the intents come by way of another process, and so perhaps a moment after the interrupt."""
        self.intents: list[dict[str, Any]] = []
        """All that was told, in order."""
        self._heard = b""
        self._closed = False
        # A signal handler may come here in the middle of it: then what it does in between is all there is to do.
        self._lock = threading.RLock()
        self._saying = threading.Lock()

    def say(self, **message: Any) -> None:
        """Tell the worker one line."""
        # The ear says lines, too, and half a line in the middle of another one would make both unreadable.
        with self._saying, suppress(OSError):  # no worker listens any more
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def told_to_stop(self) -> bool:
        """Whether an intent has come, or the worker is gone. A shutdown of the worker is no reason to stop for good."""
        return self.told_to_cancel() or self._closed

    def told_to_cancel(self) -> bool:
        """Whether the intent to cancel the work has come."""
        self.listen()
        cause = self.signal.cause
        return cause is not None and cause.kind is not CancelKind.SHUTDOWN

    def why(self) -> tuple[str | None, str | None]:
        """Reason and author of the cancellation."""
        cause = self.signal.cause
        return (cause.reason, cause.requested_by) if cause is not None else (None, None)

    def worker_is_gone(self) -> bool:
        """Whether nobody will ever listen again."""
        self.listen()
        return self._closed

    def listen(self) -> None:
        """Take in what has been told so far, without waiting."""
        with self._lock:
            while not self._closed:
                try:
                    data = self.channel.recv(4096, socket.MSG_DONTWAIT)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError:
                    data = b""
                self._closed = not data
                *lines, self._heard = (self._heard + data).split(b"\n")
                self._heard = self._heard[:_MAX_LINE]
                for line in lines:
                    self._take_in(line)
            if self._closed:
                self.signal.note(_WORKER_GONE)

    def wait_for_intent(self) -> None:
        """For a guest, and for a moment: whoever passed the interrupt on was told why before."""
        until = time.monotonic() + _GUESTS_PATIENCE_S
        self.listen()
        while self.is_guest and self.signal.cause is None and time.monotonic() < until:
            select.select([self.channel], [], [], _GUESTS_PATIENCE_S / 50)  # its own thread may be the one that hears
            self.listen()

    def _take_in(self, line: bytes) -> None:
        with suppress(ValueError, KeyError, TypeError):
            intent = json.loads(line)
            cause = Cause(CancelKind[intent["intent"]], intent.get("reason"), intent.get("by"), intent.get("deadline"))
            self.intents.append(intent)
            self.signal.note(cause)


class Ear:
    """A thread that waits for intents, so that the work can be told while it is blocked; daemonic, one per process."""

    def __init__(self, voice: Voice, relay: Callable[[dict[str, Any]], None] | None = None) -> None:
        """`relay`: what to do with a line that a process says that has joined."""
        self._voice = voice
        self._relay = relay
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._door: socket.socket | None = None
        self._guests: list[socket.socket] = []
        self._told = 0
        self._selector.register(voice.channel, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="dagster-taskiq ear", daemon=True).start()

    def wake(self) -> None:
        """Something was noted elsewhere, in a signal handler perhaps: announce it."""
        with suppress(OSError):
            os.write(self._wake_write, b"x")

    def admit(self) -> str:
        """Let other processes of this host join; returns the address, for `ADDRESS_VARIABLE`."""
        address = f"dagster-taskiq-{os.getpid()}-{os.urandom(8).hex()}"
        # An abstract address: nothing in a file system that somebody would have to clear away.
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        door.bind(f"\0{address}")
        door.listen(64)
        door.setblocking(False)
        self._door = door
        self._selector.register(door, selectors.EVENT_READ)
        self.wake()
        return address

    def _run(self) -> None:
        announced = False
        while True:
            for key, _ in self._selector.select():
                self._look_at(key.fileobj)
            self._voice.listen()
            self._tell_guests()
            if self._voice.signal.cancelled and not announced:
                announced = True
                self._voice.signal.announce()
            if self._voice.worker_is_gone():
                with suppress(KeyError, ValueError):
                    self._selector.unregister(self._voice.channel)

    def _look_at(self, what: Any) -> None:
        if what == self._wake_read:
            with suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        elif what is self._door and self._door is not None:
            with suppress(OSError):
                guest, _ = self._door.accept()
                self._guests.append(guest)
                self._selector.register(guest, selectors.EVENT_READ)
                self._say_to(guest, self._voice.intents)
        elif what in self._guests:
            self._hear(what)

    def _hear(self, guest: socket.socket) -> None:
        try:
            data = guest.recv(_MAX_LINE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(guest)
            self._guests.remove(guest)
            guest.close()
            return
        for line in data.split(b"\n"):
            with suppress(ValueError):
                message = json.loads(line)
                if self._relay is not None and isinstance(message, dict):
                    self._relay(message)

    def _tell_guests(self) -> None:
        new, self._told = self._voice.intents[self._told :], len(self._voice.intents)
        for guest in self._guests:
            self._say_to(guest, new)

    @staticmethod
    def _say_to(guest: socket.socket, intents: list[dict[str, Any]]) -> None:
        with suppress(OSError):
            guest.sendall(b"".join(json.dumps(intent).encode() + b"\n" for intent in intents))


def join(address: str) -> Voice | None:
    """Connect to the child above this process; None when it is gone."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(f"\0{address}")
    except OSError:
        channel.close()
        return None
    voice = Voice(channel)
    voice.is_guest = True
    return voice
