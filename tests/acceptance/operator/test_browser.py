"""A person clicks *Terminate* in Dagster's own UI, and everything behind it is what `dagster-taskiq dev` starts."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from dagster import DagsterInstance
from playwright.sync_api import Browser
from tests.acceptance.conftest import chromium_program
from tests.acceptance.operator.test_dev import Dev, dev
from tests.support import browser_jobs
from tests.support.browser import Dagster, Event, Screen, chromium, is_alive, screen
from tests.support.browser_jobs import DAYS, FILE
from tests.support.environment import clean_environment, processes_of
from tests.support.moto import sqs_client
from tests.support.pages import blocks
from tests.support.waiting import wait_until

from dagster_taskiq.queue_names import cancel_queue_url
from dagster_taskiq.storage.engine_events import CANCELLATION_REQUESTED, Stage
from dagster_taskiq.storage.tags import TASK_ID_TAG

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("browser"),
]

JOB = "enters"  # works for ten minutes, and says how far it is
JOBS = Path(browser_jobs.__file__)
WAITS = "waits"
SLOTS = 4
FROM_HERE = "From Dagster's UI or API"


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
    with chromium(chromium_program()) as browser:
        yield browser


@pytest.fixture(scope="module")
def without_worker(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("no-worker"), "--no-worker", "-f", str(JOBS)) as it:
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


def is_entering(event: Event) -> bool:
    return event.step == "enter_for_ever" and event.message.startswith("entered ")


def launch_and_see_it_work(shown: Screen, it: Served) -> tuple[str, int]:
    """Launch the job in the UI and wait until its op says that it is in the middle of its work: run and pid."""
    run_id = shown.launch(FILE, JOB)
    it.dagster.wait_for_event(run_id, is_entering, "the op's own message")
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
        shown.says(f"{CANCELLATION_REQUESTED} {FROM_HERE}")
        shown.says("stopped: run terminated from Dagster's UI or API")
        shown.says("in enter_for_ever")
        shown.picture("canceled")
        body = shown.page.inner_text("body")
        assert "site-packages/dagster" not in body, body
        events = at_work.dagster.events(run_id)
        canceled = kinds(events).index("RUN_CANCELED")
        assert place(events, Stage.REQUESTED) < canceled
        assert place(events, Stage.TREE_GONE) < canceled
        assert events[place(events, Stage.REQUESTED)].message == f"{CANCELLATION_REQUESTED} {FROM_HERE}"
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


def test_runs_that_wait_are_never_started(browser: Browser, without_worker: Served, tmp_path: Path) -> None:
    """One in Dagster's queue, by the ordinary way; and the one of the look-ahead, for which its page has the force."""
    dagster = without_worker.dagster
    with ui(browser, without_worker, tmp_path) as shown:
        handed_over = shown.launch(FILE, JOB)
        dagster.wait_for_event(handed_over, lambda event: event.stage == Stage.SUBMITTED, "the message")
        shown.reads("Starting")
        queued = shown.launch(FILE, JOB)
        shown.reads("Queued")
        shown.terminate()
        shown.reads("Canceled")
        shown.picture("canceled")
        assert sum(without_worker.messages().values()) == 1
        shown.open_run(handed_over)
        shown.reads("Starting")
        shown.terminate(force=True)
        shown.reads("Canceled")
        with without_worker.worker():
            without_worker.queues_are_empty()
        for run_id in (queued, handed_over):
            was_never_started(without_worker, run_id)
        assert Stage.SUBMITTED not in [event.stage for event in dagster.events(queued)]


def test_a_program_terminates_a_run_over_graphql(without_worker: Served, tmp_path: Path) -> None:
    """As `docs/cancel-from-anywhere.md` says."""
    dagster = without_worker.dagster
    run_id = dagster.launch(FILE, WAITS)
    dagster.wait_for_event(run_id, lambda event: event.stage == Stage.SUBMITTED, "the message")
    environ = clean_environment(tmp_path) | {"DAGSTER_URL": dagster.address, "RUN_ID": run_id}
    stop, tags = (one.text for one in blocks("docs/cancel-from-anywhere.md", "bash") if "graphql" in one.text)

    def answer(script: str) -> str:
        return subprocess.run(["bash", "-ec", script], env=environ, check=True, capture_output=True, text=True).stdout

    assert TASK_ID_TAG in answer(tags)
    assert "TerminateRunSuccess" in answer(stop)
    assert "TerminateRunFailure" in answer(stop)
    with without_worker.worker():
        without_worker.queues_are_empty()
    was_never_started(without_worker, run_id)


def at_work_on(it: Served, **filters: object) -> set[str]:
    """Wait until all slots are busy with runs of that filter, and one more is handed over; those that have started."""

    def looks() -> dict[str, int]:
        counts = it.dagster.runs(**filters).counts
        return {status: counts.get(status, 0) for status in ("STARTED", "STARTING")}

    wait_until(lambda: looks() == {"STARTED": SLOTS, "STARTING": 1}, "all slots are busy", within=90, seen=looks)
    started = it.dagster.runs(**filters).started
    assert len(started) == SLOTS
    return started


def all_are_canceled(it: Served, many: int, started: set[str], **filters: object) -> None:
    def counts() -> dict[str, int]:
        return it.dagster.runs(**filters).counts

    wait_until(lambda: counts() == {"CANCELED": many}, "all are canceled", within=90, seen=counts)
    assert it.dagster.runs(**filters).started == started, "nothing has started after the click"


@pytest.mark.long
def test_terminate_all_stops_what_runs_and_what_waits(browser: Browser, at_work: Served, tmp_path: Path) -> None:
    many = 50
    ids = [at_work.dagster.launch(FILE, WAITS) for _ in range(many)]
    started = at_work_on(at_work, runIds=ids)
    with ui(browser, at_work, tmp_path) as shown:
        for tab, its_runs in (("Queued", many - SLOTS - 1), ("In progress", SLOTS + 1)):
            said = shown.terminate_all(tab)
            assert f"{its_runs} runs" in said, said
            assert "could not" not in said.lower(), said
        all_are_canceled(at_work, many, started, runIds=ids)
    at_work.queues_are_empty()


def last_launched(instance: DagsterInstance, backfill_id: str) -> str | None:
    backfill = instance.get_backfill(backfill_id)
    return backfill.last_submitted_partition_name if backfill is not None else None


@pytest.mark.long
def test_a_cancelled_backfill_starts_nothing_more(browser: Browser, at_work: Served, tmp_path: Path) -> None:
    """Dagster's daemon terminates its runs half a minute later. Meanwhile slots become free."""
    backfill_id = at_work.dagster.launch_backfill(FILE, WAITS, DAYS)
    its_runs = {"tags": [{"key": "dagster/backfill", "value": backfill_id}]}
    started = at_work_on(at_work, **its_runs)
    wait_until(lambda: sum(at_work.dagster.runs(**its_runs).counts.values()) == len(DAYS), "all are launched")
    # Dagster's daemon writes the backfill once more after that, as it has read it before, and a click in between is
    # lost: `cancel_backfill` looks again, Dagster's UI does not.
    with DagsterInstance.from_config(str(at_work.home)) as instance:
        wait_until(lambda: last_launched(instance, backfill_id) == DAYS[-1], "the daemon's turn with it is over")
    with ui(browser, at_work, tmp_path) as shown:
        shown.cancel_backfill(backfill_id)
        wait_until(lambda: at_work.dagster.backfill_status(backfill_id) != "REQUESTED", "the click has arrived")
        at_work.dagster.terminate(min(started))
        all_are_canceled(at_work, len(DAYS), started, **its_runs)
        shown.reads("Canceled")
        shown.picture("canceled")
    at_work.queues_are_empty()


@pytest.mark.long
@pytest.mark.nightly  # its parts are tested one by one
def test_the_bakery_does_in_dev_what_its_page_says(at_work: Served) -> None:
    dagster, bakery = at_work.dagster, at_work.home / "bakery"
    day = {"dagster/partition": "2025-01-07"}
    cancelled = dagster.launch(FILE, "day", **day)
    dagster.wait_for_event(cancelled, lambda event: event.message.startswith("received "), "a page")
    dagster.terminate(cancelled)
    dagster.wait_for_status(cancelled, "CANCELED")
    assert any(event.message.startswith("removed ") for event in dagster.events(cancelled)), dagster.story(cancelled)
    assert list((bakery / "receipts").iterdir()) == []
    dagster.wait_for_status(dagster.launch(FILE, "day", **day), "SUCCESS")
    assert "| Market | 500 |" in (bakery / "reports" / "2025-01-07.md").read_text()
    dagster.wait_for_status(dagster.launch(FILE, "audit"), "SUCCESS")
    sensor = dagster.start_sensor(FILE, "inbox")
    (bakery / "inbox").mkdir(exist_ok=True)
    (bakery / "inbox" / "2025-01-07.csv").write_text("Market,pretzel,10,1100\n")

    def entered() -> dict[str, int]:
        return dagster.runs(tags=[{"key": "dagster/sensor_name", "value": "inbox"}]).counts

    wait_until(lambda: entered() == {"SUCCESS": 1}, "the day is entered again", within=120, seen=entered)
    dagster.stop_sensor(sensor)
    assert "| Market | 501 |" in (bakery / "reports" / "2025-01-07.md").read_text()
    at_work.queues_are_empty()
