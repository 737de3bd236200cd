"""Late steps: what cannot be killed, or has just ended by itself, keeps nobody waiting and ends nobody."""

import asyncio
import os
import subprocess
import sys

import pytest
from tests.support.eventually import eventually

from dagster_taskiq.process import procfs, step_timers
from dagster_taskiq.process.child_handle import Child, ChildSpec
from dagster_taskiq.process.shim import _EndingStep, _Shim
from dagster_taskiq.process.step_timers import LateStep, StepTimers


class Cleaning:
    """An observer that remembers whose handlers are due."""

    def __init__(self) -> None:
        self.cleaned: list[str] = []

    def step_interrupting(self, step: LateStep, grace_s: float) -> None: ...

    def step_killing(self, step: LateStep, waited_s: float, shield: str | None) -> None: ...

    async def clean_up(self, step: LateStep) -> None:
        self.cleaned.append(step.name)


def test_the_handlers_of_a_late_step_run_although_what_it_has_started_hangs_in_the_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_timers, "KILLED_WITHIN_S", 0.1)

    async def test() -> None:
        loop, cleaning = asyncio.get_running_loop(), Cleaning()
        spec = ChildSpec("", None, "mark", grace_s=5, exit_patience_s=60, cancelled_exit_patience_s=5)
        child = Child(os.getpid(), spec, loop.create_future(), loop.create_future())  # it has no shim that answers
        timers = StepTimers(child, cleaning, lambda: 60)
        facts = {"name": "n", "step_key": "s", "pid": child.pid, "reason": "late", "run_id": "r", "mark": "m=n"}
        child.on_step("step_limit", {**facts, "handlers": True, "seconds": 0})
        await eventually(lambda: timers.any_late, "it is late", within=5)
        child.on_step("step_stopped", "n")
        await eventually(lambda: cleaning.cleaned, "its handlers run", within=5)
        await timers.settled()

    asyncio.run(test())
    assert "processes of a late step cannot be killed; going on without them" in caplog.messages


def test_a_process_that_ends_at_the_moment_in_which_it_is_killed_does_not_end_its_shim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_alive = procfs.is_alive
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:

        def ends_just_now(pid: int) -> bool:
            was_alive = is_alive(pid)
            if pid == process.pid:
                process.kill()
                process.wait()
            return was_alive

        shim = _Shim(0, None, grace_s=1, linger_s=1, hung_after_s=0)  # type: ignore[arg-type]
        shim._ending["n"] = _EndingStep(process.pid, "mark=n")
        monkeypatch.setattr(procfs, "is_alive", ends_just_now)
        shim._kill_steps()
