"""What the targets install into a fresh clone, and when."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOR_ITSELF, FOR_TESTS = "'.[local]'", "'.[local,test]'"


def installs(clone: Path, target: str) -> list[str]:
    """What make would install, in its order; it says so before each."""
    environ = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL"}}
    planned = subprocess.run(
        ["make", "--dry-run", target], cwd=clone, env=environ, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    at = [number for number, line in enumerate(planned) if "pip install" in line]
    assert all("about a minute" in planned[number - 1] for number in at), planned
    return [next(word for word in planned[number].split() if word.startswith("'.[")) for number in at]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    return tmp_path


@pytest.mark.parametrize("target", ["demo", "dev"])
def test_a_demo_installs_what_it_needs_and_a_test_adds_the_rest(clone: Path, target: str) -> None:
    assert installs(clone, target) == [FOR_ITSELF]
    (clone / ".venv" / ".installed-local").touch()
    assert installs(clone, target) == []
    assert installs(clone, "test") == [FOR_TESTS]
    (clone / ".venv" / ".installed").touch()
    assert installs(clone, "test") == installs(clone, target) == []


def test_a_change_of_the_versions_is_installed(clone: Path) -> None:
    for age, name in enumerate([".venv/.installed", ".venv/.installed-local", "constraints.txt"]):
        (clone / name).touch()
        os.utime(clone / name, (1e9 - 60 * age,) * 2)
    os.utime(clone / "pyproject.toml", (1e9 - 600,) * 2)
    assert installs(clone, "test") == []
    os.utime(clone / "constraints.txt", (1e9 + 60,) * 2)
    assert installs(clone, "demo") == [FOR_ITSELF]
    assert installs(clone, "test") == [FOR_ITSELF, FOR_TESTS]
