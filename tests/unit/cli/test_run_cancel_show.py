"""What is shown of the runs that are to be cancelled fits the terminal, and is not longer than a person reads."""

import pytest

from dagster_taskiq.cli.run_cancel_show import Row, print_rows

NOW = 1_800_000_000.0
LONG = "a_job_with_a_name_that_is_a_good_deal_longer_than_any_column_of_a_table_on_a_terminal"


def rows(count: int, status: str, job: str = "load", partition: str = "") -> list[Row]:
    return [Row(f"{number:08d}-0000", job, "", partition, status, NOW - 7_400) for number in range(count)]


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: list[Row], columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_rows(what, NOW, err=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 100])
def test_every_line_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    what = [
        *rows(3, "NOT_STARTED", LONG, "2026-11-01|somewhere_in_the_world"),
        *rows(1, "STARTED", "[red]a\x1b[31m job\nof two lines"),
        *rows(1, "CANCELING"),
        *rows(20, "QUEUED", LONG),
    ]
    out = shown(capsys, monkeypatch, what, columns)
    assert max(map(len, out.splitlines())) <= columns, out
    assert out.startswith(
        "20 wait and are withdrawn before they start\n3 are starting: withdrawn, unless a worker has them\n"
        "1 is at work and is told to stop\n1 is stopping and is told again\n"
    )
    assert out.count("NOT_STARTED   2 h") == 3
    assert "[red]a" in out
    assert "\x1b[31m" not in out
    assert ("withdrawn, or told" in out) == (columns == 100)


def test_more_than_twenty_are_summed_up(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(capsys, monkeypatch, [*rows(15, "QUEUED"), *rows(285, "STARTED", "report")], 80)
    assert sum(" 2 h " in f"{line} " for line in out.splitlines()) == 10
    assert "… and 290 more:\n      285  STARTED      report\n        5  QUEUED       load\n" in out
    many = [row for number in range(25) for row in rows(1, "QUEUED", f"job_{number}")]
    assert "        5  of 5 other kinds\n" in shown(capsys, monkeypatch, many, 80)
