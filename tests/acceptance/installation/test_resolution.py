"""pip finds versions for us beside what people have, without trying one release of boto3 after another."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from threading import Timer
from typing import Final

import pytest
from tests.acceptance.installation.conftest import ROOT
from tests.support.pages import blocks
from tests.support.pages import commands as commands_in

import dagster_taskiq

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("wheel"),
]

NOT_FOR_EVER_S: Final = 600
"""Twenty times what the slowest one takes, with a pip of 2023."""
WALKED: Final = re.compile(r"\b(?:boto3|botocore|aiobotocore|s3transfer)-\d+\.\d+\.\d+")
FEW: Final = 8
"""Releases of these four that pip may look at. Without our range there are hundreds."""
BESIDE_US: Final = ["dagster-taskiq[postgres]", "dagster-aws", "boto3", "s3fs"]


def commands() -> list[list[str]]:
    """What the pages tell people to install, one list for each command."""
    found = []
    for page in ("README.md", "docs/installation.md"):
        for block in blocks(page, "bash"):
            found += [words[2:] for words in commands_in(block.text) if words[:2] == ["pip", "install"]]
    return found


def of_this_checkout(what: list[str], wheel: Path) -> list[str]:
    """As from an index that has this wheel: named like the others, neither a path nor one exact version."""
    name = "dagster-taskiq"
    ours = [f"{one}>={dagster_taskiq.__version__}" if one.startswith(name) else one for one in what]
    return ["--find-links", str(wheel.parent), *ours]


def asked(python: Path | str, what: list[str], wheel: Path, report: Path) -> dict[str, str]:
    """What this pip would install, by name. Fails when it finds nothing, and as soon as it tries too much."""
    pip = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", report]
    said, walked = [], set()
    with subprocess.Popen(
        [*map(str, pip), *of_this_checkout(what, wheel)],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as asking:
        assert asking.stdout is not None
        bound = Timer(NOT_FOR_EVER_S, asking.kill)
        bound.start()
        for line in asking.stdout:
            said.append(line)
            walked.update(WALKED.findall(line))
            if len(walked) > FEW:
                asking.kill()
        bound.cancel()
    assert len(walked) <= FEW, f"pip tries one release after another: {sorted(walked)}"
    assert asking.returncode == 0, (
        f"exit code {asking.returncode} ({NOT_FOR_EVER_S} s at most): {''.join(said)[-3000:]}"
    )
    installs = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    return {one["name"]: one["version"] for one in installs}


def test_beside_what_uses_boto3_as_well(wheel: Path, tmp_path: Path) -> None:
    assert BESIDE_US in commands(), "the pages no longer have it"
    found = asked(sys.executable, BESIDE_US, wheel, tmp_path / "report.json")
    assert {"dagster-aws", "dagster-postgres", "s3fs", "aioboto3"} <= set(found)


@pytest.fixture(scope="module")
def newest(index: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the newest pip and uv, and nothing else."""
    folder = tmp_path_factory.mktemp("newest")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip", "uv"], check=True, timeout=300)
    return python


@pytest.mark.nightly
@pytest.mark.parametrize("what", commands(), ids=" ".join)
def test_everything_on_the_pages(wheel: Path, newest: Path, tmp_path: Path, what: list[str]) -> None:
    asked(newest, what, wheel, tmp_path / "report.json")
    uv = [newest.parent / "uv", "pip", "install", "--python", newest, "--dry-run"]
    done = subprocess.run(
        [*map(str, uv), *of_this_checkout(what, wheel)],
        capture_output=True,
        text=True,
        timeout=NOT_FOR_EVER_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["aioboto3", "taskiq-aws"])
def test_what_we_are_built_on_has_no_newer_release(index: None, name: str) -> None:
    """When this fails, there is one: see what it pins, move our ranges and `constraints.txt`, or say why not."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    served = re.search(r"^\S+ \((.+)\)", listed.stdout, re.MULTILINE)
    assert served, listed
    tested = re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested
    assert served[1] == tested[1]
