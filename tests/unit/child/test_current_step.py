"""Whose state is it? By what Dagster's loop over the steps does in this process, and never by who asked last."""

import subprocess
import sys

SCRIPT = """
import _thread, socket, threading
from concurrent.futures import ThreadPoolExecutor

import dagster as dg

from dagster_taskiq import StateError, cancellation_token
from dagster_taskiq.child.child_process import ChildProcess
from dagster_taskiq.child.control_channel import ControlChannel
from dagster_taskiq.storage.step_state import state_of

instance = dg.DagsterInstance.ephemeral()
ours, theirs = socket.socketpair()
ChildProcess(ControlChannel(theirs))
old = ThreadPoolExecutor(1)
old.submit(int).result()


def keep(what):
    try:
        cancellation_token().state[what] = 1
        return "kept"
    except StateError:
        return "refused"


def in_new_thread(what):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(keep, what).result()


def in_thread_of_c(what):
    said, done = [], _thread.allocate_lock()
    done.acquire()
    _thread.start_new_thread(lambda: (said.append(keep(what)), done.release()), ())
    done.acquire()
    return said[0]


@dg.op
def inner():
    print("inner:", in_new_thread("inner"), keep("of_op"))


@dg.job
def inner_job():
    inner()


@dg.op
def outer():
    print("outer:", in_new_thread("before"))
    nested.append(inner_job.execute_in_process(instance=instance).run_id)
    print("outer:", in_new_thread("after"), old.submit(keep, "old").result(), in_thread_of_c("of_c"))


@dg.op
def fails(context):
    if context.retry_number == 0:
        in_new_thread("first_attempt")
        raise dg.RetryRequested(max_retries=1)
    in_new_thread("second_attempt")
    raise ValueError("on purpose")


@dg.job(executor_def=dg.in_process_executor)
def outer_job():
    outer()
    fails()


nested = []
run_id = outer_job.execute_in_process(instance=instance, raise_on_error=False).run_id
print("no step:", keep("after the end"), in_new_thread("after the end"))
for run, key in ((run_id, "outer"), (nested[0], "inner"), (run_id, "fails")):
    print(key, sorted(state_of(instance, run, key)))
"""


def test_it_is_that_of_the_step_that_is_at_work_here() -> None:
    """Of an op in an op the inner one; of each attempt the step; a thread that is older than the step is nobody's."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == [
        "outer: kept",
        "inner: kept kept",
        "outer: kept refused refused",
        "no step: refused refused",
        "outer ['after', 'before']",
        "inner ['inner', 'of_op']",
        "fails ['first_attempt', 'second_attempt']",
    ], done
