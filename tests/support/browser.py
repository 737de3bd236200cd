"""Dagster's UI as a person sees it, in a headless Chromium, and the same runs as its GraphQL endpoint tells them.

Knows the words on Dagster's pages; not what the jobs do, not how the processes behind the UI were started.
"""

import http.client
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.waiting import wait_until

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WITHIN_MS = 40_000

_STORY = """
query Story($id: ID!) {
  runOrError(runId: $id) { ... on Run { status } }
  logsForRun(runId: $id, limit: 1000) { ... on EventConnection { events {
    ... on MessageEvent { message eventType stepKey }
    ... on EngineEvent { metadataEntries { label ... on TextMetadataEntry { text } } }
  } } }
}
"""
_LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
  }
}
"""
_TERMINATE = """
mutation Terminate($ids: [String!]!) {
  terminateRuns(runIds: $ids, terminatePolicy: SAFE_TERMINATE) {
    ... on TerminateRunsResult { terminateRunResults { __typename } }
  }
}
"""
_RUNS = """
query Runs($filter: RunsFilter!) {
  runsOrError(filter: $filter, limit: 200) { ... on Runs { results { id status startTime endTime } } }
}
"""
_BACKFILL = """
mutation Backfill($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) { ... on LaunchBackfillSuccess { backfillId } }
}
"""
_START_SENSOR = """
mutation Start($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { ... on Sensor { sensorState { id status } } }
}
"""
_BACKFILL_STATUS = """
query Backfill($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }
"""


@contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    """One browser with a new, empty profile. While it is open this thread counts as inside an event loop."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass(frozen=True)
class Event:
    """One event of a run. `stage` is that of `dagster_taskiq.storage.engine_events`."""

    kind: str
    message: str
    step: str | None
    stage: str | None


@dataclass(frozen=True)
class Runs:
    """Run ids by status, and of those that have ever been started."""

    by_status: dict[str, list[str]]
    started: set[str]

    @property
    def counts(self) -> dict[str, int]:
        return {status: len(ids) for status, ids in self.by_status.items()}


class Dagster:
    """A webserver's GraphQL endpoint."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.address).netloc, timeout=60)
        try:
            body = json.dumps({"query": query, "variables": variables})
            connection.request("POST", "/graphql", body, {"Content-Type": "application/json"})
            answer = json.load(connection.getresponse())
        finally:
            connection.close()
        assert "errors" not in answer, answer["errors"]
        data: dict[str, Any] = answer["data"]
        return data

    def be_known(self) -> None:
        """Dagster greets whoever opens a new instance with a dialog that covers everything; not us."""
        self.ask("mutation { setNuxSeen }")

    def launch(self, location: str, job: str, **tags: str) -> str:
        """Start a run of a job with its default configuration."""
        selector = {
            "repositoryLocationName": location,
            "repositoryName": "__repository__",
            "jobName": job,
        }
        metadata = {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
        params = {"selector": selector, "runConfigData": {}, "mode": "default", "executionMetadata": metadata}
        launched = self.ask(_LAUNCH, params=params)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def terminate(self, run_id: str) -> None:
        """What the UI asks for when somebody terminates a run in the ordinary way."""
        results = self.ask(_TERMINATE, ids=[run_id])["terminateRuns"]["terminateRunResults"]
        assert {result["__typename"] for result in results} == {"TerminateRunSuccess"}, results

    def launch_backfill(self, location: str, job: str, partitions: list[str]) -> str:
        """Start a backfill of a job; Dagster's daemon makes its runs at its next tick."""
        repository = {"repositoryLocationName": location, "repositoryName": "__repository__"}
        selector = {"partitionSetName": f"{job}_partition_set", "repositorySelector": repository}
        params = {"selector": selector, "partitionNames": partitions}
        return str(self.ask(_BACKFILL, params=params)["launchPartitionBackfill"]["backfillId"])

    def start_sensor(self, location: str, sensor: str) -> str:
        """Turn a sensor on. Returns what it is called when it is turned off."""
        repository = {"repositoryLocationName": location, "repositoryName": "__repository__"}
        started = self.ask(_START_SENSOR, selector={"sensorName": sensor, **repository})["startSensor"]
        return str(started["sensorState"]["id"])

    def stop_sensor(self, state_id: str) -> None:
        self.ask("mutation Stop($id: String) { stopSensor(id: $id) { __typename } }", id=state_id)

    def backfill_status(self, backfill_id: str) -> str:
        return str(self.ask(_BACKFILL_STATUS, id=backfill_id)["partitionBackfillOrError"]["status"])

    def runs(self, **filters: Any) -> "Runs":
        """Runs by Dagster's own filter; all that ever were, without one."""
        results = self.ask(_RUNS, filter=filters)["runsOrError"]["results"]
        by_status: dict[str, list[str]] = {}
        for run in results:
            by_status.setdefault(run["status"], []).append(run["id"])
        # Dagster gives a run that has never started the time of its end.
        started = {run["id"] for run in results if run["startTime"] not in (None, run["endTime"])}
        return Runs(by_status, started)

    def status(self, run_id: str) -> str:
        return str(self.ask(_STORY, id=run_id)["runOrError"]["status"])

    def events(self, run_id: str) -> list[Event]:
        def stage(event: dict[str, Any]) -> str | None:
            entries = event.get("metadataEntries") or []
            return next((entry["text"] for entry in entries if entry["label"] == "dagster-taskiq/stage"), None)

        found = self.ask(_STORY, id=run_id)["logsForRun"]["events"]
        return [
            Event(event["eventType"] or "LOG", event["message"] or "", event["stepKey"], stage(event))
            for event in found
            if event
        ]

    def story(self, run_id: str) -> str:
        """All of it, for whoever reads why a test failed."""
        lines = [f"{event.kind} {event.step or ''}: {event.message[:160]}" for event in self.events(run_id)]
        return "\n".join([f"run {run_id} is {self.status(run_id)}", *lines])

    def wait_for_event(self, run_id: str, wanted: Callable[[Event], bool], what: str, within: float = 60) -> Event:
        found = wait_until(
            lambda: [event for event in self.events(run_id) if wanted(event)],
            f"{what} of run {run_id}",
            within=within,
            every=0.1,
            seen=lambda: self.story(run_id),
        )
        return found[0]

    def wait_for_status(self, run_id: str, status: str, within: float = 60) -> None:
        wait_until(
            lambda: self.status(run_id) == status,
            f"run {run_id} is {status}",
            within=within,
            every=0.1,
            seen=lambda: self.story(run_id),
        )


class Screen:
    """One tab that looks at Dagster's UI."""

    def __init__(self, page: Page, address: str, pictures: Path) -> None:
        self.page = page
        self.address = address
        self._pictures = pictures

    def open_run(self, run_id: str) -> None:
        self.page.goto(f"{self.address}/runs/{run_id}")

    def launch(self, location: str, job: str) -> str:
        """Open the job's launchpad and press its button; afterwards the page shows the run."""
        self.page.goto(f"{self.address}/locations/{location}/jobs/{job}/playground")
        self.page.get_by_role("button", name="Launch Run").click()
        self.page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}"))
        found = re.search(r"/runs/([0-9a-f-]{36})", self.page.url)
        assert found
        return found[1]

    def reads(self, status: str) -> None:
        """Wait until the run's badge says so."""
        expect(self.page.get_by_text(status, exact=True).first).to_be_visible()

    def says(self, words: str) -> None:
        """Wait until the page says so somewhere, among other words perhaps."""
        expect(self.page.get_by_text(words).first).to_be_visible()

    def terminate(self, *, force: bool = False) -> str:
        """Press *Terminate*, then confirm. Returns what the dialog said before that.

        Without `force` it fails where Dagster offers nothing else.
        """
        # Its accessible name begins with that of its icon.
        self.page.get_by_role("button", name=re.compile(r"\bTerminate$")).click()
        dialog = self.page.get_by_role("dialog")
        said_so = "Force termination for" if force else "Terminate"
        confirm = dialog.get_by_role("button", name=re.compile(rf"^{said_so} \d+ runs?$"))
        dialog.get_by_role("button", name=re.compile(r"\b\d+ runs?$")).wait_for()
        if force and not confirm.is_visible():
            # Its own <input> is invisible: people click the words.
            dialog.get_by_text("Force termination immediately").click()
        said = dialog.inner_text()
        self.picture("dialog")
        confirm.click()
        # It says "Done", and goes by itself as soon as the page knows that the run is over.
        return said

    def terminate_all(self, tab: str) -> str:
        """All runs of a tab, by the button above the list. Returns what the dialog said in the end.

        For runs in its own queue Dagster calls it force.
        """
        self.page.goto(f"{self.address}/runs")
        self.page.get_by_text(re.compile(rf"^{tab} \(\d+\)$")).click()
        self.page.get_by_role("button", name="Terminate all…").click()
        dialog = self.page.get_by_role("dialog")
        self.picture("dialog")
        words = "Force terminate all" if tab == "Queued" else "Terminate all"
        dialog.get_by_role("button", name=words, exact=True).click()
        dialog.get_by_role("button", name="Done").wait_for()
        said = dialog.inner_text()
        self.picture("terminated")
        dialog.get_by_role("button", name="Done").click()
        return said

    def cancel_backfill(self, backfill_id: str) -> None:
        """From the menu of its page."""
        self.page.goto(f"{self.address}/runs/b/{backfill_id}")
        self.page.get_by_role("button", name="expand_more").click()
        self.page.get_by_role("menuitem", name="Cancel backfill").click()
        dialog = self.page.get_by_role("dialog")
        self.picture("dialog")
        dialog.get_by_role("button", name="Cancel backfill").click()

    def picture(self, name: str) -> Path:
        path = self._pictures / f"{name}.png"
        self.page.screenshot(path=path)
        return path


@contextmanager
def screen(browser: Browser, address: str, pictures: Path, also: Callable[[], str]) -> Iterator[Screen]:
    """A new tab. What it shows when a test fails goes into the test's report, with what `also` says."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(WITHIN_MS)
    expect.set_options(timeout=WITHIN_MS)
    shown = Screen(page, address, pictures)
    try:
        yield shown
    except BaseException as error:
        error.add_note(f"the page ({page.url}, {shown.picture('failed')}) read:\n{page.inner_text('body')[:3000]}")
        error.add_note(also())
        raise
    finally:
        page.close()


def is_alive(pid: int) -> bool:
    """Whether there is such a process. One that has ended but was not reaped counts: nobody may leave it so."""
    return Path(f"/proc/{pid}").exists()
