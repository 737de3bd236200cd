"""A message that nobody can use comes ever more rarely, is logged once, and is told while it is there."""

import pytest

from dagster_taskiq.sqs.unusable import LONGEST_PAUSE_OF_WORK_S, LONGEST_PAUSE_S, UnusableMessages

FOURTEEN_DAYS_S = 14 * 24 * 3_600


def test_it_is_hidden_longer_each_time() -> None:
    messages = UnusableMessages(30)
    pauses = [messages.add("m", "junk", count) for count in range(1, 11)]
    assert pauses == [30, 60, 120, 240, 480, 960, 1_920, 3_600, 3_600, 3_600]
    assert messages.add("m", "junk", 10**9) == LONGEST_PAUSE_S
    assert messages.add("n", "no database", 10**9, LONGEST_PAUSE_OF_WORK_S) == LONGEST_PAUSE_OF_WORK_S
    assert UnusableMessages(43_200).add("m", "junk", 1) == LONGEST_PAUSE_S


def test_in_fourteen_days_it_comes_some_hundred_times() -> None:
    messages, now, count = UnusableMessages(30), 0, 0
    while now < FOURTEEN_DAYS_S:
        count += 1
        now += messages.add("m", "junk", count)
    assert count < 350


def test_it_is_logged_once_unless_it_is_work_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    messages = UnusableMessages(30)
    for count in (1, 2, 3):
        messages.add("m", "junk\n\x00", count)
        messages.add("n", "no database", count, LONGEST_PAUSE_OF_WORK_S)
    (line,) = caplog.messages
    assert line.startswith("message m is left to expire; received 1 times, it comes again after 30 s")


def test_what_is_likely_to_be_gone_is_not_told() -> None:
    now = 0.0
    messages = UnusableMessages(30, clock=lambda: now)
    for number in range(20):
        messages.add(f"m-{number}", "junk", number + 1)
    assert [one.receive_count for one in messages.told()] == [*range(20, 10, -1)]
    now = 3_600 * 2 + 700
    assert messages.told() == []
    for number in range(200):
        messages.add(f"n-{number}", "junk", 1)
    assert len(messages._seen) == 100
