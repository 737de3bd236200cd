"""A person clicks *Terminate* in Dagster's own UI, and everything behind it is what `dagster-taskiq dev` starts."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser
from tests.acceptance.conftest import missing
from tests.acceptance.operator.test_dev import Dev, dev
from tests.support.browser import Dagster, Event, Screen, chromium, is_alive, screen
from tests.support.environment import clean_environment, processes_of
from tests.support.moto import sqs_client
from tests.support.waiting import wait_until

from dagster_taskiq.local.dev import EXAMPLES
from dagster_taskiq.queue_names import cancel_queue_url
from dagster_taskiq.storage.engine_events import CANCELLATION_REQUESTED, Stage

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("browser"),
]

JOB = "index_sources"  # works for more than a minute on what is installed here, and says how far it is
SLOTS = 10  # so many runs at a time are launched by Dagster's own queue when nothing else is configured


@dataclass
class Served:
    """A `dagster-taskiq dev` whose UI answers."""

    dev: Dev
    home: Path
    environment: dict[str, str]
    dagster: Dagster

    def messages(self) -> dict[str, int]:
        """How many messages each queue holds, visible or not."""
        launcher = yaml.safe_load((self.home / "dagster.yaml").read_text())["run_launcher"]["config"]
        client = sqs_client(launcher["endpoint_url"])
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = {}
        for url in (launcher["queue_url"], cancel_queue_url(launcher["queue_url"])):
            answer = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
            found[url.rpartition("/")[2]] = sum(int(answer[name]) for name in names)
        client.close()
        return found

    def queues_are_empty(self) -> None:
        """The worker deletes a run's message when it is done with the run, and not before."""
        wait_until(lambda: not any(self.messages().values()), "all queues are empty", within=40, seen=self.messages)

    @contextmanager
    def worker(self) -> Iterator[None]:
        """Start another worker with the very line that `dev` prints for it."""
        line = self.dev.told(r"another worker: (.*)")
        words = shlex.split(line)
        program = words.index("dagster-taskiq")
        variables = dict(word.split("=", 1) for word in words[:program])
        command = [sys.executable, "-m", "dagster_taskiq.cli", *words[program + 1 :]]
        log = self.home.parent / "worker.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=self.environment | variables, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            wait_until(
                lambda: re.search(r"^worker .* ready", log.read_text(), re.MULTILINE) or process.poll() is not None,
                "a ready worker",
                within=60,
                seen=log.read_text,
            )
            assert process.poll() is None, log.read_text()
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[Served]:
    """`dagster-taskiq dev` with the example jobs; ended by one Ctrl-C, after which nothing of it is left."""
    home = folder / "home"
    with dev(folder, "--dagster-home", str(home), *arguments) as running:
        dagster = Dagster(running.told(r"Dagster's UI: (\S+)"))
        dagster.be_known()
        yield Served(running, home, clean_environment(folder), dagster)
        assert running.process.poll() is None, running.say()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(50) == 0, running.say()
        assert not processes_of(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        missing("no Chromium (apt-get install chromium)")
    with chromium(str(executable)) as browser:
        yield browser


@pytest.fixture(scope="module")
def without_worker(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("no-worker"), "--no-worker") as it:
        yield it


@pytest.fixture
def at_work(without_worker: Served) -> Iterator[Served]:
    """The same, with a worker: Dagster's own processes take far longer to start than one of those."""
    with without_worker.worker():
        yield without_worker


@contextmanager
def ui(browser: Browser, it: Served, pictures: Path) -> Iterator[Screen]:
    with screen(browser, it.dagster.address, pictures, it.dev.say) as shown:
        yield shown


def is_indexing(event: Event) -> bool:
    return event.step == "index_text" and event.message.startswith("indexed ")


def launch_and_see_it_work(shown: Screen, it: Served) -> tuple[str, int]:
    """Launch the job in the UI and wait until its op says that it is in the middle of its work: run and pid."""
    run_id = shown.launch(EXAMPLES, JOB)
    it.dagster.wait_for_event(run_id, is_indexing, "the op's own message")
    started = it.dagster.wait_for_event(run_id, lambda event: "Started process for run" in event.message, "the process")
    found = re.search(r"\(pid: (\d+)\)", started.message)
    assert found, started
    pid = int(found[1])
    assert is_alive(pid)
    shown.reads("Started")  # what the dialog offers depends on what the page knows
    return run_id, pid


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def place(events: list[Event], stage: Stage) -> int:
    return [event.stage for event in events].index(stage)


def test_a_click_on_terminate_stops_the_run(browser: Browser, at_work: Served, tmp_path: Path) -> None:
    with ui(browser, at_work, tmp_path) as shown:
        run_id, pid = launch_and_see_it_work(shown, at_work)
        shown.picture("started")
        shown.terminate()
        shown.reads("Canceled")
        assert not is_alive(pid), "it reads Canceled, so the process must be gone"
        shown.picture("canceled")
        events = at_work.dagster.events(run_id)
        canceled = kinds(events).index("RUN_CANCELED")
        assert place(events, Stage.REQUESTED) < canceled
        assert place(events, Stage.TREE_GONE) < canceled
        assert events[place(events, Stage.REQUESTED)].message == CANCELLATION_REQUESTED
        assert events[place(events, Stage.TREE_GONE)].message.startswith("process tree gone after")
        assert [event.message for event in events].count("finally: database closed") == 1
        at_work.queues_are_empty()
        assert at_work.dagster.status(run_id) == "CANCELED"


def test_force_termination_stops_the_run_as_well(browser: Browser, at_work: Served, tmp_path: Path) -> None:
    """Dagster asks the launcher as well, but marks the run without waiting for it."""
    with ui(browser, at_work, tmp_path) as shown:
        run_id, pid = launch_and_see_it_work(shown, at_work)
        shown.terminate(force=True)
        shown.reads("Canceled")
        shown.picture("canceled")
        at_work.dagster.wait_for_event(run_id, lambda event: event.stage == Stage.TREE_GONE, "the end of the tree")
        assert not is_alive(pid)
        at_work.queues_are_empty()
        events = at_work.dagster.events(run_id)
        assert [event.message for event in events].count("finally: database closed") == 1
        assert not {"RUN_SUCCESS", "RUN_FAILURE"} & set(kinds(events))
        assert at_work.dagster.status(run_id) == "CANCELED"
        shown.page.reload()
        shown.reads("Canceled")
        shown.picture("canceled-afterwards")


def was_never_started(it: Served, run_id: str) -> None:
    events = it.dagster.events(run_id)
    assert it.dagster.status(run_id) == "CANCELED", it.dagster.story(run_id)
    assert Stage.PICKED_UP not in [event.stage for event in events], it.dagster.story(run_id)
    assert not {"RUN_START", "STEP_START"} & set(kinds(events)), it.dagster.story(run_id)


def test_a_run_that_waits_for_a_worker_is_never_started(
    browser: Browser, without_worker: Served, tmp_path: Path
) -> None:
    with ui(browser, without_worker, tmp_path) as shown:
        run_id = shown.launch(EXAMPLES, JOB)
        without_worker.dagster.wait_for_event(run_id, lambda event: event.stage == Stage.SUBMITTED, "the message")
        shown.reads("Starting")
        assert sum(without_worker.messages().values()) == 1
        shown.terminate()
        shown.reads("Canceled")
        shown.picture("canceled")
        with without_worker.worker():
            without_worker.queues_are_empty()
        was_never_started(without_worker, run_id)


def test_a_run_that_waits_for_dagster_to_launch_it_is_never_started(
    browser: Browser, without_worker: Served, tmp_path: Path
) -> None:
    dagster = without_worker.dagster
    others = [dagster.launch(EXAMPLES, JOB) for _ in range(SLOTS)]
    for run_id in others:
        dagster.wait_for_event(run_id, lambda event: event.stage == Stage.SUBMITTED, "the message")
    with ui(browser, without_worker, tmp_path) as shown:
        queued = shown.launch(EXAMPLES, JOB)
        shown.reads("Queued")
        shown.terminate()
        shown.reads("Canceled")
        shown.picture("canceled")
    dagster.mark_canceled(others)
    with without_worker.worker():
        without_worker.queues_are_empty()
    for run_id in (queued, *others):
        was_never_started(without_worker, run_id)
    assert Stage.SUBMITTED not in [event.stage for event in dagster.events(queued)]
