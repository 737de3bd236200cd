"""The child's end of its channel to the worker: what it says, what it was told, and a thread that listens.

Knows sockets and threads; neither Dagster nor what the work is. A process that the child starts, and that is a worker
process of Dagster's in its turn, can join: it hears what the child hears (`ControlListener.admit`, `join`).
"""

import json
import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Final

from dagster_taskiq.cancellation.model import CancelKind
from dagster_taskiq.cancellation.token import Cause, Signal

ADDRESS_VARIABLE: Final = "DAGSTER_TASKIQ_INTENTS"
"""In the environment of what a child starts: where the child's intents can be heard."""
_WORKER_GONE: Final = Cause(CancelKind.SHUTDOWN, "the worker is gone")
_MAX_LINE: Final = 65_536
_GUESTS_PATIENCE_S: Final = 0.5


class ControlChannel:
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
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Tell the worker one line."""
        # The ear says lines, too, and half a line in the middle of another one would make both unreadable.
        with self._sending, suppress(OSError):  # no worker listens any more
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def must_stop(self) -> bool:
        """Whether an intent has come, or the worker is gone. A shutdown of the worker is no reason to stop for good."""
        return self.is_cancelled() or self._closed

    def is_cancelled(self) -> bool:
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
                self.signal.record(_WORKER_GONE)

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
            self.signal.record(cause)


def join(address: str) -> ControlChannel | None:
    """Connect to the child above this process; None when it is gone."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(f"\0{address}")
    except OSError:
        channel.close()
        return None
    control = ControlChannel(channel)
    control.is_guest = True
    return control
