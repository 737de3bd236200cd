"""JSON objects on a stream socket, one a line: how the worker, its shims and its children talk to each other.

Needs the standard library only. `AsyncLines` imports asyncio when it is made, because the shims do without.
"""

import json
import socket
from collections.abc import AsyncIterator
from typing import Any, Final

_CHUNK: Final = 1 << 16


def line_of(message: Any) -> bytes:
    """The message as one line, to be sent as it is."""
    return json.dumps(message).encode() + b"\n"


class Splitter:
    """Takes a stream in pieces and gives what is complete. A line that is no JSON is left out."""

    def __init__(self) -> None:
        self._unfinished = b""

    def feed(self, data: bytes) -> list[Any]:
        """The messages that this piece completes, in order."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        messages = []
        for line in lines:
            try:
                messages.append(json.loads(line))
            except ValueError:
                continue
        return messages


class AsyncLines:
    """Our end of a socket pair, in an event loop.

    Not asyncio's streams: when the other side ends without having read all that we said, which is the rule here, they
    throw away what it had said before.
    """

    def __init__(self, end: socket.socket) -> None:
        from asyncio import get_running_loop

        end.setblocking(False)
        self._end = end
        self._unsent = bytearray()
        self._loop = get_running_loop()

    def send(self, message: dict[str, Any]) -> None:
        """Send it, now if the other side takes it; never raises: who is gone has nothing to read."""
        self.send_bytes(line_of(message))

    def send_bytes(self, data: bytes) -> None:
        """As `send`, for anything."""
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        if self._end.fileno() < 0:
            return
        try:
            del self._unsent[: self._end.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()
        if self._unsent:
            self._loop.add_writer(self._end, self._flush)
        else:
            self._loop.remove_writer(self._end)

    async def messages(self) -> AsyncIterator[Any]:
        """What the other side says, until it ends."""
        splitter = Splitter()
        while True:
            try:
                data = await self._loop.sock_recv(self._end, _CHUNK)
            except OSError:
                return
            if not data:
                return
            for message in splitter.feed(data):
                yield message

    def close(self) -> None:
        """Close the socket; what has not been sent is dropped."""
        self._loop.remove_writer(self._end)
        self._end.close()
