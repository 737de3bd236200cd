"""The lines that people read."""

import logging
from typing import Any

import pytest

from dagster_taskiq.cli.logs import TextFormatter

RUN = "1dc80e42-cefb-4add-9b4e-77c668a79ced"


def line(message: str, name: str = "dagster_taskiq.worker", **extra: Any) -> str:
    record = logging.makeLogRecord({"msg": message, "name": name, **extra})
    return TextFormatter("%(message)s").format(record)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (line("run started", job="j", run_id=RUN, task_id="t1"), "run started job=j run=1dc80e42"),
        (line("Cancelling task t1", task_id="t1", run_id=RUN), "Cancelling task t1 run=1dc80e42"),
        (line("Cancelling task t1", task_id="t1"), "Cancelling task t1"),
        (line("lease lost", task_id="t1"), "lease lost task_id=t1"),
        (line("step ended", step_key="a b", seconds=1.5), 'step ended step="a b" seconds=1.5'),
        (line("run ended", reason='two\nlines of "it"'), 'run ended reason="two\\nlines of \\"it\\""'),
        (line("pool is full", name="urllib3.pool"), "pool is full (urllib3.pool)"),
    ],
)
def test_a_line_is_short_and_says_nothing_twice(said: str, expected: str) -> None:
    assert said == expected
