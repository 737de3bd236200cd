"""What becomes of lines that are no JSON objects."""

import json
import subprocess
import sys

import pytest

from dagster_taskiq.process.output_collector import json_lines

AT = 1_764_382_404.5
EVENT = "2026-11-29 02:10:58 +0000 - dagster - ERROR - a_job - 1dc80e42-cefb-4add-9b4e-77c668a79ced - 87 - STEP_FAILURE"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"one\ntwo\r", [("INFO", "one"), ("INFO", "two")]),
        (b"\n  \n", []),
        (b"note:\n  more of it\nnext", [("INFO", "note:\n  more of it"), ("INFO", "next")]),
        (
            b"Traceback (most recent call last):\n  File x\nKeyError: y",
            [("ERROR", "Traceback (most recent call last):\n  File x\nKeyError: y")],
        ),
        (
            f"{EVENT} - failed\n\nStack Trace:\n  File x\n{EVENT} - again".encode(),
            [
                ("ERROR", f"{EVENT[46:]} - failed\n\nStack Trace:\n  File x"),
                ("ERROR", f"{EVENT[46:]} - again"),
            ],
        ),
    ],
)
def test_what_was_written_together_is_one_object(written: bytes, expected: list[tuple[str, str]]) -> None:
    found = [json.loads(line) for line in json_lines(written.split(b"\n"), "stdout", AT)]
    assert [(one["level"], one["message"]) for one in found] == expected


def test_an_object_passes_unchanged_and_whatever_else_is_json_does_not() -> None:
    lines = [b'{"a":1 }', b"[1]", b"{", b"1"]
    assert json_lines(lines, "stdout", AT)[0] == b'{"a":1 }\n'
    assert [json.loads(line)["message"] for line in json_lines(lines, "stdout", AT)[1:]] == ["[1]", "{", "1"]


def test_of_an_event_of_dagsters_the_run_is_named() -> None:
    (line,) = json_lines([EVENT.encode()], "stderr", AT)
    assert json.loads(line)["run_id"] == "1dc80e42-cefb-4add-9b4e-77c668a79ced"
    assert json.loads(line)["logger"] == "dagster"


NO_MEMORY = """
import os, signal, sys, time
from dagster_taskiq.process.output_collector import OutputCollector

collector = OutputCollector()
killed, python, sys.executable = collector._process, sys.executable, "/nowhere"
os.kill(killed.pid, signal.SIGKILL)
while killed.poll() is None:
    time.sleep(0.01)
print("said meanwhile", flush=True)
sys.executable = python
while collector._process is killed:
    time.sleep(0.01)
collector.finish()
"""


def test_a_collector_that_cannot_be_replaced_now_is_replaced_later() -> None:
    ended = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["message"] == "said meanwhile"
