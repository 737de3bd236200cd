"""A cancellation that the token knows before the interrupt has come, and interrupts that come between two outputs.

The two interrupt once. Ops of every kind, executed by Dagster itself, are in `test_shields`.
"""

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
process = ChildProcess(ControlChannel(theirs))
token = process.token()


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


DAGSTER = """
import asyncio
from types import SimpleNamespace
from dagster._core.execution.plan import compute
from dagster._utils import iterate_with_context
from dagster._utils.interrupts import capture_interrupts
context = SimpleNamespace(event_loop=asyncio.new_event_loop())


def outputs(generator):
    # As Dagster does it: the user's code in one mode, its own in the other. Here the signal comes in its own.
    with capture_interrupts():
        for output in iterate_with_context(lambda: raise_interrupts_as(DagsterExecutionInterruptedError), generator):
            print(output)
            yield output


def interrupted():
    cancel(0)
    token.wait(10)
    for _ in range(2000):  # until the signal has come, too
        if process.interrupts.came:
            return
        time.sleep(0.01)


def op(generator=None):
    generator = body()
    if not hasattr(generator, "__next__"):
        generator = compute.gen_from_async_gen(context, generator)
    try:
        for _ in outputs(generator):
            if _ == "interrupted":
                interrupted()
    finally:
        process.interrupts.close_generators()  # as at the end of a step
        context.event_loop.close()
"""
OPS = {
    "a shield in a generator": (
        """
        def body():
            try:
                with token.shield():
                    yield "interrupted"
                    print("goes on")
                    yield "output"
                    print("goes on")
                print("unreachable")
            finally:
                print("finally")
        """,
        ["interrupted", "goes on", "output", "goes on", "finally", "OpCancelled why"],
    ),
    "a shield in an asynchronous generator": (
        """
        async def body():
            try:
                with token.shield():
                    yield "interrupted"
                    await asyncio.sleep(0.01)
                    print("goes on")
                    yield "output"
                print("unreachable")
            finally:
                print("finally")
        """,
        ["interrupted", "goes on", "output", "finally", "DagsterExecutionInterruptedError None"],
    ),
    "a generator that is left between two outputs": (
        """
        async def body():
            try:
                yield "interrupted"
                print("unreachable")
            finally:
                await asyncio.sleep(0.01)
                print("finally")
        """,
        ["interrupted", "finally", "DagsterExecutionInterruptedError None"],
    ),
    "a shield in a loop of the op's own": (
        """
        async def inner():
            with token.shield():
                cancel(0)
                while not process.interrupts.came:
                    await asyncio.sleep(0.01)
                print("goes on")

        async def outer():
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(inner())
                    await asyncio.sleep(30)
                print("unreachable")
            finally:
                await asyncio.sleep(0.01)
                print("finally")

        def body():
            asyncio.run(outer())
            yield "unreachable"
        """,
        ["goes on", "finally", "CancelledError None"],
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_an_interrupt_waits_for_the_last_shield_and_goes_to_the_op(name: str) -> None:
    body, expected = OPS[name]
    epilogue = """
try:
    op()
except BaseException as error:
    print(type(error).__name__, getattr(error, "reason", None))
"""
    script = PROLOGUE + DAGSTER + textwrap.dedent(body) + epilogue
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.splitlines() == expected, done
