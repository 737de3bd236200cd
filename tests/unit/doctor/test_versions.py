"""Doctor knows which Dagster this release is tested with: the range that pip knows, too."""

import re
from importlib.metadata import requires, version

import pytest

from dagster_taskiq.doctor import checks


@pytest.mark.parametrize(
    ("dagster", "tested"),
    [
        ("1.12.14", False),
        ("1.13.2", False),
        ("1.13.3", True),
        ("1.13.29", True),
        ("1.13.30rc1", True),
        ("1.14.0", False),
        ("1.14rc0", False),
        ("2.0.0", False),
        ("1!0+dev", False),
    ],
)
def test_a_dagster_outside_of_the_tested_range_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, dagster: str, tested: bool
) -> None:
    known = version
    monkeypatch.setattr(checks, "version", lambda name: dagster if name == "dagster" else known(name))
    found = checks._versions()
    assert found.verdict == ("ok" if tested else "warning")
    assert f"dagster {dagster}" in found.reason
    if not tested:
        assert "tested with Dagster from 1.13.3 on, before 1.14" in found.reason
        assert found.repair == "pip install 'dagster>=1.13.3,<1.14'"


def test_the_range_is_that_of_our_metadata() -> None:
    (ours,) = [one for one in requires("dagster-taskiq") or [] if re.match(r"dagster[<>=]", one)]
    first, end = checks._TESTED_DAGSTER
    assert set(re.split(r",", ours.removeprefix("dagster"))) == {f">={first}", f"<{end}"}
