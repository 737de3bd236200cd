"""A program that used the launcher ends: with and without `dispose`, after a fork, on Ctrl-C, under pytest."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from dagster import DagsterEventType
from tests.acceptance.conftest import open_platform
from tests.support.platform import Platform
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

NOT_BY_ITSELF_S = 9.0
"""Before the ten seconds are over after which a send that nobody answers is given up."""

AS_IN_THE_GUIDE = """
from dagster import DagsterInstance

for run_id in sys.argv[1:3]:
    instance = DagsterInstance.get()
    if instance.run_launcher.terminate(run_id=run_id):
        print("Cancellation requested")
last_line()
"""
WITH_DISPOSE = """
from dagster import DagsterInstance

for run_id in sys.argv[1:3]:
    with DagsterInstance.get() as instance:
        assert instance.run_launcher.terminate(run_id)
    instance.run_launcher.terminate(run_id)  # which opens what was closed
last_line()
"""
FORKED = """
import os, threading
from dagster import DagsterInstance

first, second = sys.argv[1:3]
instance = DagsterInstance.get()
launcher = instance.run_launcher
assert launcher.terminate(first)
assert any("launcher" in thread.name for thread in threading.enumerate())
for as_a_program in (True, False):  # one ends as a program does, the other as a child of multiprocessing
    child = os.fork()
    if child == 0:
        assert not any("launcher" in thread.name for thread in threading.enumerate())
        with DagsterInstance.get() as another:
            assert another.run_launcher.terminate(second)
        assert launcher.terminate(second)
        if as_a_program:
            sys.exit(0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
assert launcher.terminate(second)
last_line()
"""
IN_A_THREAD_AND_A_TEST = """
import threading
from pathlib import Path
import pytest

Path("test_it.py").write_text('''
import sys, threading
from dagster import DagsterInstance

def test_it():
    instance, another = DagsterInstance.get(), DagsterInstance.get()
    thread = threading.Thread(target=instance.run_launcher.terminate, args=[sys.argv[1]], daemon=True)
    thread.start()
    thread.join()
    assert another.run_launcher.terminate(sys.argv[2])
''')
code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "error::ResourceWarning", "test_it.py"])
assert code == 0, code
last_line()
"""
STARTS = """
import sys
def last_line():
    print("last line", flush=True)
"""


@pytest.fixture(scope="module")
def runs(endpoint: str) -> Iterator[tuple[Platform, list[str]]]:
    with open_platform(endpoint) as platform:
        yield platform, [started(platform), started(platform)]


def started(platform: Platform) -> str:
    """A run that looks as if somebody worked on it: it takes a cancel message to stop it."""
    run_id = platform.launch("sleepy_job")
    platform.report(platform.run(run_id), DagsterEventType.RUN_START)
    return run_id


@contextmanager
def program(platform: Platform, code: str, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS + code, *arguments],
        cwd=platform.home,
        env=platform.environ(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


PROGRAMS = {
    "as in the guide": AS_IN_THE_GUIDE,
    "with dispose": WITH_DISPOSE,
    "forked": FORKED,
    "in a thread and a test": IN_A_THREAD_AND_A_TEST,
}


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_a_program_that_used_the_launcher_ends(runs: tuple[Platform, list[str]], code: str) -> None:
    platform, run_ids = runs
    with program(platform, code, *run_ids) as process:
        try:
            out, error = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            pytest.fail("the program does not end")
    assert process.returncode == 0, error
    assert error == ""
    assert out.splitlines()[-1] == "last line"


def test_ctrl_c_ends_a_program_whose_queue_does_not_answer(endpoint: str) -> None:
    url = urlsplit(endpoint)
    code = "from dagster import DagsterInstance\ninstance = DagsterInstance.get()\n"
    code += "instance.run_launcher.terminate(sys.argv[1])"
    with (
        tcp_proxy(str(url.hostname), url.port or 80) as proxy,
        open_platform(f"http://127.0.0.1:{proxy.port}") as platform,
    ):
        run_id = started(platform)
        proxy.swallow()
        before = proxy.accepted
        with program(platform, code, run_id) as process:
            wait_until(
                lambda: proxy.accepted > before or process.poll() is not None, "a cancel message on its way", within=60
            )
            assert process.poll() is None, process.communicate()
            asked_at = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in error.splitlines()[-1], error
        assert time.monotonic() - asked_at < NOT_BY_ITSELF_S, error
        assert process.returncode == -signal.SIGINT
