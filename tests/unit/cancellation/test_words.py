"""What people read of a cancellation."""

import pytest

from dagster_taskiq.cancellation.words import UNKNOWN_AUTHOR, asked, by_whom


@pytest.mark.parametrize(
    ("requested_by", "reason", "said"),
    [
        ("ada", "wrong input file", "by ada: wrong input file"),
        ("ada", None, "by ada"),
        (None, "wrong input file", "wrong input file"),
        (UNKNOWN_AUTHOR, None, "from Dagster's UI or API"),
        (UNKNOWN_AUTHOR, "wrong input file", "from Dagster's UI or API: wrong input file"),
        ("ada", "two\n  lines", "by ada: two lines"),
        (None, None, ""),
    ],
)
def test_by_whom_and_why(requested_by: str | None, reason: str | None, said: str) -> None:
    assert by_whom(requested_by, reason) == said


def test_it_follows_the_text_of_an_event_as_a_sentence() -> None:
    assert asked("Stopping.", "ada", "wrong input") == "Stopping. By ada: wrong input"
    assert asked("Stopping.", None, None) == "Stopping."
