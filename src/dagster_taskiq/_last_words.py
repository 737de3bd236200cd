"""What a process prints of itself, to streams that may lead nowhere: its worker's terminal, or a pipe, can be gone."""

import sys
import traceback
from contextlib import suppress


def print_traceback() -> None:
    """That of the exception that is being handled, to stderr. Never raises: what happened is reported in other ways."""
    with suppress(OSError, ValueError):
        traceback.print_exc()


def flush_output() -> None:
    """Write what stdout and stderr still hold. What they cannot take is lost, and is no error of the work."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
