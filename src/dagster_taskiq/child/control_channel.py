"""The child's end of its channel to the worker: messages to the worker, intents from it.

Knows sockets; neither Dagster nor what the work is. A process that the child starts, and that is a worker process of
Dagster's in its turn, can join (`ControlListener.admit`, `join`): it receives the intents that the child receives.
"""

import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Final

from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal, PartSignal
from dagster_taskiq.process.json_lines import Splitter, line_of

ADDRESS_VARIABLE: Final = "DAGSTER_TASKIQ_INTENTS"
"""In the environment of what a child starts: where the child's intents can be received."""
_WORKER_GONE: Final = Cancellation(CancelKind.SHUTDOWN, cause="the worker is gone")
_GUESTS_PATIENCE_S: Final = 0.5


class ControlChannel:
    """Sends messages, and receives intents into `signal`. Never blocks for long."""

    def __init__(self, channel: socket.socket, *, is_guest: bool = False) -> None:
        """`is_guest`: the intents come by way of another process, and so perhaps a moment after the interrupt."""
        self.channel = channel
        self.signal = CancelSignal(on_shield=lambda name: self.send(shield=name))
        self._is_guest = is_guest
        self.parts: dict[str, PartSignal] = {}
        """The signals of what can be cancelled alone: the step at work, by the name of its limit."""
        self.late: dict[int, tuple[str, str]] = {}
        """By pid, limits of steps that have timed out, with what is said of it; also of processes below this one."""
        self.cleaned: set[str] = set()
        """Limits of steps that have timed out, and whose cleanup handlers have run."""
        self.intents: list[dict[str, Any]] = []
        """All that was received, in order."""
        self._lines = Splitter()
        self._closed = False
        self._is_open = True
        # A signal handler may come here in the middle of it: then what it does in between is all there is to do.
        self._lock = threading.RLock()
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send the worker one line. Does nothing when the worker is gone."""
        # The listener's thread sends, too, and half a line in the middle of another one would make both unreadable.
        if self._is_open:
            with self._sending, suppress(OSError):  # no worker listens any more
                self.channel.sendall(line_of(message))

    def part(self) -> PartSignal:
        """A signal for a part of the work, which is also set when the work is cancelled."""
        return PartSignal(self.signal)

    def close(self) -> None:
        """In a fork of the process: from now on nothing is sent or received here."""
        self._is_open = False
        self.channel.close()

    def must_stop(self) -> bool:
        """Whether an intent has come, or the worker is gone. A shutdown of the worker is no reason to stop for good."""
        return self.is_cancelled() or self._closed

    def is_cancelled(self) -> bool:
        """Whether the intent to cancel the work has come."""
        self.listen()
        return self.signal.is_set and not self.signal.is_shutdown

    def is_lost(self) -> bool:
        """Whether another worker has the work by now."""
        self.listen()
        cancellation = self.signal.cancellation
        return cancellation is not None and cancellation.kind is CancelKind.LEASE_LOST

    def worker_is_gone(self) -> bool:
        """Whether nobody will ever listen again."""
        self.listen()
        return self._closed

    def listen(self) -> None:
        """Receive what has been sent so far, without waiting."""
        if not self._is_open:
            return
        with self._lock:
            while not self._closed:
                try:
                    data = self.channel.recv(4096, socket.MSG_DONTWAIT)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError:
                    data = b""
                self._closed = not data
                for intent in self._lines.feed(data):
                    self._receive(intent)
            if self._closed:
                self.signal.record(_WORKER_GONE)

    def wait_for_intent(self) -> None:
        """For a guest, and for a moment: whoever passed the interrupt on has the intent already."""
        until = time.monotonic() + _GUESTS_PATIENCE_S
        self.listen()
        while self._is_guest and not self.signal.is_set and time.monotonic() < until:
            select.select([self.channel], [], [], _GUESTS_PATIENCE_S / 50)
            self.listen()

    def _receive(self, intent: Any) -> None:
        with suppress(KeyError, TypeError):  # what is no intent
            if "step_cleaned" in intent or "step_deadline" in intent:
                self.intents.append(intent)
                self._receive_of_step(intent)
                return
            cancellation = Cancellation(
                CancelKind[intent["intent"]],
                intent.get("reason"),
                intent.get("by"),
                deadline=intent.get("deadline"),
                cause=intent.get("cause"),
            )
            self.intents.append(intent)
            self.signal.record(cancellation)

    def _receive_of_step(self, intent: dict[str, Any]) -> None:
        if "step_cleaned" in intent:
            self.cleaned.add(intent["step_cleaned"])
            return
        self.late[intent["pid"]] = intent["step_deadline"], intent["reason"]
        if (part := self.parts.get(intent["step_deadline"])) is not None:
            part.record(Cancellation(CancelKind.DEADLINE, intent["reason"], deadline=intent["deadline"]))


def invitation() -> str | None:
    """The address of the child above this process, if Dagster has started this one to work for it."""
    return os.environ.get(ADDRESS_VARIABLE)


def join(address: str) -> ControlChannel | None:
    """Connect to the child above this process; None when it is gone."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(f"\0{address}")
    except OSError:
        channel.close()
        return None
    return ControlChannel(channel, is_guest=True)
