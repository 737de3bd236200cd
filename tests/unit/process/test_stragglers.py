"""Processes of a child whose shim was killed: they are killed, and nobody waits for ever for one that stays."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from dagster_taskiq.process import child_handle, shim


@pytest.fixture
def straggler() -> Iterator["subprocess.Popen[bytes]"]:
    environment = {**os.environ, shim.MARK_VARIABLE: uuid.uuid4().hex}
    program = "import signal; print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.mark = environment[shim.MARK_VARIABLE]  # type: ignore[attr-defined]
        yield process
        process.kill()


def test_a_process_that_hangs_in_the_kernel_is_named_and_left(
    straggler: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[tuple[int, int]] = []
    with monkeypatch.context() as kernel:
        kernel.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))  # which does not let go of it
        kernel.setattr(child_handle, "KILLED_WITHIN_S", 0)  # on a busy machine one look takes longer than all of it
        child_handle._kill_stragglers(straggler.pid, straggler.mark)  # type: ignore[attr-defined]
    assert (straggler.pid, signal.SIGKILL) in sent
    assert straggler.poll() is None
    (said,) = caplog.messages
    assert said.startswith("processes of a child hang in the kernel")
    assert f"[{straggler.pid}]" in said
