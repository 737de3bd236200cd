"""A TCP proxy on loopback that can cut what goes through it: a database that fails over, a network that is gone.

It knows bytes only. It works in a thread of its own, so that tests and processes can use it alike.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from anyio.from_thread import BlockingPortal, start_blocking_portal

_CHUNK = 65_536


class TcpProxy:
    """Connections to `host:port`. Made by `tcp_proxy`; the methods can be called from any thread."""

    host = "127.0.0.1"

    def __init__(self, portal: BlockingPortal, target: tuple[str, int]) -> None:
        self.port = 0
        self.accepted = 0
        self.refused = 0
        self._portal = portal
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._holes: set[asyncio.StreamWriter] = set()
        """Ends of connections through which nothing comes any more, ever."""
        self._is_away = False
        self._swallows = False
        self._flows = asyncio.Event()

    def cut(self) -> None:
        """Close all connections there are; new ones are welcome."""
        self._portal.call(self._cut)

    def away(self) -> None:
        """Close all connections there are, and each new one at once, until `back`."""
        self._is_away = True
        self.cut()

    def freeze(self) -> None:
        """Let nothing through, but keep the connections, until `back`: a network that swallows packets."""
        self._portal.call(self._flows.clear)

    def swallow(self) -> None:
        """Discard for ever what comes through the open connections; accept new ones and never answer, until `heal`.

        So it is when a database fails over behind a load balancer, or a NAT forgets its connections: nobody is told.
        """
        self._portal.call(self._swallow)

    def heal(self) -> None:
        """New connections work again. Those of before stay silent."""
        self._swallows = False

    def back(self) -> None:
        """As in the beginning."""
        self._is_away = self._swallows = False
        self._portal.call(self._flows.set)

    def _cut(self) -> None:
        for writer in [*self._writers]:
            writer.transport.abort()

    def _swallow(self) -> None:
        self._swallows = True
        self._holes |= self._writers

    async def serve(self) -> asyncio.Server:
        self._flows.set()
        server = await asyncio.start_server(self._connected, self.host, 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_away:
            self.refused += 1
            writer.transport.abort()
            return
        self.accepted += 1
        if self._swallows:
            await self._discard(reader, writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        ours = {writer, far_writer}
        self._writers |= ours
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, far_writer))
                both.create_task(self._pump(far_reader, writer))
        finally:
            self._writers -= ours
            self._holes -= ours
            for one in ours:
                one.transport.abort()

    async def _discard(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError):
                while await reader.read(_CHUNK):
                    pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._flows.wait()
                if writer not in self._holes:
                    writer.write(data)
                    await writer.drain()
            if writer not in self._holes and writer.can_write_eof():
                writer.write_eof()


@contextmanager
def tcp_proxy(host: str, port: int) -> Iterator[TcpProxy]:
    """A proxy in front of `host:port`, on a free port; it is gone afterwards, and all its connections."""
    with start_blocking_portal() as portal:
        proxy = TcpProxy(portal, (host, port))
        server = portal.call(proxy.serve)
        try:
            yield proxy
        finally:
            proxy.back()
            portal.call(server.close)
            proxy.cut()
