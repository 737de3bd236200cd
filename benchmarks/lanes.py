"""How long does a step wait that many others stand before: on a route that is preferred, and without a preference?

    make benchmark-lanes      # or: python -m benchmarks.lanes

300 steps wait on the unnamed route. When one worker, `-q urgent -q default`, with two slots for steps, has done ten of
them, two runs come at the same time: one of 20 steps on the route `urgent`, and one of 20 on the unnamed route. The
storage is SQLite; SQS is moto on loopback.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dagster import DagsterEventType
from tests.acceptance.conftest import open_platform
from tests.support.moto import CREDENTIALS, moto_server
from tests.support.platform import FINISHED, Platform

from benchmarks.lane_jobs import FEW, LOW

SETTINGS = {"wait_time_seconds": 20, "visibility_timeout_seconds": 60, "max_concurrent_steps": 2}
WITHIN_S = 1_500.0


@dataclass(frozen=True)
class Waits:
    """Of the steps of one run: from when they were sent until they began, in seconds."""

    waits: list[float]
    began: list[float]

    def described(self) -> str:
        ordered = sorted(self.waits)
        return f"median {median(ordered):.1f} s, longest {ordered[-1]:.1f} s"


def waits_of(platform: Platform, run_id: str) -> Waits:
    sent: dict[str, float] = {}
    began: dict[str, float] = {}
    for entry in platform.instance.all_logs(run_id):
        event = entry.dagster_event
        if event is None or event.step_key is None:
            continue
        if event.event_type is DagsterEventType.STEP_START:
            began[event.step_key] = entry.timestamp
        elif event.event_type is DagsterEventType.STEP_WORKER_STARTING:
            sent[event.step_key] = entry.timestamp
    return Waits([began[step] - sent[step] for step in sent], sorted(began.values()))


@contextmanager
def waiting(platform: Platform, count: int) -> Iterator[None]:
    wait_for(lambda: platform.waiting("-steps") >= count)
    yield


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < until, "too slow"
        time.sleep(0.5)


def main() -> None:
    """Measure and print."""
    os.environ.update(CREDENTIALS)
    with moto_server() as endpoint, open_platform(endpoint, source=SETTINGS) as platform:
        platform.jobs = Path(__file__).with_name("lane_jobs.py")
        platform.create_route("urgent")
        low = platform.launch("low")
        with (
            platform.worker("--runs-only", "--log-level", "WARNING"),
            waiting(platform, LOW),
            platform.worker("--steps-only", "-q", "urgent", "-q", "default", "--log-level", "WARNING") as worker,
        ):
            wait_for(lambda: platform.waiting("-steps") < LOW - 10)
            first, second = platform.launch("beside"), platform.launch("urgent")
            for run_id in (second, first, low):
                wait_for(lambda run_id=run_id: platform.status(run_id) in FINISHED)  # type: ignore[misc]
                assert platform.status(run_id).value == "SUCCESS", worker.log()
        measured = {name: waits_of(platform, run_id) for name, run_id in (("urgent", second), ("beside", first))}
        before = waits_of(platform, low).began
        each = (before[-1] - before[0]) / (len(before) - 1)
        print(f"one worker, {SETTINGS['max_concurrent_steps']} slots, a step begins every {each * 1000:.0f} ms;")
        print(f"{LOW} steps wait; then {FEW} come")
        print(f"with preference (-q urgent -q default): {measured['urgent'].described()}")
        print(f"without, in the same queue as the others: {measured['beside'].described()}")
        began = measured["urgent"].began
        meanwhile = sum(began[0] < one < began[-1] for one in before)
        print(f"of the others, began between the first and the last urgent one: {meanwhile}")


if __name__ == "__main__":
    main()
