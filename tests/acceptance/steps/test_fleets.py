"""Three fleets and two code locations, each with a package of its own: who executes what, who is told to stop, and what
becomes of work whose code its fleet does not have.

A worker sees the packages of its `PYTHONPATH` and no others, as a container sees those of its image. This process is
the code server of both locations; Dagster's UI has others of its own.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from playwright.sync_api import Request
from tests.acceptance.conftest import UNHURRIED, chromium_program, open_platform
from tests.support.browser import Dagster, chromium, is_alive, screen
from tests.support.moto import free_port
from tests.support.platform import REAL_WORKER, Platform, WorkerProcess
from tests.support.waiting import wait_until

from dagster_taskiq.local.process_manager import answers
from dagster_taskiq.process.child_handle import find_processes
from dagster_taskiq.storage.engine_events import WORKER_KEY, Stage
from dagster_taskiq.storage.tags import QUEUE_TAG, ROUTE_TAG

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.xdist_group("fleets"),
]

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

LOCATIONS = [
    {"location_name": "shop", "module_name": "shop_code"},
    {"location_name": "forecasts", "module_name": "forecast_code"},
]


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

    @contextmanager
    def webserver(self, paths: str, log: Path) -> Iterator[Dagster]:
        """Dagster's UI, with both code locations in code servers of its own."""
        workspace, port = self.platform.home / "workspace.yaml", free_port()
        workspace.write_text(yaml.safe_dump({"load_from": [{"python_module": one} for one in LOCATIONS]}))
        command = [sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(port), "-w", str(workspace)]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, env=self.platform.environ({"PYTHONPATH": paths}), stdout=out, stderr=subprocess.STDOUT
            )
        try:
            wait_until(
                lambda: answers(port, "/server_info") or process.poll() is not None,
                "the webserver answers",
                within=240,
                seen=log.read_text,
            )
            dagster = Dagster(f"http://127.0.0.1:{port}")
            dagster.be_known()
            yield dagster
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(40)

    def messages(self) -> dict[str, int]:
        """How many each queue holds, in flight or not."""
        routes = ("", "-gpu", "-forecasts")
        suffixes = [f"{route}{kind}" for route in routes for kind in ("", "-steps", "-cancels")]
        return {suffix: self.platform.waiting(suffix) for suffix in suffixes}

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


def terminates(request: Request) -> bool:
    return "terminateRuns(" in (request.post_data or "")


@pytest.mark.browser
@pytest.mark.long
@pytest.mark.timeout(480)
def test_a_click_on_terminate_stops_the_steps_on_all_fleets(
    fleets: Fleets, packages: Mapping[str, str], tmp_path: Path
) -> None:
    platform, log = fleets.platform, tmp_path / "webserver.log"
    run_id = fleets.launch("shop", "shop_code", "everywhere")
    with (
        fleets.webserver(os.pathsep.join(packages.values()), log) as dagster,
        chromium(chromium_program()) as browser,
        screen(browser, dagster.address, tmp_path, log.read_text) as shown,
    ):
        fleets.wait_for(run_id, "stay", "again", "borrowed")
        at_work = {"stay": "default", "again": "gpu", "borrowed": "forecasts"}
        steps = {pid for task_id in platform.step_tasks(run_id) for pid in find_processes(task_id)}
        assert len(steps) >= len(at_work)
        processes = {*platform.processes(run_id), *steps}
        shown.open_run(run_id)
        shown.reads("Started")  # what the dialog offers depends on what the page knows
        shown.picture("started")
        with shown.page.expect_request(terminates) as asked:
            shown.terminate()
        sent = asked.value.post_data_json or {}
        assert sent["variables"] == {"runIds": [run_id], "terminatePolicy": "SAFE_TERMINATE"}
        shown.reads("Canceled")
        assert not any(map(is_alive, processes)), "it reads Canceled, so the processes must be gone"
        platform.assert_nothing_left(run_id)
        assert fleets.marks(run_id, "cleaned") == fleets.marks(run_id, "started")
        assert fleets.marks(run_id, "ended") == {"begin": "default", "train": "gpu", "back": "default"}
        assert fleets.marks(run_id, "undone") == dict.fromkeys(at_work, "default")
        shown.picture("canceled")
        wait_until(lambda: not any(fleets.messages().values()), "all queues are empty", within=40, seen=fleets.messages)
        assert dagster.status(run_id) == "CANCELED"


@pytest.mark.timeout(300)
def test_a_fleet_without_the_package_does_not_begin_with_it(fleets: Fleets) -> None:
    """Sent there by its tag, past the rule of its location. It waits a minute for a worker that has the package."""
    platform = fleets.platform
    run_id = fleets.launch("forecasts", "forecast_code", "forecast", {QUEUE_TAG: "default"})
    assert platform.finished(run_id, within=150) is DagsterRunStatus.FAILURE, platform.story(run_id)
    (failure,) = platform.instance.all_logs(run_id, of_type=DagsterEventType.RUN_FAILURE)
    said = str(failure.dagster_event)
    why = r"no living worker can load code location 'forecasts': d\S*: no module named 'forecast_code'; "
    assert re.search(why, said), said
    assert platform.marks(run_id) == []
