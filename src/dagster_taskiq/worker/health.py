"""Is the worker of this container alive? It answers on an abstract socket, as long as its event loop runs.

Asks neither database nor SQS: when one of them does not answer, a new worker does not help.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

_PREFIX: Final = "dagster-taskiq-worker-"
_ANSWER_WITHIN_S: Final = 3.0


@asynccontextmanager
async def answering(describe: Callable[[], Mapping[str, Any]]) -> AsyncIterator[None]:
    """As long as this lasts, every connection gets the status of this worker."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            writer.write(json.dumps(describe()).encode() + b"\n")
            await writer.drain()
        writer.close()

    # An abstract address needs no writable file system.
    server = await asyncio.start_unix_server(answer, path=f"\0{_prefix()}{os.getpid()}")
    try:
        yield
    finally:
        server.close()


def workers_here(pid: int | None = None) -> dict[int, dict[str, Any] | None]:
    """The status of each worker in this container by pid, or only of that one; None: it does not answer."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    prefix = _prefix()
    names = {line.rpartition("@")[2] for line in lines if f"@{prefix}" in line}
    found = {int(name.removeprefix(prefix)): name for name in names}
    return {one: _ask(name) for one, name in sorted(found.items()) if pid is None or one == pid}


def _prefix() -> str:
    # The containers of one ECS task share their network, and with it these names, but not their pids.
    return f"{_PREFIX}{Path('/proc/self/ns/pid').stat().st_ino}-"


def _ask(name: str) -> dict[str, Any] | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_WITHIN_S)
        try:
            connection.connect(f"\0{name}")
            answer = json.loads(connection.makefile().readline())
        except (OSError, ValueError):
            return None
    return answer if isinstance(answer, dict) else None
