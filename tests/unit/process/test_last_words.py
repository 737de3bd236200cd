"""A process whose stdout and stderr lead nowhere ends as it would have ended otherwise."""

import os
import subprocess
import sys

import pytest

LEAVES = "from dagster_taskiq.process.shim import live_and_leave; live_and_leave(lambda: print('x') or {code})"
HANDLES = """
from dagster_taskiq._last_words import print_traceback
try:
    raise ValueError("on purpose")
except ValueError:
    print_traceback()
import os
os._exit(7)
"""


@pytest.mark.parametrize(("code", "ends"), [(LEAVES.format(code=0), 0), (LEAVES.format(code=3), 3), (HANDLES, 7)])
def test_of_a_terminal_that_is_gone(code: str, ends: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], env=buffered, stdout=writer, stderr=writer, check=False, timeout=60
        )
    finally:
        os.close(writer)
    assert ended.returncode == ends
