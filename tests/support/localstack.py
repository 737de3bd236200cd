"""A LocalStack SQS server without Docker, in a process of its own, on loopback and a free port.

It lives in a virtual environment of its own (`make emulator`), because it pins many libraries.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.moto import CREDENTIALS, ENDS_WITH_US, LOOPBACK, PORTS, answers, free_port

PYTHON = Path(__file__).parents[2] / ".venv-localstack" / "bin" / "python"


def is_installed() -> bool:
    return PYTHON.exists()


@contextmanager
def localstack_server(home: Path) -> Iterator[str]:
    """Start a server and give its URL; it is gone afterwards. `home` takes its files."""
    server, url = _start(home)
    try:
        yield url
    finally:
        # Nothing in it is worth a polite end, which it often does not come to.
        server.kill()
        server.wait()


def _start(home: Path) -> "tuple[subprocess.Popen[bytes], str]":
    log = home / "localstack.log"
    for _ in range(PORTS):
        port = free_port()
        environ = {
            **os.environ,
            **CREDENTIALS,
            "HOME": str(home),
            "TMPDIR": str(home),
            "GATEWAY_SERVER": "hypercorn",  # the default one listens on all interfaces
            "GATEWAY_LISTEN": f"{LOOPBACK}:{port}",
            "SERVICES": "sqs",
            "EAGER_SERVICE_LOADING": "1",
            "DISABLE_EVENTS": "1",
            "SKIP_SSL_CERT_DOWNLOAD": "1",
            "LOCALSTACK_HOST": f"{LOOPBACK}:{port}",
            "SQS_ENDPOINT_STRATEGY": "off",  # or else the region is taken from the URL of the queue
        }
        with log.open("wb") as out:
            server = subprocess.Popen(
                [PYTHON, "-c", ENDS_WITH_US + "from localstack.runtime.main import main\nmain()"],
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )
        if answers(server, port, "/_localstack/health"):
            return server, f"http://{LOOPBACK}:{port}"
        server.kill()
        server.wait()
    raise RuntimeError(f"LocalStack started on none of {PORTS} ports: {log.read_text()}")
