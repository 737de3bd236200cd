"""A terminal in which the commands of a page are given, one block after the other.

Knows bash; not what the commands do.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.pages import ROOT


class Shell:
    """What one block exports, and the folder that it goes to, the next one has."""

    def __init__(self, folder: Path, cwd: Path, environ: dict[str, str], *, patience_s: float = 240) -> None:
        self._variables = folder / "variables"
        self._cwd = cwd
        self._patience_s = patience_s
        self.environ = environ

    @property
    def _before(self) -> str:
        return f'. {self._variables}\ncd "$PWD"\n' if self._variables.exists() else ""

    def run(self, script: str) -> str:
        """Returns what it has printed on stdout. It has to succeed, each of its commands."""
        try:
            done = subprocess.run(
                ["bash", "-c", f"{self._before}set -ex\n{script}\nset +x\nexport -p > {self._variables}"],
                cwd=self._cwd,
                env=self.environ,
                capture_output=True,
                text=True,
                timeout=self._patience_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{error}: {error.stdout!r}\n{(error.stderr or b'')[-3000:]!r}") from None
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, script: str, log: Path) -> "subprocess.Popen[bytes]":
        """Give a command that goes on, in another terminal with the same variables."""
        with log.open("w") as out:
            return subprocess.Popen(
                ["bash", "-c", f"{self._before}exec {script}"],
                cwd=self._cwd,
                env=self.environ,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def variable(self, name: str) -> str:
        return self.run(f'echo "${name}"').strip()


def path_with_aws(folder: Path) -> str:
    """`PATH` with our commands, and with as much of AWS's command line as the pages use (`aws_cli.py`)."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    aws = bin_folder / "aws"
    aws.write_text(f'#!/bin/sh\nexec {sys.executable} -P {ROOT}/tests/support/aws_cli.py "$@"\n')
    aws.chmod(0o755)
    return f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
