"""How long does a worker take to start, and how much CPU? Worker and fork server together, against `import dagster`.

    make benchmark-start                                  # or: python -m benchmarks.worker_start 10
    python -m benchmarks.worker_start 10 /old/src         # interleaved with another version of this package

From `exec` of `dagster-taskiq worker start` to the line that says `ready`, the median of so many starts. Absolute times
depend on the machine and on what else it does; CPU and the ratios do so much less. SQS is moto on loopback, the storage
SQLite.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table
from tests.acceptance.conftest import open_platform
from tests.support.moto import CREDENTIALS, moto_server

COMMANDS: Final = {
    "worker list": ("worker", "list"),
    "run cancel UNKNOWN": ("run", "cancel", "UNKNOWN"),
    "queue status": ("queue", "status"),
}
Measures = dict[str, list[tuple[float, float]]]
"""Name to seconds and CPU seconds of each time."""


def worker_start(environ: Mapping[str, str]) -> tuple[float, float]:
    """Seconds, and CPU seconds of the whole tree, until the worker is ready."""
    began = time.monotonic()
    command = [sys.executable, "-m", "dagster_taskiq.cli", "worker", "start", "--log-level", "ERROR"]
    worker = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    line = worker.stdout.readline()
    took = time.monotonic() - began
    assert " is ready" in line, line
    tree = psutil.Process(worker.pid)
    times = [process.cpu_times() for process in (tree, *tree.children(recursive=True))]
    worker.terminate()
    worker.wait(30)
    return took, sum(one.user + one.system for one in times)


def program(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[float, float]:
    """Seconds and CPU seconds of one interpreter, from `exec` to its end."""
    began = time.monotonic()
    ended = subprocess.Popen(
        [sys.executable, *arguments], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(ended.pid, 0)
    ended.returncode = os.waitstatus_to_exitcode(status)
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime


def once(measures: Measures, environ: Mapping[str, str], version: str) -> None:
    note(measures, f"worker start to ready{version}", worker_start(environ))
    note(measures, f"import the worker{version}", program(["-c", "import " + worker_module(environ)], environ))
    for name, arguments in COMMANDS.items():
        note(measures, f"{name}{version}", program(["-m", "dagster_taskiq.cli", *arguments], environ))


def note(measures: Measures, name: str, took: tuple[float, float]) -> None:
    measures[name].append(took)
    print(f"{name}: {took[0]:.2f} s, {took[1]:.2f} CPU s", file=sys.stderr)


def worker_module(environ: Mapping[str, str]) -> str:
    """What the command imports; the first release had it in one file."""
    old = environ.get("PYTHONPATH", "")
    return (
        "dagster_taskiq.worker" if Path(old, "dagster_taskiq/worker.py").exists() else "dagster_taskiq.worker.service"
    )


def main(times: int, other: str | None) -> None:
    os.environ.update(CREDENTIALS)
    measures: Measures = defaultdict(list)
    with moto_server() as endpoint, open_platform(endpoint) as platform:
        environ = platform.environ()
        versions = {"": environ} | ({f" ({other})": {**environ, "PYTHONPATH": other}} if other else {})
        for round_ in range(times + 1):
            if round_ == 1:
                measures.clear()  # the first one finds cold files, and creates the tables
            note(measures, "import dagster", program(["-c", "import dagster"], environ))
            for version, its_environ in versions.items():
                once(measures, its_environ, version)
    table = Table(title=f"p50 of {times}", title_justify="left")
    for heading in ("", "s", "CPU s", "CPU / import dagster"):
        table.add_column(heading, justify="right" if heading else "left")
    base = median(cpu for _, cpu in measures["import dagster"])
    for name, pairs in measures.items():
        cpu = median(cpu for _, cpu in pairs)
        table.add_row(name, f"{median(took for took, _ in pairs):.2f}", f"{cpu:.2f}", f"{cpu / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 10, sys.argv[2] if sys.argv[2:] else None)
