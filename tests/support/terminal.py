"""A program on a terminal of a given size: what a person sees of it, and Ctrl-C."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tests.support.waiting import wait_until

CLI = (sys.executable, "-m", "dagster_taskiq.cli")
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_HOME = "\x1b[H"


class Terminal:
    """One program on its terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]", ours: int) -> None:
        self.process = process
        self._ours = ours
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def written(self) -> str:
        """All that it has written, as it is."""
        return self._written.decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        """All that it has written, without colours."""
        return [line.rstrip() for line in _ESCAPES.sub("", self.written).splitlines()]

    @property
    def screen(self) -> str:
        """What stands on the screen since it was cleared."""
        return _ESCAPES.sub("", self.written.rpartition(_HOME)[2])

    def shows(self, *texts: str, within: float = 60.0) -> None:
        """Return once all of them are on the screen together."""
        wait_until(
            lambda: all(text in self.screen for text in texts), f"{texts}", within=within, seen=lambda: self.screen
        )

    def types(self, text: str) -> None:
        """As a person does."""
        os.write(self._ours, text.encode())

    def interrupt(self) -> int:
        """Ctrl-C; its exit code."""
        os.write(self._ours, b"\x03")
        return self.ended()

    def ended(self) -> int:
        """Its exit code, when all that it has written is there."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def _read(self) -> None:
        with suppress(OSError):  # the end of a terminal is an error
            while data := os.read(self._ours, 65_536):
                self._written += data


@contextmanager
def on_terminal(
    command: Sequence[str], environ: Mapping[str, str], *, columns: int = 100, rows: int = 24
) -> Iterator[Terminal]:
    """Start it; afterwards it is gone."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    sizeless = {name: value for name, value in environ.items() if name not in {"COLUMNS", "LINES"}}
    process = subprocess.Popen(
        command,
        env={"TERM": "xterm-256color", **sizeless},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
    )
    os.close(theirs)
    terminal = Terminal(process, ours)
    try:
        yield terminal
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
        terminal.ended()
        os.close(ours)
