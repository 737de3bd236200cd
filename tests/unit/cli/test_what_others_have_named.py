"""Names and tags are anybody's: they stand in a table or a line as they are, and a terminal does not obey them."""

import importlib
import io
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType

from dagster_taskiq.cli import run_list
from dagster_taskiq.cli.explain import explain
from dagster_taskiq.cli.output import shown
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.storage.workers import WorkerInfo, WorkInfo
from dagster_taskiq.story.run_list import ListedRun, RunList

NAME = "[/x][red]:smile:"
OBEYED = "\x1b]0;title\x07\x1b[2J\x9b2J\u202e"
WIDTHS = (40, 400)
worker_module: Any = importlib.import_module("dagster_taskiq.cli.worker")  # the package has a command of that name


def picture_of_runs() -> RenderableType:
    run = ListedRun("3e4a5f60" * 4, NAME, NAME + OBEYED, "STARTED", 0.0, 0.0, worker=NAME + OBEYED, waits_for=OBEYED)
    return run_list._Picture(RunList((run,), {"STARTED": 1}, 0, 0, 60.0), "")


def picture_of_workers() -> RenderableType:
    work = WorkInfo("3e4a5f60" * 4, NAME + OBEYED, "STARTED", NAME + OBEYED, 0.0)
    one = WorkerInfo(NAME + OBEYED, "alive", OBEYED, 0.0, time.time(), 1, 1, (work,))
    picture: RenderableType = worker_module._Picture(
        worker_module._Fleet([one], [f"the fleet is held by {NAME}{OBEYED}"])
    )
    return picture


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("picture", [picture_of_runs, picture_of_workers, lambda: shown(NAME + OBEYED)])
def test_they_are_shown_as_they_are(picture: Callable[[], RenderableType], width: int) -> None:
    written = io.StringIO()
    Console(file=written, width=width).print(picture())
    text = written.getvalue()
    assert NAME in text
    assert not set(OBEYED) & set(text) - set("0;title[2J]")


def test_an_error_is_one_line_that_a_terminal_shows() -> None:
    said = explain(DagsterTaskiqError(f"there is no run {NAME}{OBEYED}\nhere"))
    assert said is not None
    assert said.isprintable()
    assert NAME in said
