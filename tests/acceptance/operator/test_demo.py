"""`dagster-taskiq demo` keeps its promise, and notices when a promise is not kept."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dagster import DagsterRunStatus
from tests.support.environment import clean_environment, processes_of
from tests.support.waiting import wait_until

from dagster_taskiq.local.demo import SCENES, Moment, complaints

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

DEMO = [sys.executable, "-m", "dagster_taskiq.cli", "demo"]


@pytest.mark.timeout(150)
def test_both_runs_end_canceled_with_nothing_left(tmp_path: Path) -> None:
    done = subprocess.run(
        DEMO, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "Both runs ended CANCELED, and none of their processes is left." in done.stdout
    first, second = done.stdout.split("ignores its interrupt")
    told = ["reached", "interrupting", "finally: rolled back", "finally: database closed", "tree gone", "CANCELED"]
    assert in_order(told, first), first
    assert in_order(["interrupting", "ignored: ", "killed", "tree gone", "CANCELED"], second), second
    assert processes_of(tmp_path) == {}
    assert list(tmp_path.glob("dagster-taskiq-*")) == [], "the temporary home stays behind"


def in_order(texts: list[str], whole: str) -> bool:
    return re.search(".*".join(map(re.escape, texts)), whole, re.DOTALL) is not None


def test_an_interrupted_demo_takes_everything_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(DEMO, env=clean_environment(tmp_path), stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "the op says" in line:
                break
        demo.send_signal(signal.SIGINT)
        demo.stdout.read()
        assert demo.wait(40) == 130
    wait_until(lambda: not processes_of(tmp_path), "everything is gone", seen=lambda: processes_of(tmp_path))


def test_a_broken_promise_is_noticed() -> None:
    polite, stubborn = SCENES
    kept = tuple(Moment(0, expected, expected) for expected in stubborn.must_show)
    canceled = DagsterRunStatus.CANCELED
    assert complaints(stubborn, canceled, {}, kept, accepted=True) == []
    assert complaints(stubborn, DagsterRunStatus.FAILURE, {}, kept, accepted=True) == [
        "the run is FAILURE, not CANCELED"
    ]
    assert complaints(stubborn, canceled, {4711: "sleep 300"}, kept, accepted=True) == [
        "still alive: pid 4711 (sleep 300)"
    ]
    assert complaints(stubborn, canceled, {}, kept, accepted=False) == ["terminate returned False"]
    assert len(complaints(polite, canceled, {}, (), accepted=True)) == len(polite.must_show)
    assert complaints(stubborn, canceled, {}, (*kept, kept[0]), accepted=True) == [
        f"{kept[0].what!r} happened 2 times instead of once"
    ]
