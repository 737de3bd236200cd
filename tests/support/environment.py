"""Commands that bring everything they need: an environment without AWS and Dagster, and whether all of it is gone."""

import os
from pathlib import Path


def clean_environment(home: Path) -> dict[str, str]:
    """No credentials, no Dagster: the command brings what it needs. `TMPDIR` tells its processes from others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DAGSTER_"))}
    return kept | {"HOME": str(home), "TMPDIR": str(home)}


def processes_of(home: Path) -> dict[int, str]:
    """Everything that runs with this `TMPDIR` in its environment: pid and command."""
    mark = f"TMPDIR={home}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # ended meanwhile
    return found
