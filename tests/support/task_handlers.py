"""Cleanup handlers of plain taskiq tasks that another process can find by their names, and tasks for a process pool."""

import itertools
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from dagster_taskiq import TaskCleanupContext, on_cancel


def note(context: TaskCleanupContext, text: str) -> None:
    with Path(context.args[0]).open("a") as file:
        file.write(f"{text}\n")


def undo(context: TaskCleanupContext) -> None:
    """Says where it runs; fails at first."""
    note(context, f"undo {os.getpid()} {context.attempt} {dict(context.state)} {context.reason} {context.requested_by}")
    context.log.warning("undone by the handler, attempt %d", context.attempt)
    context.state["tried"] = context.attempt
    if context.attempt == 1:
        raise RuntimeError("not yet")


async def undo_in_the_loop(context: TaskCleanupContext) -> None:
    note(context, f"loop {os.getpid()}")


def takes_a_second(context: TaskCleanupContext) -> None:
    note(context, "begin")
    time.sleep(1)
    note(context, "end")


def sleeps(context: TaskCleanupContext) -> None:
    """Reacts to its timeout."""
    try:
        time.sleep(300)
    finally:
        note(context, "finally")


def stuck_in_c(context: TaskCleanupContext) -> None:
    """Reacts to nothing, and has started something."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    note(context, f"stuck {os.getpid()} {child.pid}")
    deque(itertools.repeat(None, 10**12), maxlen=0)


def exits(context: TaskCleanupContext) -> None:
    os._exit(7)


@on_cancel(undo)
def fails_in_a_pool(diary: str, go_on: str) -> None:
    """Cannot look at its token."""
    Path(diary).write_text("started\n")
    while not Path(go_on).exists():
        time.sleep(0.01)
    raise ValueError("in the pool")


fails_in_a_pool__taskiq_original = fails_in_a_pool
"""As taskiq calls it when it is registered, which the pool's process has not seen."""
