"""A program whose fork server is forked early. Run by itself: `python -m tests.support.early CASE`.

Prints one JSON object: what its child, or the error, said.
"""

import asyncio
import atexit
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from dagster_taskiq.errors import ChildStartFailed
from dagster_taskiq.process.child_handle import ChildSpec
from dagster_taskiq.process.fork_server import ForkServer

FOLDER = tempfile.TemporaryDirectory(prefix="early-")
HELD_OPEN = Path(FOLDER.name, "held open").open("w")  # noqa: SIM115 - a descriptor that is the program's


async def child_of(server: ForkServer) -> dict[str, Any]:
    """Fork a child that looks around; what it saw, and which process is its server."""
    spec = ChildSpec("tests.support.targets:looks_around", {}, os.urandom(8).hex(), 5, 60, 5)
    child = await server.fork(spec)
    child.begin()
    code = await asyncio.wait_for(child.exited, 20)
    await asyncio.wait_for(child.gone, 20)
    await child.close()
    assert server.pid is not None
    return {**child.messages[0], "code": code, "server": server.pid, "command": command_of(server.pid)}


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def use(server: ForkServer, case: str) -> dict[str, Any]:
    try:
        first = await child_of(server)
        if case != "killed":
            return first
        os.kill(first["server"], signal.SIGKILL)
        return {"first": first, "second": await child_of(server)}
    except ChildStartFailed as error:
        return {"error": str(error)}
    finally:
        await server.stop()


def main(case: str) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger("tests").setLevel(logging.DEBUG)
    atexit.register(print, "the program ends", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: print("terminated", file=sys.stderr))
    sys.stdout.write("not flushed ")  # into a pipe
    functions = ["tests.support.targets:start_a_thread"] if case == "thread in warm-up" else []
    server = ForkServer(preload=["tests.support.targets"], warm_up={name: [None] for name in functions})
    if case == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    connections = socket.socketpair() if case == "socket" else ()
    server.fork_early()
    early = server.pid
    said = asyncio.run(use(server, case))
    for connection in connections:
        connection.close()
    program = {"early": early, "folder": FOLDER.name, "folder_exists": Path(FOLDER.name).is_dir()}
    print(json.dumps({**said, "program": program}))


if __name__ == "__main__":
    main(sys.argv[1])
