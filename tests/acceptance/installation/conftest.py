"""A wheel of this checkout, and an index to install it from with everything that it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.acceptance.conftest import missing

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def index() -> None:
    """Skip where pip reaches no package index."""
    asked = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--retries", "1"]
    done = subprocess.run([*asked, "toposort"], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        missing(f"pip reaches no package index: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="session")
def wheel(index: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for each process of pytest; its tests are in one group, so once."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = folder.glob("*.whl")
    return built
