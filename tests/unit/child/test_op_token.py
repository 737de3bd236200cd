"""A cancellation that the token knows before the interrupt has come: the two together interrupt once."""

import subprocess
import sys
import textwrap

import pytest

PROLOGUE = """
import json, os, signal, socket, threading, time
from dagster_taskiq import OpCancelled
from dagster_taskiq.dagster_compat.interrupts import DagsterExecutionInterruptedError, raise_interrupts_as
from dagster_taskiq.child.child_process import ChildProcess
from dagster_taskiq.child.control_channel import ControlChannel

ours, theirs = socket.socketpair()
token = ChildProcess(ControlChannel(theirs)).token()


def cancel(signal_after_s):
    ours.sendall(json.dumps({"intent": "REQUESTED", "reason": "why", "deadline": time.time() + 30}).encode() + b"\\n")
    killer = threading.Timer(signal_after_s, os.kill, (os.getpid(), signal.SIGTERM))
    killer.start()
    return killer


def op():
    with raise_interrupts_as(DagsterExecutionInterruptedError):
        body()
"""
BODIES = {
    "raise_if_cancelled": """
        def body():
            killer = cancel(0.3)
            try:
                while True:
                    token.raise_if_cancelled()
            finally:
                killer.join()
                print("cleaned up")
        """,
    "the end of a shield": """
        def body():
            try:
                with token.shield():
                    killer = cancel(0.3)
                    token.wait(10)
                print("unreachable")
            finally:
                killer.join()
                print("cleaned up")
        """,
    "a shield in the clean-up": """
        def body():
            cancel(0.1)
            try:
                time.sleep(10)
            except BaseException:
                began = time.monotonic()
                with token.shield():
                    pass
                print("cleaned up" if time.monotonic() - began < 1 else "waited in vain")
                token.raise_if_cancelled()
        """,
    "a shield in a thread of the op": """
        worked = threading.Event()

        def work():
            with token.shield():
                cancel(0.1)
                token.wait(10)
            print("cleaned up")
            worked.set()

        def body():
            threading.Thread(target=work).start()
            try:
                time.sleep(10)
            except BaseException:
                # Not Thread.join: before Python 3.13 an interrupted one takes the thread for ended (CPython #90882).
                worked.wait(10)
                token.raise_if_cancelled()
        """,
}


@pytest.mark.parametrize("body", BODIES)
def test_the_interrupt_does_not_come_a_second_time(body: str) -> None:
    epilogue = """
try:
    op()
except OpCancelled as error:
    print(type(error).__name__, error.reason)
"""
    script = PROLOGUE + textwrap.dedent(BODIES[body]) + epilogue
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.splitlines() == ["cleaned up", "OpCancelled why"], done
