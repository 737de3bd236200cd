"""A thread that waits for intents, and passes them on to processes that have joined. Knows sockets and threads."""

import os
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from dagster_taskiq.child.control_channel import ControlChannel
from dagster_taskiq.process.json_lines import Splitter, line_of

_CHUNK: Final = 1 << 16


class ControlListener:
    """A daemonic thread that waits for intents, so that the work learns of one while it is blocked; one per process."""

    def __init__(
        self, control: ControlChannel, relay: Callable[[object, dict[str, Any] | None], None] | None = None
    ) -> None:
        """`relay`: what to do with a message from a process that has joined, and with None when that is gone."""
        self._control = control
        self._relay = relay
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._door: socket.socket | None = None
        self._guests: dict[socket.socket, Splitter] = {}
        self._sent = 0
        self._selector.register(control.channel, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="dagster-taskiq control listener", daemon=True).start()

    def wake(self) -> None:
        """A cancellation was recorded elsewhere, in a signal handler perhaps: notify those who wait for it."""
        with suppress(OSError):
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        """In a fork of the process, which has no such thread: leave all that it listens to to the process itself."""
        for left in (self._door, *self._guests):
            if left is not None:
                left.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

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
        while True:
            for key, _ in self._selector.select():
                self._look_at(key.fileobj)
            self._control.listen()
            self._notify_guests()
            for signal in (self._control.signal, *list(self._control.parts.values())):
                if signal.is_set and not signal.is_notified:
                    signal.notify()
            if self._control.worker_is_gone():
                with suppress(KeyError, ValueError):
                    self._selector.unregister(self._control.channel)

    def _look_at(self, what: Any) -> None:
        if what == self._wake_read:
            with suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        elif what is self._door and self._door is not None:
            with suppress(OSError):
                guest, _ = self._door.accept()
                self._guests[guest] = Splitter()
                self._selector.register(guest, selectors.EVENT_READ)
                self._send_to(guest, self._control.intents)
        elif what in self._guests:
            self._receive_from(what)

    def _receive_from(self, guest: socket.socket) -> None:
        try:
            data = guest.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(guest)
            del self._guests[guest]
            guest.close()
            if self._relay is not None:
                self._relay(guest, None)
            return
        for message in self._guests[guest].feed(data):
            if self._relay is not None and isinstance(message, dict):
                self._relay(guest, message)

    def _notify_guests(self) -> None:
        new, self._sent = self._control.intents[self._sent :], len(self._control.intents)
        for guest in self._guests:
            self._send_to(guest, new)

    @staticmethod
    def _send_to(guest: socket.socket, intents: list[dict[str, Any]]) -> None:
        with suppress(OSError):
            guest.sendall(b"".join(map(line_of, intents)))
