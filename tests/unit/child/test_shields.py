"""Interrupts and shields in ops of every kind, by a real signal, each in a process of its own that is no worker's."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(200)

CASES = '''
import asyncio, gc, json, os, signal, socket, sys, threading, time, traceback
import dagster as dg
from dagster_taskiq import cancellation_token
from dagster_taskiq.child.child_process import ChildProcess
from dagster_taskiq.child.control_channel import ControlChannel

told = []


def cancel():
    """As a worker does it: the intent, then the signal."""
    intent = {"intent": "REQUESTED", "reason": "why", "deadline": time.time() + 30}
    ours.sendall(json.dumps(intent).encode() + b"\\n")
    os.kill(os.getpid(), signal.SIGTERM)


def later(call=cancel):
    threading.Timer(0.2, call).start()


def generator():
    """A shield around a yield."""
    try:
        with cancellation_token().shield():
            cancel()
            yield dg.AssetMaterialization("a")
            time.sleep(0.1)
            told.append("completed")
        told.append("unreachable")
    finally:
        told.append("finally")
    yield dg.Output(None)


async def async_generator():
    try:
        with cancellation_token().shield():
            cancel()
            yield dg.AssetMaterialization("a")
            await asyncio.sleep(0.1)
            told.append("completed")
        told.append("unreachable")
    finally:
        await asyncio.sleep(0.01)
        told.append("finally")
    yield dg.Output(None)


def suspended_when_it_comes():
    """The signal comes while Dagster stores the event, where it only captures interrupts."""
    try:
        with cancellation_token().shield():
            later()
            for _ in range(5):
                yield dg.AssetMaterialization("a")
                time.sleep(0.1)
            told.append("completed")
        told.append("unreachable")
    finally:
        told.append("finally")
    yield dg.Output(None)


async def task_group():
    async def child():
        with cancellation_token().shield():
            later()
            await asyncio.sleep(0.5)
            told.append("completed")
        told.append("nothing raised")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            await asyncio.sleep(300)
    finally:
        await asyncio.sleep(0.01)
        told.append("finally")


async def gathered():
    async def part(seconds):
        with cancellation_token().shield():
            await asyncio.sleep(seconds)
            told.append(f"completed {seconds}")

    later()
    try:
        await asyncio.gather(part(0.4), part(0.8))
        await asyncio.sleep(300)
    finally:
        told.append("finally")


async def in_a_thread():
    def work():
        with token.shield():
            later()
            time.sleep(0.5)
            told.append("completed")

    token = cancellation_token()
    try:
        await asyncio.to_thread(work)
        await asyncio.sleep(300)
    finally:
        told.append("finally")


def thread_of_a_function():
    def work():
        with token.shield():
            later()
            time.sleep(0.5)
            told.append("completed")

    token = cancellation_token()
    threading.Thread(target=work).start()
    try:
        time.sleep(300)
    finally:
        told.append("finally")


def out_of_order():
    first, second = cancellation_token().shield(), cancellation_token().shield()
    first.__enter__()
    second.__enter__()
    try:
        first.__exit__(None, None, None)
        cancel()
        told.append("completed")
        second.__exit__(None, None, None)
        told.append("unreachable")
    finally:
        told.append("finally")


def closed_generator():
    def inner():
        with cancellation_token().shield():
            yield
            yield

    def use():
        parts = inner()
        next(parts)
        cancel()
        told.append("completed")

    try:
        use()  # its generator is closed by the collector, where nobody sees what is raised
        gc.collect()
        time.sleep(300)
    finally:
        told.append("finally")


async def blocks():
    try:
        later()
        time.sleep(300)
        told.append("unreachable")
    except asyncio.CancelledError as error:
        told.append(str(error))
        raise
    finally:
        await asyncio.sleep(0.3)
        told.append("finally")


async def blocks_in_a_shield():
    try:
        with cancellation_token().shield():
            later()
            time.sleep(3)
            told.append("completed")
        time.sleep(300)
        told.append("unreachable")
    finally:
        await asyncio.sleep(0.01)
        told.append("finally")


async def child_task_blocks():
    async def child():
        later()
        try:
            time.sleep(300)
            told.append("unreachable")
        finally:
            told.append("child finally")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            await asyncio.sleep(300)
    finally:
        await asyncio.sleep(0.01)
        told.append("finally")


async def child_task_blocks_and_cleans_up():
    """Neither the cancellation of the op nor another look at the loop comes into the middle of its `finally`."""

    async def child():
        later()
        try:
            time.sleep(300)
        finally:
            time.sleep(2.5)
            await asyncio.sleep(0.1)
            told.append("child finally")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            await asyncio.sleep(300)
    finally:
        told.append("finally")


async def opens_a_shield_before_the_loop_looks():
    try:
        cancel()
        with cancellation_token().shield():
            await asyncio.sleep(0.3)
            told.append("completed")
        await asyncio.sleep(300)
    finally:
        told.append("finally")


async def second_signal():
    try:
        later()
        await asyncio.sleep(300)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.3)
        told.append("finally")


def second_signal_of_a_function():
    try:
        cancel()
        time.sleep(300)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        told.append("finally")


async def stays_alive():
    """A loop that reacts is not raised in, however long its cleanup takes."""
    try:
        later()
        await asyncio.sleep(300)
    except asyncio.CancelledError:
        for _ in range(5):
            await asyncio.sleep(0.5)
        told.append("finally")
        raise


def forked():
    """A fork of the op reads nothing of what is meant for its parent."""
    token = cancellation_token()
    pid = os.fork()
    if not pid:
        try:
            code = 3
            until = time.monotonic() + 5
            while time.monotonic() < until:
                if cancellation_token().is_cancelled or token.is_cancelled:
                    code = 4
                from dagster_taskiq.cancellation.current import current_process
                current_process().is_cancelled()
                parent.is_cancelled()
                parent.control.send(step_ended="STEP_SUCCESS")
                time.sleep(0.001)
                if time.monotonic() > until - 3:
                    code = 0
                    break
        finally:
            os._exit(code)
    time.sleep(1)
    ours.sendall(json.dumps({"intent": "REQUESTED", "reason": "why", "deadline": time.time() + 30}).encode() + b"\\n")
    _, status = os.waitpid(pid, 0)
    told.append(f"fork {os.waitstatus_to_exitcode(status)}")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(300)
    finally:
        told.append(f"finally {token.reason}")


def run(case):
    global ours, parent
    ours, theirs = socket.socketpair()
    parent = ChildProcess(ControlChannel(theirs))
    op = dg.op(name="an_op", out=dg.Out(dg.Nothing))(globals()[case])

    @dg.job
    def job():
        op()

    result = job.execute_in_process(raise_on_error=False)
    failures = [event.step_failure_data for event in result.all_node_events if event.is_step_failure]
    outcome = [failure.error_source.name for failure in failures]
    ours.setblocking(False)
    try:
        sent = ours.recv(1 << 16).decode()
    except BlockingIOError:
        sent = ""
    return {"told": told, "outcome": outcome, "took_hold": parent.interrupted, "sent": "step_ended" in sent}


if __name__ == "__main__":
    readers = {}
    for case in sys.argv[1:]:
        read, write = os.pipe()
        if not os.fork():
            signal.alarm(150)
            try:
                answer = json.dumps(run(case)).encode()
            except BaseException:
                answer = json.dumps(traceback.format_exc()).encode()
            os.write(write, answer)
            os._exit(0)
        os.close(write)
        readers[case] = read
    print("\\n" + json.dumps({case: json.loads(open(read).read() or "null") for case, read in readers.items()}))
'''

EXPECTED = {
    "generator": ["completed", "finally"],
    "async_generator": ["completed", "finally"],
    "suspended_when_it_comes": ["completed", "finally"],
    "task_group": ["completed", "nothing raised", "finally"],
    "gathered": ["completed 0.4", "completed 0.8", "finally"],
    "in_a_thread": ["completed", "finally"],
    "thread_of_a_function": ["completed", "finally"],
    "out_of_order": ["completed", "finally"],
    "closed_generator": ["completed", "finally"],
    "blocks": ["why", "finally"],
    "blocks_in_a_shield": ["completed", "finally"],
    "child_task_blocks": ["child finally", "finally"],
    "child_task_blocks_and_cleans_up": ["child finally", "finally"],
    "opens_a_shield_before_the_loop_looks": ["completed", "finally"],
    "second_signal": ["finally"],
    "second_signal_of_a_function": ["finally"],
    "stays_alive": ["finally"],
    "forked": ["fork 0", "finally why"],
}


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", CASES, *EXPECTED], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done
    answers: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("case", EXPECTED)
def test_an_interrupt_comes_once_and_outside_of_every_shield(case: str, seen: dict[str, dict[str, object]]) -> None:
    assert seen[case] == {"told": EXPECTED[case], "outcome": ["INTERRUPT"], "took_hold": True, "sent": False}
