"""Dagster's own daemon beside a platform, for its run monitoring and for sensors."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.platform import Platform
from tests.support.waiting import wait_until


@contextmanager
def monitoring_daemon(platform: Platform, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """`dagster-daemon run`, until the end of the block; its log is in the platform's home."""
    with dagster_daemon(platform, "--empty-workspace", environment=environment) as log:
        wait_until(
            lambda: "MONITORING" in platform.instance.get_daemon_heartbeats(),
            "the monitoring daemon is at work",
            within=60,
            seen=log.read_text,
        )
        yield


@contextmanager
def dagster_daemon(platform: Platform, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Path]:
    """The same with a workspace of its own, which may not be at work yet; yields the path of its log."""
    log = platform.home / "daemon.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", *arguments],
            env=os.environ | {"DAGSTER_HOME": str(platform.home)} | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield log
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait(5)
