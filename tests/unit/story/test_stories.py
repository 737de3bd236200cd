"""What is told of runs: of event logs that real runs have written, and at each moment of them."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance
from rich.console import Console
from tests.support.run_logs import LOGS, replay

from dagster_taskiq.storage.tags import CANCEL_REASON_TAG, CANCELLED_BY_TAG, TASK_ID_TAG
from dagster_taskiq.story.html import html_of
from dagster_taskiq.story.log import Log, read_log
from dagster_taskiq.story.model import BarKind, Outcome, Story, Wait, as_json, with_most_steps
from dagster_taskiq.story.steps import most_important
from dagster_taskiq.story.surroundings import Surroundings
from dagster_taskiq.story.svg import svg_of
from dagster_taskiq.story.tell import STATUSES, RunFacts, tell
from dagster_taskiq.story.terminal import print_story

NAMES = sorted(path.stem for path in LOGS.glob("*.json"))
FINAL = {"SUCCESS", "FAILURE", "CANCELED"}


@cache
def replayed(name: str) -> tuple[RunFacts, Log]:
    """What is read of a run when all has happened."""
    with DagsterInstance.ephemeral() as instance:
        run = replay(instance, name)
        record = instance.get_run_record_by_id(run.run_id)
        assert record is not None
        log = read_log(instance, run.run_id, lambda events: most_important(events, 200))
    facts = RunFacts(
        run.run_id,
        run.job_name,
        run.status.value,
        record.create_timestamp.timestamp(),
        started=record.start_time,
        ended=record.end_time,
        task_id=run.tags.get(TASK_ID_TAG),
        reason=run.tags.get(CANCEL_REASON_TAG),
        cancelled_by=run.tags.get(CANCELLED_BY_TAG),
    )
    return facts, log


def story_of(name: str, until: int | None = None, **around: Any) -> Story:
    """After so many of the events that are read; default: after all of them."""
    facts, log = replayed(name)
    events = log.events[:until]
    status = ([STATUSES[event.kind] for event in events if event.kind in STATUSES] or ["NOT_STARTED"])[-1]
    now = max([event.at for event in events], default=facts.created) + 1
    ended = facts.ended if status in FINAL else None
    return tell(replace(facts, status=status, ended=ended), replace(log, events=events), Surroundings(now, **around))


def parsed(picture: str) -> ET.Element:
    return ET.fromstring(picture.encode())  # noqa: S314 - our own


def outcomes(story: Story, kind: BarKind) -> list[tuple[str, int, str]]:
    return [(bar.label, bar.attempt, bar.outcome.value) for bar in story.bars if bar.kind is kind]


def on_a_terminal(story: Story, width: int) -> str:
    written = StringIO()
    print_story(story, Console(file=written, width=width))
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "status", "steps", "says"),
    [
        (
            "cancelled",
            "CANCELED",
            ["cancelled"],
            [
                "Cancelled by ada@host, because: wrong <b>input</b> file.",
                "Cancellation reached worker",
                "SIGTERM to pid",
            ],
        ),
        ("killed", "CANCELED", ["killed"], ["It ignored SIGTERM: pid", "Had to be killed: main process["]),
        ("succeeded", "SUCCESS", ["succeeded"], ["Steps: 1 succeeded."]),
        ("failed", "FAILURE", ["failed"], ["Failed: RuntimeError: as it should"]),
        ("out_of_memory", "FAILURE", ["killed"], ["was killed by SIGKILL, likely out of memory"]),
        ("processes_cancelled", "CANCELED", ["cancelled", "cancelled"], ["Steps: 2 cancelled."]),
        (
            "steps_cancelled",
            "CANCELED",
            ["cancelled", "cancelled"],
            ["because: wrong day", "The last process was"],
        ),
        ("not_cleaned_up", "FAILURE", ["cancelled"], ["Cleanup failed: always_fails of cannot_be_cleaned_up"]),
        ("cleaned_up", "CANCELED", ["cancelled"], ["handlers succeeded."]),
        ("worker_dead", "FAILURE", ["interrupted"], ["Worked on by first-", ", then second-", "is gone"]),
    ],
)
def test_what_happened(name: str, status: str, steps: list[str], says: list[str]) -> None:
    story = story_of(name)
    assert story.status == status
    assert [outcome for _, _, outcome in outcomes(story, BarKind.STEP)] == steps
    told = "\n".join(story.summary)
    for words in says:
        assert words in told, told
    assert story.waits == ()
    assert all(bar.ended is not None for bar in story.bars)


def test_an_end_that_can_be_mended_says_how() -> None:
    assert "run cleanup" in "".join(story_of("not_cleaned_up").advice)
    assert "memory" in "".join(story_of("out_of_memory").advice)
    assert "grace" in "".join(story_of("killed").advice)
    assert "max_resume_run_attempts" in "".join(story_of("worker_dead").advice)
    (goes_on,) = story_of("cancelled").advice
    assert goes_on.endswith(f"dagster-taskiq run reexecute {story_of('cancelled').run_id[:8]}")
    assert story_of("succeeded").advice == ()


def test_each_attempt_of_a_cleanup_handler_is_a_bar() -> None:
    bars = outcomes(story_of("not_cleaned_up"), BarKind.CLEANUP)
    of = "of cannot_be_cleaned_up"
    assert (f"undo {of}", 1, "succeeded") in bars
    assert (f"fails_until_mended {of}", 1, "failed") in bars
    assert (f"fails_until_mended {of}", 2, "failed") in bars


def test_what_a_worker_of_a_run_that_was_taken_over_has_done_is_lost() -> None:
    work = outcomes(story_of("worker_dead"), BarKind.WORK)
    assert [outcome for _, _, outcome in work] == ["lost", "failed"]


def test_a_step_waits_for_its_worker_before_it_begins() -> None:
    story = story_of("steps_cancelled")
    for bar in story.bars:
        if bar.kind is BarKind.STEP:
            assert bar.waited_since is not None
            assert bar.waited_since < bar.began
            assert bar.worker is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_story_can_be_told_at_every_moment(name: str) -> None:
    """Of what has been written so far: it is over exactly when the run is."""
    for until in range(len(replayed(name)[1].events) + 1):
        story = story_of(name, until)
        assert story.status not in FINAL or all(bar.ended is not None for bar in story.bars), (until, story.bars)
        assert on_a_terminal(story, 80)
        parsed(svg_of(story))


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", NAMES)
def test_it_fits_into_the_terminal(name: str, width: int) -> None:
    lines = on_a_terminal(story_of(name), width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("\x1b" in line for line in lines), "a pipe has no colours"
    assert not any(line != line.rstrip() for line in lines if "│" not in line)


def test_without_unicode_it_is_drawn_with_other_signs() -> None:
    written = BytesIO()
    file = TextIOWrapper(written, encoding="ascii", write_through=True)
    print_story(story_of("killed"), Console(file=file, width=80))
    assert "####" in written.getvalue().decode("ascii")


SCRIPT = "<script>alert(1)</script>&\x00\x1b[31m\ud800"


def test_what_others_have_written_is_no_markup() -> None:
    story = story_of("failed")
    bars = tuple(replace(bar, label=SCRIPT, note=SCRIPT, worker=SCRIPT) for bar in story.bars)
    moments = tuple(replace(moment, text=SCRIPT, step_key=SCRIPT) for moment in story.moments)
    story = replace(story, job=SCRIPT, summary=(SCRIPT,), advice=(SCRIPT,), bars=bars, moments=moments)
    picture, page = svg_of(story), html_of(story)
    parsed(picture)
    for text in (picture, page):
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        assert not any(sign in text for sign in ("\x00", "\x1b", "\ud800"))
    assert "\x1b" not in on_a_terminal(story, 80)
    json.dumps(as_json(story)).encode()


def texts(picture: str) -> Iterator[tuple[float, float, str]]:
    """Where each text of a picture begins and ends, as wide as it can be."""
    for text in parsed(picture).iter("{http://www.w3.org/2000/svg}text"):
        width = len(text.text or "") * (9.1 if text.get("class") == "title" else 7.3)
        x = float(text.attrib["x"])
        first = {"end": x - width, "middle": x - width / 2}.get(text.get("text-anchor", ""), x)
        yield first, first + width, text.text or ""


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_a_picture_is_cut_off(name: str) -> None:
    for first, last, text in texts(svg_of(story_of(name))):
        assert first >= 0, text
        assert last <= 1000, text


def test_a_long_name_is_not_drawn_over_the_bars() -> None:
    story = story_of("steps_cancelled")
    story = replace(story, bars=tuple(replace(bar, label=bar.label * 20) for bar in story.bars))
    picture = parsed(svg_of(story))
    svg = "{http://www.w3.org/2000/svg}"
    for row in picture.iter(f"{svg}g"):
        name, bar = row.find(f"{svg}text"), row.find(f"{svg}rect")
        assert name is not None
        assert bar is not None
        assert float(name.attrib["x"]) + 7.3 * len(name.text or "") <= float(bar.attrib["x"])
        whole = row.find(f"{svg}title")
        assert whole is not None
        assert len(whole.text or "") > 100, "it is shown where the mouse is"
    for line in on_a_terminal(story, 60).splitlines():
        assert len(line) <= 60


def test_what_must_be_seen_of_many_steps_is_seen() -> None:
    story = with_most_steps(story_of("steps_succeeded"), 2)
    assert len(outcomes(story, BarKind.STEP)) == 2
    hidden = sum(story.hidden_steps.values())
    assert hidden > 0
    assert f"… and {hidden} more steps: {hidden} succeeded" in on_a_terminal(story, 80)
    assert Outcome.SUCCEEDED.value in story.hidden_steps


def test_the_page_describes_the_json() -> None:
    page = (Path(__file__).parents[3] / "docs" / "run-explain.md").read_text()
    told = as_json(story_of("not_cleaned_up"))
    for part in (told, told["bars"][0], told["marks"][0], told["moments"][0], asdict(Wait(""))):
        assert [key for key in part if f"`{key}`" not in page] == []
    assert [outcome for outcome in Outcome if f"`{outcome.value}`" not in page] == []
    assert json.loads(json.dumps(told)) == told | {
        key: list(value) for key, value in told.items() if isinstance(value, tuple)
    }
