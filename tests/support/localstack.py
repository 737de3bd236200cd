"""A LocalStack SQS server without Docker, in a process of its own, on loopback and a free port.

It lives in a virtual environment of its own (`make emulator`), because it pins many libraries.
"""

import http.client
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.moto import CREDENTIALS, ENDS_WITH_US, free_port

PYTHON = Path(__file__).parents[2] / ".venv-localstack" / "bin" / "python"


def is_installed() -> bool:
    return PYTHON.exists()


@contextmanager
def localstack_server(home: Path, start_within_s: float = 60) -> Iterator[str]:
    """Start a server and give its URL; it is gone afterwards. `home` takes its files."""
    port = free_port()
    log = home / "localstack.log"
    environ = {
        **os.environ,
        **CREDENTIALS,
        "HOME": str(home),
        "TMPDIR": str(home),
        "GATEWAY_SERVER": "hypercorn",  # the default one listens on all interfaces
        "GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "SERVICES": "sqs",
        "EAGER_SERVICE_LOADING": "1",
        "DISABLE_EVENTS": "1",
        "SKIP_SSL_CERT_DOWNLOAD": "1",
        "LOCALSTACK_HOST": f"127.0.0.1:{port}",
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
    try:
        _wait_until_it_answers(server, port, start_within_s, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        # Nothing in it is worth a polite end, which it often does not come to.
        server.kill()
        server.wait()


def _wait_until_it_answers(server: "subprocess.Popen[bytes]", port: int, within_s: float, log: Path) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/_localstack/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise RuntimeError(f"LocalStack did not start within {within_s} s (exit code {server.poll()}): {log.read_text()}")
