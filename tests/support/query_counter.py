"""A proxy in front of PostgreSQL that counts connections and keeps the queries: libpq's simple protocol, no TLS."""

import asyncio
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyio.from_thread import start_blocking_portal

_CHUNK = 65_536
_QUERY = ord("Q")
_SSL_REQUEST = bytes.fromhex("04d2162f")
_WHY = b"SFATAL\0C08P01\0Munsupported startup parameter: options\0\0"
_REFUSED = b"E" + (len(_WHY) + 4).to_bytes(4, "big") + _WHY


class QueryCounter:
    """What went through: `queries` in their order, with the number of their connection; `connections`."""

    host = "127.0.0.1"

    def __init__(self, target: tuple[str, int]) -> None:
        self.port = 0
        self.connections = 0
        self.queries: list[tuple[int, str]] = []
        self.takes_options = True
        """Not so: as PgBouncer and RDS Proxy, which know no `options` of a connection."""
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def open(self) -> int:
        """Connections at this moment."""
        return len(self._writers) // 2

    def reset(self) -> None:
        """Count from here."""
        self.connections = 0
        self.queries = []

    async def serve(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connected, self.host, 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def close(self) -> None:
        for writer in [*self._writers]:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        both = {writer, far_writer}
        self._writers |= both
        answers = asyncio.create_task(self._answer(far_reader, writer))
        try:
            await self._listen(self.connections, reader, writer, far_writer)
        except (asyncio.IncompleteReadError, OSError):
            pass  # it is closed
        finally:
            answers.cancel()
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _listen(
        self, number: int, reader: asyncio.StreamReader, client: asyncio.StreamWriter, writer: asyncio.StreamWriter
    ) -> None:
        # Without a type byte: first a question for TLS, then the start; from there on typed messages.
        started = False
        while True:
            kind = await reader.readexactly(1) if started else b""
            length = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(length, "big") - 4)
            if not started and not self.takes_options and b"options\0" in body:
                client.write(_REFUSED)
                await client.drain()
                return
            writer.write(kind + length + body)
            await writer.drain()
            started = started or body != _SSL_REQUEST
            if kind and kind[0] == _QUERY:
                self.queries.append((number, " ".join(body.rstrip(b"\0").decode().split())))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()


@contextmanager
def query_counter(host: str, port: int) -> Iterator[QueryCounter]:
    """Such a proxy, on a free port."""
    counter = QueryCounter((host, port))
    with start_blocking_portal() as portal:
        server = portal.call(counter.serve)
        try:
            yield counter
        finally:
            portal.call(server.close)
            portal.call(counter.close)


def by_way_of(postgres: str, proxy: Any, query: str = "") -> str:
    """The URL of that database through a proxy."""
    parts = urllib.parse.urlsplit(postgres)
    return parts._replace(netloc=f"{parts.username}@{proxy.host}:{proxy.port}", query=query).geturl()


def target(postgres: str) -> tuple[str, int]:
    """Host and port of a database's URL."""
    parts = urllib.parse.urlsplit(postgres)
    return parts.hostname or "127.0.0.1", parts.port or 5432
