"""Three fleets and two code locations, each with a package of its own: who executes what, who is told to stop, and what
becomes of work whose code its fleet does not have.

A worker sees the packages of its `PYTHONPATH` and no others, as a container sees those of its image. This process is
the code server of both locations.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from tests.acceptance.conftest import UNHURRIED, open_platform
from tests.support.platform import REAL_WORKER, Platform, WorkerProcess
from tests.support.waiting import wait_until

from dagster_taskiq.storage.engine_events import WORKER_KEY, Stage
from dagster_taskiq.storage.tags import QUEUE_TAG, ROUTE_TAG

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(180)]

SHARED = '''
"""What both packages use; each has a copy of its own, as a library that is installed in both images."""
import os, time
from pathlib import Path

import dagster as dg


def mark(context, text):
    fleet = os.environ["FLEET"]
    with Path(context.tags["marks"] if hasattr(context, "tags") else context.run_tags["marks"]).open("a") as file:
        file.write(f"{text} {fleet} {time.time()}\\n")


def work(context, seconds):
    key = context.get_step_execution_context().step.key
    try:
        mark(context, f"started {key}")
        time.sleep(seconds)
        mark(context, f"ended {key}")
    finally:
        mark(context, f"cleaned {key}")


def undo(context):
    mark(context, f"undone {context.step_key}")
'''

SHOP = """
import dagster as dg
from dagster_taskiq import on_cancel, taskiq_executor
from shop_code.shared import undo, work


def an_op(name, seconds):
    @on_cancel(undo)
    @dg.op(name=name, ins={"before": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
    def op(context):
        work(context, seconds)

    return op


def to(op, route):
    return op.tag({"dagster-taskiq/queue": route})


@dg.op(out=dg.Out(dg.Nothing))
def begin(context):
    work(context, 0)


@dg.job(executor_def=taskiq_executor)
def everywhere():
    trained = to(an_op("train", 0), "gpu")(begin())
    back = an_op("back", 0)(trained)
    stay, again, borrowed = an_op("stay", 300), an_op("again", 300), an_op("borrowed", 300)
    an_op("never", 0)([stay(back), to(again, "gpu")(back), to(borrowed, "forecasts")(back)])


defs = dg.Definitions(jobs=[everywhere])
"""

FORECASTS = """
import dagster as dg
from dagster_taskiq import on_cancel, taskiq_executor
from forecast_code.shared import undo, work


@on_cancel(undo)
@dg.op
def predict(context):
    work(context, 300)


@dg.job(executor_def=taskiq_executor)
def forecast():
    predict()


defs = dg.Definitions(jobs=[forecast])
"""


@dataclass
class Fleets:
    """Workers d (the unnamed route), g (gpu) and f (forecasts), each with its own packages."""

    platform: Platform

    def launch(self, location: str, package: str, job: str, tags: Mapping[str, str] | None = None) -> str:
        """As the code server of that location would have it."""
        recon = ReconstructableRepository.for_module(package, "defs").get_reconstructable_job(job)
        definition = recon.get_definition()
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(location), "__repository__")
        marks = self.platform.home / f"marks-{os.urandom(6).hex()}"
        run = self.platform.instance.create_run_for_job(
            definition,
            tags={"marks": str(marks), **(tags or {})},
            job_code_origin=recon.get_python_origin(),
            remote_job_origin=RemoteJobOrigin(repository, job),
        )
        self.platform.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        return run.run_id

    def marks(self, run_id: str, name: str) -> dict[str, str]:
        """Of the marks of that name: the fleet that has made it, by step."""
        marks = [mark.split() for mark in self.platform.marks(run_id)]
        return {step: fleet for text, step, fleet in marks if text == name}

    def wait_for(self, run_id: str, *steps: str) -> None:
        wait_until(
            lambda: {*steps} <= self.marks(run_id, "started").keys(),
            f"{steps} are at work",
            within=60,
            seen=lambda: self.platform.story(run_id),
        )


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of each package."""
    folders = {}
    for package, text in (("shop_code", SHOP), ("forecast_code", FORECASTS)):
        folder = tmp_path_factory.mktemp(package)
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(text)
        (folder / package / "shared.py").write_text(SHARED)
        folders[package] = str(folder)
    return folders


@pytest.fixture(scope="module")
def fleets(endpoint: str, packages: Mapping[str, str]) -> Iterator[Fleets]:
    """Only the cancel queues tell of cancels: the other channel is too slow."""
    slow = {"status_poll_seconds": 300, "cancel_ttl": 600}
    rules = {"routes": [{"route": "forecasts", "code_location": "forecasts"}]}
    shop, both = packages["shop_code"], os.pathsep.join(packages.values())
    with (
        open_platform(endpoint, source={**UNHURRIED, **slow, **rules}) as platform,
        pytest.MonkeyPatch.context() as own,
    ):
        own.setattr(sys, "path", [*sys.path, *packages.values()])
        for route in ("gpu", "forecasts"):
            platform.create_route(route)

        def fleet(name: str, route: str, path: str) -> AbstractContextManager[WorkerProcess]:
            env = {"PYTHONPATH": path, "FLEET": route}
            return platform.worker("-n", name, "-q", route, env=env, program=REAL_WORKER, ready=False)

        with (
            fleet("d", "default", shop) as first,
            fleet("g", "gpu", shop) as second,
            fleet("f", "forecasts", both) as third,
        ):
            for worker in (first, second, third):
                worker.wait_ready()
            yield Fleets(platform)


def test_one_run_goes_through_all_fleets_and_is_terminated_in_the_middle(fleets: Fleets) -> None:
    platform = fleets.platform
    shop = fleets.launch("shop", "shop_code", "everywhere")
    forecasts = fleets.launch("forecasts", "forecast_code", "forecast")
    fleets.wait_for(shop, "stay", "again", "borrowed")
    fleets.wait_for(forecasts, "predict")
    assert fleets.marks(shop, "ended") == {"begin": "default", "train": "gpu", "back": "default"}, "there and back"
    at_work = {"stay": "default", "again": "gpu", "borrowed": "forecasts"}
    assert fleets.marks(shop, "started") == fleets.marks(shop, "ended") | at_work
    assert fleets.marks(forecasts, "started") == {"predict": "forecasts"}
    assert [platform.run(run_id).tags[ROUTE_TAG] for run_id in (shop, forecasts)] == ["default", "forecasts"]

    for run_id in (shop, forecasts):
        assert platform.launcher.terminate(run_id)
    for run_id in (shop, forecasts):
        assert platform.finished(run_id) is DagsterRunStatus.CANCELED, platform.story(run_id)
        platform.assert_nothing_left(run_id)
    told = {note["step_key"]: note[WORKER_KEY][0] for note in platform.step_notes(shop, Stage.REACHED)}
    assert told == {"stay": "d", "again": "g", "borrowed": "f"}, "each over the cancel queue of its own route"
    assert fleets.marks(shop, "cleaned") == fleets.marks(shop, "started")
    undone = fleets.marks(shop, "undone")
    assert undone == dict.fromkeys(at_work, "default"), "handlers are called on the fleet of the run"
    assert fleets.marks(forecasts, "undone") == {"predict": "forecasts"}


def test_a_fleet_without_the_package_does_not_begin_with_it(fleets: Fleets) -> None:
    """Sent there by its tag, past the rule of its location."""
    platform = fleets.platform
    run_id = fleets.launch("forecasts", "forecast_code", "forecast", {QUEUE_TAG: "default"})
    assert platform.finished(run_id) is DagsterRunStatus.FAILURE
    (failure,) = platform.instance.all_logs(run_id, of_type=DagsterEventType.RUN_FAILURE)
    said = str(failure.dagster_event)
    why = r"no living worker can load code location 'forecasts': d\S*: no module named 'forecast_code'; "
    assert re.search(why, said), said
    assert platform.marks(run_id) == []
