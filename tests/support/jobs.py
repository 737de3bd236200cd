"""Jobs whose ops are hard, or a pleasure, to stop. Each op writes what it lived through into the file `marks`.

`started` is where tests begin to interrupt: an op writes it where it is ready for that.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_taskiq import cancellation_token, taskiq_executor


class Marks(dg.Config):
    marks: str
    seconds: float = 300.0


def mark(config: Marks, text: str) -> None:
    with Path(config.marks).open("a") as file:
        file.write(f"{text} {time.time()}\n")


@dg.op
def sleepy(config: Marks) -> None:
    try:
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
        mark(config, "slept")
    except BaseException:
        mark(config, "interrupted")
        raise
    finally:
        mark(config, "cleanup-begin")
        time.sleep(0.05)
        mark(config, "cleanup-end")


@dg.op
def closes_when_told(config: Marks) -> None:
    """Its cleanup lasts as long as there is a file."""
    try:
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    finally:
        until = time.monotonic() + config.seconds
        while Path(f"{config.marks}.hold").exists() and time.monotonic() < until:
            time.sleep(0.05)
        mark(config, "cleanup-end")


@dg.op
def busy(config: Marks) -> None:
    until = time.monotonic() + config.seconds
    try:
        mark(config, f"started {os.getpid()}")
        while time.monotonic() < until:
            sum(range(1000))
    except BaseException:
        mark(config, "interrupted")
        raise
    finally:
        mark(config, "cleanup-begin")
        mark(config, "cleanup-end")


@dg.op
def blocked_in_c(config: Marks) -> None:
    """One C call of many minutes that keeps the interpreter lock, so that no Python signal handler can run."""
    with contextlib.suppress(BaseException):  # an interrupt that comes before the call
        mark(config, f"started {os.getpid()}")
        deque(itertools.repeat(None, 10**12), maxlen=0)
    deque(itertools.repeat(None, 10**12), maxlen=0)


@dg.op
def carries_on(config: Marks) -> None:
    until = time.monotonic() + config.seconds
    try:
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    except BaseException:  # noqa: BLE001 - what some code of users does
        mark(config, "swallowed")
    while time.monotonic() < until:
        try:
            time.sleep(0.05)
        except BaseException:  # noqa: BLE001
            mark(config, "swallowed")
    mark(config, "slept")


@dg.op(pool="scarce")
def holds_a_pool_slot(config: Marks) -> None:
    until = time.monotonic() + config.seconds
    with contextlib.suppress(BaseException):
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            time.sleep(0.05)


@dg.op
def swallows_once(config: Marks) -> None:
    """Swallows the interrupt and then ends as if nothing had happened."""
    with contextlib.suppress(BaseException):
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    mark(config, "swallowed")


@dg.op(ins={"before": dg.In(dg.Nothing)})
def afterwards(config: Marks) -> None:
    mark(config, "afterwards")


@dg.op(retry_policy=dg.RetryPolicy(max_retries=3, delay=0.1))
def retried(config: Marks) -> None:
    try:
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    finally:
        mark(config, "cleanup-begin")
        mark(config, "cleanup-end")


@dg.op
def runs_a_subprocess(config: Marks) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    mark(config, f"subprocess {process.pid}")
    mark(config, f"started {os.getpid()}")
    process.wait()


def leave_behind(config: Marks, name: str) -> None:
    """A daemon in the classical way: two forks and a session of its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        daemon = os.fork()
        if daemon == 0:
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)"])  # noqa: S606 - our own interpreter
        os.write(write, str(daemon).encode())
        os._exit(0)
    os.wait()
    mark(config, f"{name} {os.read(read, 20).decode()}")


@dg.op
def double_forks_a_daemon(config: Marks) -> None:
    leave_behind(config, "daemon")
    mark(config, f"started {os.getpid()}")
    time.sleep(config.seconds)


@dg.op
def has_a_setsid_grandchild(config: Marks) -> None:
    code = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True);"
        "print(p.pid, flush=True); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    mark(config, f"grandchild {process.stdout.readline().strip()}")
    mark(config, f"started {os.getpid()}")
    process.wait()


class Transaction(Marks):
    database: str


@dg.op
def holds_a_transaction(config: Transaction) -> None:
    connection = sqlite3.connect(config.database, isolation_level=None)
    connection.execute("CREATE TABLE IF NOT EXISTS rows (value INTEGER)")
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("INSERT INTO rows VALUES (1)")
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
        connection.execute("COMMIT")
    finally:
        mark(config, "cleanup-begin")
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.close()
        mark(config, "cleanup-end")


@dg.op
def quick(config: Marks) -> None:
    mark(config, f"started {os.getpid()}")
    time.sleep(min(config.seconds, 1.0))
    mark(config, "cleanup-begin")
    mark(config, "cleanup-end")


@dg.op
def fails() -> None:
    raise RuntimeError("as it should")


@dg.op
def dies(config: Marks) -> None:
    mark(config, f"started {os.getpid()}")
    os._exit(17)


@dg.op
def leaves_a_daemon(config: Marks) -> None:
    leave_behind(config, "daemon")


def upload_in_a_thread(config: Marks) -> None:
    """Goes on when the op has ended; an interpreter waits for it."""
    cancellation_token().state["upload"] = "1"

    def upload() -> None:
        time.sleep(config.seconds)
        mark(config, "uploaded")

    threading.Thread(target=upload, name="upload-1").start()


@dg.op
def uploads_in_a_thread(config: Marks) -> None:
    upload_in_a_thread(config)
    mark(config, f"started {os.getpid()}")


@dg.op
def uploads_in_a_thread_and_fails(config: Marks) -> None:
    upload_in_a_thread(config)
    raise RuntimeError("as it should")


@dg.op
async def awaits_a_thread(config: Marks) -> None:
    try:
        mark(config, f"started {os.getpid()}")
        await asyncio.to_thread(time.sleep, config.seconds)
    finally:
        mark(config, "cleanup-begin")
        mark(config, "cleanup-end")


@dg.op
def talkative(config: Marks) -> None:
    """Writes whatever a process can write; and more of it when it is interrupted."""
    print("from print", flush=True)
    os.write(2, b"latin \xe9 and \x1b[31mred\x1b[0m\n")
    os.write(1, b'{"mine": 1}\n[1, 2]\n"text"\n{"half": \n' + b"x" * 600_000 + b"\n")
    os.write(2, b"Traceback (most recent call last):\n  File x\nKeyError: 'y'\n")
    warnings.warn("from warnings", UserWarning, stacklevel=2)
    subprocess.run(["sh", "-c", "echo from a process; echo and its stderr >&2"], check=True)
    with suppress(OSError):
        ctypes.CDLL(None).puts(b"from C")
        ctypes.CDLL(None).fflush(None)
    try:
        mark(config, f"started {os.getpid()}")
        time.sleep(config.seconds)
    finally:
        for number in range(5_000):
            print(f"finally {number}", flush=True)
        os.write(2, b"no end of line")
        mark(config, "cleanup-end")


@dg.op
def crashes(config: Marks) -> None:
    mark(config, f"started {os.getpid()}")
    faulthandler.enable()
    os.kill(os.getpid(), signal.SIGABRT)


def _job_of(op: dg.OpDefinition) -> dg.JobDefinition:
    @dg.job(name=f"{op.name}_job", executor_def=dg.in_process_executor)
    def job() -> None:
        op()

    return job


sleepy_job = _job_of(sleepy)
closes_when_told_job = _job_of(closes_when_told)
busy_job = _job_of(busy)
blocked_in_c_job = _job_of(blocked_in_c)
carries_on_job = _job_of(carries_on)
retried_job = _job_of(retried)
holds_a_pool_slot_job = _job_of(holds_a_pool_slot)
runs_a_subprocess_job = _job_of(runs_a_subprocess)
double_forks_a_daemon_job = _job_of(double_forks_a_daemon)
has_a_setsid_grandchild_job = _job_of(has_a_setsid_grandchild)
holds_a_transaction_job = _job_of(holds_a_transaction)
quick_job = _job_of(quick)
fails_job = _job_of(fails)
dies_job = _job_of(dies)
leaves_a_daemon_job = _job_of(leaves_a_daemon)
uploads_in_a_thread_job = _job_of(uploads_in_a_thread)
uploads_in_a_thread_and_fails_job = _job_of(uploads_in_a_thread_and_fails)
awaits_a_thread_job = _job_of(awaits_a_thread)
talkative_job = _job_of(talkative)
crashes_job = _job_of(crashes)


@dg.job(executor_def=dg.in_process_executor)
def swallows_once_job() -> None:
    afterwards(swallows_once())


@dg.job(executor_def=taskiq_executor)
def step_uploads_in_a_thread_job() -> None:
    uploads_in_a_thread()


def map_slowly(config: dict[str, Any]) -> dict[str, Any]:
    """As long as there is a file beside the marks that says so: a plan that takes its time."""
    marks = Path(config["marks"])
    mark(Marks(marks=str(marks)), f"planning {os.getpid()}")
    until = time.monotonic() + 30
    while Path(f"{marks}.hold").exists() and time.monotonic() < until:
        time.sleep(0.02)
    return {"sleepy": {"config": dict(config)}}


@dg.graph(
    config=dg.ConfigMapping(
        map_slowly, config_schema={"marks": str, "seconds": dg.Field(float, is_required=False, default_value=300.0)}
    )
)
def planned_slowly() -> None:
    sleepy()


@dg.job(executor_def=dg.in_process_executor)
def planned_slowly_job() -> None:
    planned_slowly()


@dg.job(executor_def=dg.multiprocess_executor)
def multiprocess_job() -> None:
    sleepy.alias("first")()
    sleepy.alias("second")()


defs = dg.Definitions(
    jobs=[
        sleepy_job,
        busy_job,
        blocked_in_c_job,
        carries_on_job,
        retried_job,
        holds_a_pool_slot_job,
        runs_a_subprocess_job,
        double_forks_a_daemon_job,
        has_a_setsid_grandchild_job,
        holds_a_transaction_job,
        quick_job,
        fails_job,
        dies_job,
        leaves_a_daemon_job,
        uploads_in_a_thread_job,
        uploads_in_a_thread_and_fails_job,
        awaits_a_thread_job,
        step_uploads_in_a_thread_job,
        talkative_job,
        crashes_job,
        swallows_once_job,
        planned_slowly_job,
        multiprocess_job,
    ]
)
