"""The wheel alone, outside the checkout: what the index shows of it, and that it has all it needs to work."""

import re
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from tests.acceptance.installation.conftest import ROOT
from tests.acceptance.operator.test_dev import dev
from tests.support.environment import clean_environment, processes_of
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("wheel"),
]


@pytest.fixture(
    scope="module",
    params=["with the libraries of the tests", pytest.param("with what pip gets", marks=pytest.mark.nightly)],
)
def program(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dagster-taskiq` in a new environment, from the wheel.

    Every commit takes the other libraries from this interpreter's environment, which saves a minute. Its own packages
    come first, and what pip has linked there to the checkout is not followed.
    """
    folder = tmp_path_factory.mktemp("installed")
    alone = request.param == "with what pip gets"
    venv.create(folder, with_pip=alone)
    python = folder / "bin" / "python"
    if alone:
        pip = [python, "-m", "pip", "install", f"{wheel}[local]"]
    else:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--force-reinstall", wheel]
    done = subprocess.run([*map(str, pip)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "bin" / "dagster-taskiq"


def said(program: Path, *arguments: str, home: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Give a command in an empty folder."""
    return subprocess.run(
        [program, *arguments],
        cwd=home,
        env=clean_environment(home) | environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_what_the_index_shows_leads_somewhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(opened.read(name).decode())
    page = str(metadata.get_payload())
    repository = dict(line.split(", ") for line in metadata.get_all("Project-URL") or [])["Homepage"]
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", page) == []
    ours = re.findall(rf"\]\({re.escape(repository)}/(?:blob|raw)/main/([^)#]+)", page)
    assert "docs/installation.md" in ours
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)", page)
    assert pictures
    assert [one for one in pictures if not one.startswith(f"{repository}/raw/main/")] == []
    assert [path for path in ours if not (ROOT / path).exists()] == []


def test_it_has_the_templates(program: Path, tmp_path: Path) -> None:
    for template in (ROOT / "infra").glob("*.yaml"):
        shown = said(program, "infra", "--show", template.stem, home=tmp_path)
        assert shown.stdout == template.read_text(), shown.stderr


def test_the_demo_keeps_its_promise(program: Path, tmp_path: Path) -> None:
    code = "import dagster_taskiq; print(dagster_taskiq.__file__)"
    where = subprocess.run(
        [program.parent / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(program.parents[1]), "it is not the wheel that is tested"
    shown = said(program, "demo", home=tmp_path)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "Both runs ended CANCELED" in shown.stdout


def test_the_doctor_finds_what_dev_has_started_in_order(program: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with dev(tmp_path, "--dagster-home", str(home), here=tmp_path, program=[str(program)]) as running:
        running.told(r"Dagster's UI: (\S+)")
        found = said(program, "doctor", home=tmp_path, DAGSTER_HOME=str(home))
        assert found.returncode == 0, found.stdout + found.stderr
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(120) == 0, running.say()
    wait_until(lambda: not processes_of(tmp_path), "everything is gone", seen=lambda: processes_of(tmp_path))
