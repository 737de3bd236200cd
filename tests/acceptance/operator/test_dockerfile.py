"""The Dockerfile without Docker: what it copies is there, what it installs can be installed, what it starts works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.acceptance.conftest import open_platform

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def of(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def test_it_is_slim_and_not_root() -> None:
    stages = of("FROM")
    assert len(stages) == 2
    assert all("-slim" in stage for stage in stages)
    kinds = [name for name, _ in instructions()]
    assert of("USER") == ["dagster"]
    assert kinds.index("USER") < kinds.index("ENTRYPOINT")
    assert "COPY --from=build /opt/venv /opt/venv" in (ROOT / "Dockerfile").read_text()


def test_what_it_builds_starts_and_is_healthy(endpoint: str, tmp_path: Path) -> None:
    context, venv, opt = tmp_path / "build", tmp_path / "venv", tmp_path / "dagster"
    context.mkdir()
    opt.mkdir()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for copied in of("COPY"):
        *sources, target = [part for part in copied.split() if not part.startswith("--chown")]
        if sources[0].startswith("--from"):
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source.rstrip("/") not in ignored
            into = (
                opt / Path(target).name if target.startswith("/opt/dagster") else context / target / Path(source).name
            )
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, context / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, into)
    for command in of("RUN"):
        if command.startswith(("python -m venv", "/opt/venv/bin/pip install")):
            here = command.replace("/opt/venv", str(venv)).replace("python -m", f"{sys.executable} -m")
            done = subprocess.run(here, shell=True, cwd=context, capture_output=True, text=True, check=False)  # noqa: S602
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (entry,), (health,) = of("ENTRYPOINT"), of("HEALTHCHECK")
    program = [part.replace("/opt/dagster", str(opt)) for part in json.loads(entry)]
    check = json.loads(health.partition("CMD ")[2])
    program[0], check[0] = f"{venv}/bin/{program[0]}", f"{venv}/bin/{check[0]}"
    # Nothing of this process's own interpreter: the image has only what it installs.
    clean = {"PATH": f"{venv}/bin:{os.environ['PATH']}", "PYTHONPATH": "", "VIRTUAL_ENV": str(venv)}
    with open_platform(endpoint) as platform:
        environ = os.environ | clean | {"DAGSTER_HOME": str(platform.home)}

        def checked() -> "subprocess.CompletedProcess[str]":
            # A container has one worker; this machine may have those of other tests.
            only = [*check, "--pid", str(worker.pid)]
            return subprocess.run(only, cwd=opt, env=environ, capture_output=True, text=True, check=False)

        with platform.worker(program=program, env=clean) as worker:
            healthy = checked()
            assert (healthy.returncode, "is ready: 0 runs" in healthy.stdout) == (0, True), healthy
            assert worker.stop(within=60) == 0, worker.log()
        gone = checked()
        assert gone.returncode == 1
        assert "no worker runs here" in gone.stderr
